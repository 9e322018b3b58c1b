"""The models are Hugging Face's models: features, packed tokens, logits and greedy answers."""

import copy
from functools import partial

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vlcache_jax
from pallas_kernels.prefill_attention import prefill_attention
from tests import hf
from tests.tiny import picture
from vlcache_jax import Buckets
from vlcache_jax.models.families import bind
from vlcache_jax.running.stages import Stages

BOUND = 1e-4
BF16_FACTOR = 1.25
"""Largest bfloat16 error of ours, as a multiple of that of Hugging Face's own bfloat16 model."""

PROMPTS = {
    "wide": ([(300, 60)], "<image>\nwhat is this?"),
    "tall": ([(50, 400)], "look: <image>\nwhat is this?"),
    "square": ([(56, 56)], "<image>"),
    "one pixel": ([(1, 1)], "<image> why?"),
    "large": ([(1500, 1100)], "<image>\nname the colours"),
    "two": ([(90, 40), (33, 77)], "first <image> and second <image> differ?"),
    "none": ([], "no picture at all, only words"),
}

BUCKETS = {
    "llava": Buckets(prompt=(64,), tiles=(0, 2)),
    "llava_next": Buckets(prompt=(192,), tiles=(0, 6, 20)),
    "llava_onevision": Buckets(prompt=(192,), tiles=(0, 37)),
}
"""Few, so that one program serves all prompts with pictures; "two" fills its bucket of tiles."""


class Pair:
    """The same model twice: Hugging Face's and ours, loaded from its files; compiled once."""

    def __init__(self, kind, folder):
        self.family, decoder, shape = hf.KINDS[kind]
        self.theirs = hf.hf_model(self.family, decoder, shape)
        self.path = hf.save(self.theirs, folder / "model", self.family)
        self.ours = vlcache_jax.load(self.path, buckets=BUCKETS[self.family])
        self.ours.stop_ids = ()  # as Hugging Face's model: the tokenizer's own would be taken
        self.logits = jax.jit(Stages(self.ours.config).prompt_logits)
        self.vision = jax.jit(self._vision)

    def _vision(self, params, inputs):
        """The decoder's input, and features of the tower."""
        model = bind(self.ours.config)(params)
        attend = partial(prefill_attention, causal=False)
        tower = model.vision(inputs.tiles, model.vision_layers, attend=attend)
        return model.embed_prompt(inputs, attend).x, tower

    def inputs(self, name):
        sizes, prompt = PROMPTS[name]
        images = [picture(*size) for size in sizes]
        ours = self.ours.processor(images, prompt, raw_prompt=True)
        return ours, hf.hf_inputs(self.family, images, prompt)


@pytest.fixture(scope="module", params=hf.KINDS)
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("name", [name for name in PROMPTS if name != "none"])
def test_visual_features_and_packed_tokens(pair, name):
    inputs, theirs = pair.inputs(name)
    text = ("input_ids", "attention_mask")
    with torch.no_grad():
        out = pair.theirs.model.get_image_features(
            **{name: value for name, value in theirs.items() if name not in text}
        )
    packed = np.concatenate([np.asarray(x) for x in out.pooler_output])

    merged, tower = map(np.asarray, pair.vision(pair.ours.params, inputs))
    ours = merged[inputs.visual_index >= 0]
    assert ours.shape == packed.reshape(-1, packed.shape[-1]).shape
    assert hf.relative_error(ours, packed.reshape(ours.shape)) < BOUND

    pixels = theirs["pixel_values"].reshape(-1, *inputs.tiles.shape[1:])
    with torch.no_grad():
        features = pair.theirs.model.vision_tower(pixels, output_hidden_states=True)
    layer, count = pair.theirs.config.vision_feature_layer, pair.ours.config.tile_tokens
    theirs_tower = features.hidden_states[layer][:, -count:].numpy()  # without a class token
    real = (
        np.abs(pixels.numpy()).reshape(len(pixels), -1).max(-1) > 0
    )  # not the processor's padding
    assert hf.relative_error(tower[: real.sum()], theirs_tower[real]) < BOUND


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_of_every_position(pair, name):
    inputs, theirs = pair.inputs(name)
    hf.check_logits(pair, inputs, theirs, BOUND)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_same_greedy_tokens(pair, name):
    sizes, prompt = PROMPTS[name]
    images = [picture(*size) for size in sizes]
    hf.check_greedy(pair, hf.hf_inputs(pair.family, images, prompt), images, prompt)


def test_a_batch_of_unequal_prompts_equals_batch_one(pair):
    prompts = [PROMPTS[name] for name in ("tall", "none", "two", "one pixel")]
    images = [[picture(*size) for size in sizes] for sizes, _ in prompts]
    texts = [text for _, text in prompts]
    batch = pair.ours.generate(images, texts, max_new_tokens=32, raw_prompt=True)
    for row, (pictures, text) in enumerate(zip(images, texts, strict=True)):
        alone = pair.ours.generate(pictures, text, max_new_tokens=32, raw_prompt=True)
        assert batch[row].tokens == alone.tokens
        assert batch[row].text == alone.text
        assert batch[row].prompt_tokens == alone.prompt_tokens
        assert batch[row].cache.kept_bytes == alone.cache.kept_bytes


def test_bfloat16_is_no_further_from_float32_than_hugging_face_is(pair):
    """Rounding grows with depth and with the weights, so the bound is the other model's error."""
    ours = vlcache_jax.load(pair.path, dtype="bfloat16")
    inputs, theirs = pair.inputs("two")
    rounded = {k: v.bfloat16() if v.dtype == torch.float32 else v for k, v in theirs.items()}
    with torch.no_grad():
        expected = pair.theirs(**theirs).logits[0].numpy()
        half = copy.deepcopy(pair.theirs).to(torch.bfloat16)
        hf_logits = half(**rounded).logits[0].float().numpy()
    logits = pair.logits(ours.params, inputs)
    assert logits.dtype == np.float32
    error = hf.relative_error(logits[0, : len(expected)], expected)
    assert error < BF16_FACTOR * hf.relative_error(hf_logits, expected)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 5e5,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_scaling(rope, tmp_path):
    shape = {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": rope}
    model = hf.hf_model("llava_next", "llama", shape)
    ours = vlcache_jax.load(hf.save(model, tmp_path / "model", "llava_next"))
    prompt = "a prompt long enough to turn the slow frequencies too: <image> " + "x" * 150
    images = [picture(200, 90)]
    theirs = hf.hf_inputs("llava_next", images, prompt)
    with torch.no_grad():
        expected = model(**theirs).logits[0].numpy()
    inputs = ours.processor(images, prompt, raw_prompt=True)
    logits = jax.jit(Stages(ours.config).prompt_logits)(ours.params, inputs)
    assert hf.relative_error(logits[0, : len(expected)], expected) < BOUND


def test_tied_embeddings(tmp_path):
    model = hf.hf_model("llava", "llama", {"num_key_value_heads": 4, "tie_word_embeddings": True})
    ours = vlcache_jax.load(hf.save(model, tmp_path / "model", "llava"))
    assert "kernel" not in ours.params["head"]
    theirs = hf.hf_inputs("llava", [], "only words")
    with torch.no_grad():
        expected = model(**theirs).logits[0].numpy()
    inputs = ours.processor(None, "only words", raw_prompt=True)
    logits = jax.jit(Stages(ours.config).prompt_logits)(ours.params, inputs)
    assert hf.relative_error(logits[0, : len(expected)], expected) < BOUND
