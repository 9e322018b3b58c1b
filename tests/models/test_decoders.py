"""Decoders alone are Hugging Face's: logits and greedy answers of random decoders of each kind."""

import jax
import pytest

torch = pytest.importorskip("torch")

import vlcache_jax
from tests import hf
from vlcache_jax import AKVQ, Buckets, FullCache
from vlcache_jax.running.stages import Stages

BOUND = 1e-4
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
KINDS = {
    "Llama GQA": ("llama", {"num_key_value_heads": 2}),
    "Llama tied, 3 to a kv head": (
        "llama",
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "Llama 3.1's rope": ("llama", {"num_key_value_heads": 2, "rope_parameters": ROPE}),
    "Mistral GQA": ("mistral", {"num_key_value_heads": 2, "head_dim": 16}),
    "Qwen2, 7 to a kv head": (
        "qwen2",
        {"hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2},
    ),
    "Qwen2 tied": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
}
TEXTS = ["no picture at all, only words", "why?", "a longer text: " + "words and words " * 7]


class Pair:
    """The same decoder twice: Hugging Face's and ours, loaded from its files."""

    def __init__(self, kind, folder):
        self.theirs = hf.hf_model("text", *KINDS[kind])
        self.path = hf.save(self.theirs, folder / "model", "text")
        self.ours = vlcache_jax.load(self.path, buckets=Buckets(prompt=(160,), tiles=(0,)))
        self.ours.stop_ids = ()  # as Hugging Face's model: the tokenizer's own would be taken
        self.logits = jax.jit(Stages(self.ours.config).prompt_logits)

    def ids(self, text):
        return torch.tensor(self.ours.processor.tokenizer(text)["input_ids"])[None]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp("decoder"))


def test_the_parameters_are_those_of_a_decoder(pair):
    assert pair.ours.params.keys() == {"embed", "layers", "head"}
    tied = pair.theirs.config.tie_word_embeddings
    assert ("kernel" in pair.ours.params["head"]) == (not tied)


@pytest.mark.parametrize("text", TEXTS)
def test_logits_of_every_position(pair, text):
    inputs = pair.ours.processor(None, text, raw_prompt=True)
    assert inputs.tiles.shape[0] == 0
    hf.check_logits(pair, inputs, {"input_ids": pair.ids(text)}, BOUND)


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_greedy_tokens(pair, text):
    ids = pair.ids(text)
    with torch.no_grad():
        out = pair.theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False,
            pad_token_id=3,
        )  # fmt: skip
    expected = out[0, ids.shape[1] :].tolist()
    answer = pair.ours.generate(text=text, max_new_tokens=32, raw_prompt=True)
    assert answer.tokens == expected
    assert answer.visual_tokens == 0
    assert len(set(expected)) > 3, "the model says one thing only: the test would prove little"


def test_transformed_values_change_no_logits(pair):
    hf.check_transform(pair, pair.ours.processor(None, TEXTS[0], raw_prompt=True), BOUND)


def test_a_quantized_cache_begins_the_same_answer(pair):
    asked = {"text": TEXTS[2], "max_new_tokens": 12, "raw_prompt": True}
    full = pair.ours.generate(**asked)
    akvq = AKVQ(bits=8, text_bits=8, recent=8)
    packed = pair.ours.generate(**asked, cache=FullCache(quantize=akvq))
    assert packed.tokens[:2] == full.tokens[:2]  # the first is that of the prompt itself
    assert packed.cache.kept_bytes < full.cache.kept_bytes


def test_a_batch_of_unequal_prompts_equals_batch_one(pair):
    batch = pair.ours.generate(text=TEXTS, max_new_tokens=16, raw_prompt=True, cache="vl-cache")
    for row, text in zip(batch, TEXTS, strict=True):
        alone = pair.ours.generate(text=text, max_new_tokens=16, raw_prompt=True, cache="vl-cache")
        assert row.tokens == alone.tokens
        assert row.cache.kept_bytes == alone.cache.kept_bytes


def test_converted_and_loaded_by_transformers_again(pair, tmp_path):
    loaded = hf.check_conversion(pair, tmp_path)
    text = TEXTS[0]
    with torch.no_grad():
        expected = loaded(pair.ids(text)).logits
        assert torch.equal(expected, pair.theirs(pair.ids(text)).logits)
