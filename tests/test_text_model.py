"""A decoder alone, from its directory to the command line: text in, text out, no pictures."""

import json

import numpy as np
import pytest

import vlcache_jax
from convert.program import convert
from tests.cli.program import refused, run
from tests.model_files import decoder_json, random_tensors, read_tensors, same_bits, write_model
from tests.tiny import picture, text_tokenizer
from vlcache_jax import DEFAULT_METHOD, ModelConfig, Processor, VLCache
from vlcache_jax.checkpoints.checkpoint import open_checkpoint
from vlcache_jax.models.families import read_config
from vlcache_jax.models.llava.config import with_vision


@pytest.fixture(scope="module")
def vlm(text_dir):
    return vlcache_jax.load(text_dir)


def test_the_configuration_has_no_pictures():
    config = read_config(decoder_json("mistral"))
    assert type(config) is ModelConfig
    assert (config.family, config.text.kind) == ("mistral", "mistral")
    assert (config.max_tiles, config.tile_side, config.tile_tokens) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"^a mistral decoder reads text alone: .*vision tower$"):
        with_vision(config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "gpt2"}, NotImplementedError, r'model_type=.gpt2. must be "llama" or'),
        ({"sliding_window": 16}, NotImplementedError, r"^config.json: sliding_window=16 binds"),
        ({"attention_bias": True}, NotImplementedError, r"^config.json: attention_bias=True must"),
        ({"hidden_size": 33}, ValueError, r"^config.json: hidden_size=33 must be a multiple of 4"),
        ({"num_key_value_heads": 3}, ValueError, r"^config.json: num_attention_heads=4 must be"),
        ({"rope_scaling": {"type": "yarn"}}, NotImplementedError, r"rope_scaling.type='yarn'"),
        ({"eos_token_id": 64}, ValueError, r"^config.json: eos_token_id=64 must be a token id"),
        ({"quantization_config": {}}, NotImplementedError, "quantised by an unnamed method"),
    ],
)
def test_what_is_not_implemented_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        read_config(decoder_json() | change)


def test_the_prompt_is_the_tokenizers(vlm):
    [inputs] = vlm.processor.groups(None, "What is <image> here?")
    rendered = "user: What is <image> here?\nassistant:"
    expected = text_tokenizer()(rendered)["input_ids"]
    assert inputs.tokens[0, : int(inputs.length[0])].tolist() == expected
    assert (inputs.visual_index == -1).all()
    assert inputs.tiles.shape == (0, 3, 0, 0)
    assert vlm.processor.patches([]) == []
    with pytest.raises(ValueError, match=r"^a llama decoder has no visual tokens"):
        vlm.processor.patches([(28, 28)])
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    [inputs] = vlm.processor.groups(None, turns)
    expected = text_tokenizer()("system: Be brief.\nuser: Why?\nassistant:")["input_ids"]
    assert inputs.tokens[0, : int(inputs.length[0])].tolist() == expected


@pytest.mark.parametrize("raw_prompt", [False, True])
def test_pictures_are_refused(vlm, raw_prompt):
    message = r"^the model reads text alone and was given 1 picture: leave them out"
    with pytest.raises(ValueError, match=message):
        vlm.generate(picture(8, 8), "What?", raw_prompt=raw_prompt)
    with pytest.raises(ValueError, match=r"given 2 pictures"):
        vlm.generate([None, [picture(8, 8)] * 2], ["What?", "Why?"], raw_prompt=raw_prompt)
    if not raw_prompt:
        part = [{"role": "user", "content": [{"type": "image"}]}]
        with pytest.raises(ValueError, match=message):
            vlm.generate(messages=part)


def test_a_prompt_that_the_model_cannot_take(vlm):
    with pytest.raises(ValueError, match=r"positions: shorten the text or its context$"):
        vlm.generate(text="word " * 300)
    tokenizer = text_tokenizer()
    tokenizer.chat_template = None
    process = Processor(vlm.config, tokenizer)
    with pytest.raises(ValueError, match=r"no chat template: .*raw_prompt=True \(--raw-prompt\)$"):
        process(None, "What?")
    assert process(None, "What?", raw_prompt=True).length == [6]


def test_missing_and_foreign_files(text_dir, tmp_path):
    config = decoder_json() | {"vocab_size": 264}
    path = write_model(tmp_path / "model", config, random_tensors(config))
    (path / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json or tokenizer.model in"):
        vlcache_jax.load(path)
    text_tokenizer().save_pretrained(path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {}}))
    with pytest.raises(ValueError, match="asks for remote code"):
        vlcache_jax.load(path)
    tensors = random_tensors(config) | {"model.layers.9.mlp.up_proj.weight": np.zeros((2, 2))}
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    broken = write_model(tmp_path / "broken", config, tensors)
    message = r"missing: model.layers.0.self_attn.k_proj.weight.*unknown: model.layers.9"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(broken)


@pytest.mark.parametrize("tied", [False, True])
def test_conversion_keeps_every_bit_and_name(tied, tmp_path):
    config = decoder_json("mistral", tied=tied)
    tensors = random_tensors(config)
    assert ("lm_head.weight" in tensors) != tied
    path = write_model(tmp_path / "hf", config, tensors, shards=3)
    there = convert(path, tmp_path / "orbax")
    assert sorted(entry.name for entry in (there / "params").iterdir()) == [
        "embed",
        "head",
        "layer_000",
        "layer_001",
    ]
    assert same_bits(read_tensors(convert(there, tmp_path / "back", to_hf=True)), tensors)


def test_the_command_line(text_dir, tmp_path):
    ask = "--prompt", "What is it about?", "--max-new-tokens", 4
    result = run("generate", text_dir, *ask, "--kv-budget", 0.5, "--json")
    facts = json.loads(result.stdout)
    assert (facts["visual_tokens"], len(facts["tokens"])) == (0, 4)
    assert facts["kv"]["kept_share"] == pytest.approx(0.5, abs=0.05)

    converted = convert(text_dir, tmp_path / "converted")
    result = run("compare", converted, *ask, "--json")
    named = [answer["kv"]["method"] for answer in json.loads(result.stdout)["answers"]]
    assert named == ["full", DEFAULT_METHOD, "vl-cache"]
    for command in ("generate", "chat"):
        reason = "reads text alone and was given 1 picture"
        refused(reason, command, text_dir, "--image", "demo-small:2")

    result = run("info", text_dir)
    assert result.exit_code == 0
    for word in ("(llama,", "float32)"):  # a long path is wrapped
        assert word in result.stdout
    assert "vis" not in result.stdout
    assert "image tiles" not in result.stdout
    facts = json.loads(run("info", text_dir, "--json").stdout)
    assert facts["parameters"].keys() == {"embed", "layers", "head", "total"}
    assert (facts["tile_tokens"], [b["size"] for b in facts["buckets"]["tiles"]]) == (0, [0])


def test_inspection_without_pictures(vlm, tmp_path):
    found = vlcache_jax.inspect(vlm, text="What is it about?", methods=[VLCache(0.5)])
    found.save(tmp_path / "report.html")
    assert found.visual.sum() == 0
    assert "What is it about?" in (tmp_path / "report.html").read_text(encoding="utf-8")
