"""GGUF files: the tensors, the configuration and the tokenizer that they hold, and all refusals."""

import json
import sys
import tracemalloc
from contextlib import suppress

import jax
import numpy as np
import pytest

pytest.importorskip("gguf", reason="GGUF files need the package gguf (extra `gguf`)")

import vlcache_jax
from convert.program import convert
from tests.cli.program import refused, run
from tests.gguf_files import (
    HEAD_DIM,
    SPECIAL,
    TEMPLATE,
    byte_level,
    hub_tensors,
    metadata,
    sentencepiece,
    stored,
    write,
)
from tests.model_files import read_tensors
from vlcache_jax.checkpoints.checkpoint import open_checkpoint
from vlcache_jax.checkpoints.find import resolve
from vlcache_jax.checkpoints.gguf import GgufFile
from vlcache_jax.checkpoints.weights import join, tensors_of
from vlcache_jax.models.config import RopeConfig
from vlcache_jax.models.llama import rope_frequencies
from vlcache_jax.models.names import DECODER

VOCAB = len(byte_level()["tokenizer.ggml.tokens"])


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "tiny.gguf", hub_tensors(VOCAB))


def expected_params(tensors, checkpoint, dtype=np.float32):
    """Every parameter, joined from Hugging Face's tensors."""
    return {
        name: join(
            DECODER, name, shape, np.dtype(dtype),
            [tensors[key] for key in tensors_of(DECODER, name, shape)],
        )
        for name, shape in checkpoint.shapes.items()
    }  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_tensor_is_read_dequantised_and_in_its_place(kind, tied, tmp_path):
    tensors = hub_tensors(VOCAB, tied=tied)
    path = write(tmp_path / "tiny.gguf", tensors, kind=kind)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.text.tie_embeddings == tied
    assert checkpoint.dtype == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    expected = expected_params(stored(tensors, kind), checkpoint)
    seen = []
    for piece, arrays in checkpoint.read_all(np.dtype(np.float32)):
        for name, array in arrays:
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
            seen.append(name)
        assert piece in checkpoint.pieces
    assert seen == list(expected)


def test_a_tensor_is_dequantised_part_by_part(tmp_path):
    """What is dequantised lies in its place: beside it are a few blocks, not a second tensor."""
    tensors = hub_tensors(VOCAB) | {"model.embed_tokens.weight": np.ones((2**17, 64), np.float32)}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    path = write(tmp_path / "large.gguf", tensors, kind="Q4_1")
    file = GgufFile(path)
    file.tensor("blk.0.attn_q.weight", np.dtype(np.float32))
    tracemalloc.start()
    try:
        whole = file.tensor("token_embd.weight", np.dtype(np.float32))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert whole.nbytes == 32 * 2**20
    assert most < 1.25 * whole.nbytes


def test_the_configuration(model):
    config = open_checkpoint(model).config
    text = config.text
    assert (config.family, text.vocab_size, text.hidden_size) == ("llama", VOCAB, 64)
    assert (text.num_heads, text.num_kv_heads, text.head_dim, text.num_layers) == (4, 2, 16, 2)
    assert (text.intermediate_size, text.max_positions, text.rms_norm_eps) == (96, 512, 1e-5)
    assert (text.rope, text.eos_token_ids) == (RopeConfig(1e4), (1,))


def test_rope_scaling(tmp_path):
    tensors = hub_tensors(VOCAB)

    def rope(extra=None, **changes):
        path = write(tmp_path / "rope.gguf", tensors, metadata(**changes), extra=extra)
        return open_checkpoint(path).config.text.rope

    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    assert rope(**linear) == RopeConfig(1e4, "linear", 4.0)
    assert rope(rope__scale_linear=2.0) == RopeConfig(1e4, "linear", 2.0)
    llama3 = RopeConfig(5e5, "llama3", 32.0, 1.0, 4.0, 8192)
    factors = rope_frequencies(RopeConfig(5e5), HEAD_DIM) / rope_frequencies(llama3, HEAD_DIM)
    extra = {"rope_freqs.weight": factors.astype(np.float32)}
    assert rope(extra, rope__freq_base=5e5) == llama3
    assert rope({"rope_freqs.weight": np.ones(8, np.float32)}) == RopeConfig(1e4)
    factors[3] *= 1.5
    with pytest.raises(NotImplementedError, match=r"rope_freqs.weight scales positions by another"):
        rope({"rope_freqs.weight": factors.astype(np.float32)}, rope__freq_base=5e5)


TEXTS = [
    "the other thing",
    "  the  in\tthe\n\n then",
    "wörld 漢字 🙂",
    "12  345 the1",
    "<|user|>the<|end|>in",
    "",
]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "tekken"])
def test_a_byte_level_tokenizer(pre, tmp_path):
    keys = byte_level() | {"tokenizer.ggml.pre": pre}
    path = write(tmp_path / "tiny.gguf", hub_tensors(VOCAB), tokenizer=keys)
    tokenizer = vlcache_jax.load(path, lazy=True).processor.tokenizer
    tokens = keys["tokenizer.ggml.tokens"]
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=False).removeprefix("<|begin|>") == text
    assert [tokens[id_] for id_ in tokenizer("<|user|>the then")["input_ids"]] == [
        *(["<|begin|>"] if pre == "llama-bpe" else []),
        *("<|user|>", "the", "Ġthe", "n"),
    ]
    assert tokenizer.all_special_tokens[:2] == SPECIAL[:2]
    # Spaces in front of a digit: a rule that takes digits first leaves them together.
    two = [tokens[id_] for id_ in tokenizer("in  7")["input_ids"] if id_ >= len(SPECIAL)]
    assert two == {"smollm": ["in", "ĠĠ", "7"]}.get(pre, ["in", "Ġ", "Ġ", "7"])
    assert tokenizer.chat_template == TEMPLATE


def test_a_sentencepiece_tokenizer(tmp_path):
    keys = sentencepiece()
    tokens = keys["tokenizer.ggml.tokens"]

    def pieces(text, **changes):
        changed = keys | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
        path = write(tmp_path / "spm.gguf", hub_tensors(len(tokens)), tokenizer=changed)
        tokenizer = vlcache_jax.load(path, lazy=True).processor.tokenizer
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        return [tokens[id_] for id_ in ids]

    # Scores rank "▁t" before "he" before "▁the": the merges are theirs.
    assert pieces("the in") == ["<s>", "▁the", "▁in"]
    assert pieces("thé") == ["<s>", "▁t", "h", "<0xC3>", "<0xA9>"]
    assert pieces("the<mark>in") == ["<s>", "▁the", "<mark>", "in"]
    assert pieces("the", add_bos_token=False, add_space_prefix=False) == ["t", "he"]
    path = write(
        tmp_path / "eos.gguf",
        hub_tensors(len(tokens)),
        tokenizer=keys | {"tokenizer.ggml.add_eos_token": True},
    )
    ids = vlcache_jax.load(path, lazy=True).processor.tokenizer("the")["input_ids"]
    assert [tokens[id_] for id_ in ids] == ["<s>", "▁the", "</s>"]


REFUSED = {
    "architecture": ({"arch": "qwen2"}, NotImplementedError, "general.architecture='qwen2' must"),
    "adapter": ({"keys": {"general.type": "adapter"}}, NotImplementedError, "general.type='adap"),
    "experts": ({"keys": metadata(expert_count=8)}, NotImplementedError, "expert_count=8 must"),
    "unknown key": (
        {"keys": metadata(attention__scale=0.5)},
        NotImplementedError,
        "llama.attention.scale is not understood",
    ),
    "partial rope": (
        {"keys": metadata(rope__dimension_count=8)},
        NotImplementedError,
        "rope.dimension_count=8 must be 16",
    ),
    "yarn": ({"keys": metadata(rope__scaling__type="yarn")}, NotImplementedError, "type='yarn'"),
    "no width": ({"keys": metadata(embedding_length=None)}, ValueError, "embedding_length, which"),
    "heads of layers": (
        {"keys": metadata(attention__head_count_kv=[2, 2])},
        ValueError,
        r"head_count_kv=\[2, 2\] must be a whole number",
    ),
    "odd heads": ({"keys": metadata(attention__head_count_kv=3)}, ValueError, "multiple of"),
    "layers": ({"keys": metadata(block_count=3)}, ValueError, r"missing: blk.2.attn_q.weight"),
    "width": ({"keys": metadata(feed_forward_length=97)}, ValueError, r"ffn_gate.weight is \[96"),
    "unknown tensor": (
        {"extra": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}},
        ValueError,
        "unknown: blk.0.attn_q.bias",
    ),
    "type": (
        {"extra": {"blk.0.x": np.zeros(64, np.int32)}},
        NotImplementedError,
        "blk.0.x is stored as I32",
    ),
    "window": (
        {"keys": metadata(attention__sliding_window=64)},
        NotImplementedError,
        "sliding_window=64 binds",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name, tmp_path):
    arguments, error, message = REFUSED[name]
    if "general.type" in arguments.get("keys", {}):
        arguments = {"keys": metadata() | arguments["keys"]}
    path = write(tmp_path / "tiny.gguf", hub_tensors(VOCAB), **arguments)
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(path)
    assert "tiny.gguf" in str(caught.value)
    assert len(str(caught.value)) <= 400
    assert "\n" not in str(caught.value)
    refused("tiny.gguf", "generate", path, "--prompt", "What?")


TOKENIZERS = {
    "model": ({"model": "bert"}, NotImplementedError, "tokenizer.ggml.model='bert' must be"),
    "pre": ({"pre": "falcon"}, NotImplementedError, "tokenizer.ggml.pre='falcon' must be"),
    "no pre": ({"pre": None}, NotImplementedError, "pre, which is missing, must be"),
    "merge": ({"merges": ["q zz"]}, ValueError, "its tokenizer is damaged"),
    "types": ({"token_type": [1, 1]}, ValueError, "have 2 types"),
    "twice": ({"tokens": ["a"] * VOCAB}, ValueError, "1 of them different"),
    "special": ({"bos_token_id": 5000}, ValueError, "bos_token_id=5000 must be"),
    "list": ({"merges": [1, 2]}, ValueError, "merges=.* must be a list of strings"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_unknown_and_damaged_tokenizers(name, tmp_path):
    changes, error, message = TOKENIZERS[name]
    keys = byte_level() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    keys = {key: value for key, value in keys.items() if value is not None}
    path = write(tmp_path / "tiny.gguf", hub_tensors(VOCAB), tokenizer=keys)
    with pytest.raises(error, match=message) as caught:
        vlcache_jax.load(path, lazy=True)
    assert "tiny.gguf" in str(caught.value)


def test_a_truncated_file_is_refused_before_a_tensor_is_read(model, tmp_path):
    content = model.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (*range(4, 400, 13), len(content) // 20, len(content) // 2, len(content) - 64):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut.gguf is truncated or damaged .*download"):
            open_checkpoint(cut)
    refused("truncated or damaged", "info", cut)


def test_damaged_bytes_are_refused_or_read(model, tmp_path):
    content, rng = bytearray(model.read_bytes()), np.random.default_rng(0)
    head = content.index(b"tokenizer.ggml.model")
    file = tmp_path / "damaged.gguf"
    for _ in range(60):
        changed = bytearray(content)
        changed[int(rng.integers(4, head))] = int(rng.integers(256))
        file.write_bytes(changed)
        with suppress(ValueError, NotImplementedError):
            open_checkpoint(file)


def test_another_file_is_no_gguf(tmp_path):
    for content in (b"", b"GG", b"\x80\x04 a pickle", b"{}"):
        file = tmp_path / "model.gguf"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"is a file, but no GGUF file: give the"):
            resolve(file)
    refused("no GGUF file", "generate", file, "--prompt", "What?")


def test_without_the_package(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'vlcache-jax\[gguf"):
        open_checkpoint(model)


def test_revision_is_the_hubs(model):
    with pytest.raises(ValueError, match="is not on the hub and has no revision='main'"):
        resolve(model, revision="main")


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_converted_to_either_kind_of_directory(kind, tmp_path):
    tensors = hub_tensors(VOCAB)
    path = write(tmp_path / "tiny.gguf", tensors, kind=kind)
    there = convert(path, tmp_path / "orbax")
    back = convert(path, tmp_path / "hf", to_hf=True)
    again = convert(there, tmp_path / "again", to_hf=True)
    dtype = "float16" if kind == "F16" else "float32"
    expected = {name: array.astype(dtype) for name, array in stored(tensors, kind).items()}
    for directory in (back, again):
        found = read_tensors(directory)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
    source = json.loads((there / "MANIFEST.json").read_text())["source"]
    assert source["files"] == [{"name": "tiny.gguf", "bytes": path.stat().st_size}]

    first = vlcache_jax.load(path)
    answer = first.generate(text="the thing", max_new_tokens=8)
    for directory in (there, back):
        other = vlcache_jax.load(directory)
        assert other.config == first.config
        assert other.stop_ids == first.stop_ids == (1,)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), other.params, first.params))
        for text in TEXTS:
            ids = first.processor.tokenizer(text)["input_ids"]
            assert other.processor.tokenizer(text)["input_ids"] == ids
        assert other.generate(text="the thing", max_new_tokens=8).tokens == answer.tokens


def test_converted_in_another_number_type(model, tmp_path):
    there = convert(model, tmp_path / "hf", dtype="bfloat16", to_hf=True)
    assert json.loads((there / "config.json").read_text())["dtype"] == "bfloat16"
    assert open_checkpoint(there).dtype == "bfloat16"


def test_the_command_line(model, tmp_path):
    ask = model, "--prompt", "the thing", "--max-new-tokens", 4, "--json"
    answer = json.loads(run("generate", *ask, "--method", "full").stdout)
    assert len(answer["tokens"]) == 4
    facts = json.loads(run("info", model, "--json").stdout)
    assert (facts["family"], facts["dtype"], facts["max_positions"]) == ("llama", "float32", 512)
    refused("reads text alone", "generate", model, "--image", "demo-small", "--prompt", "What?")
