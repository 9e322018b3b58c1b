"""Qwen2.5-VL and Qwen3-VL are Hugging Face's: features, positions, logits and greedy answers."""

import copy
import json
import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")

from transformers.vision_utils import get_vision_window_index

import vlcache_jax
from pallas_kernels.prefill_attention import prefill_attention
from tests import hf
from tests.model_files import read_tensors
from tests.tiny import picture
from tests.tiny_qwen import IMAGE_ID, PATCH, qwen_images, qwen_tokenizer
from vlcache_jax import Buckets, SnapKV, VLCache
from vlcache_jax.models.families import bind
from vlcache_jax.models.qwen_vl.layout import tile_places, tower_rows
from vlcache_jax.models.qwen_vl.packing import MARK, PAD
from vlcache_jax.running.stages import Stages

BOUND = 1e-4
PROMPTS = {
    "wide": ([(200, 30)], "<image>\nwhat is this?"),
    "tall": ([(20, 150)], f"look: {MARK}\nwhat is this?"),
    "square": ([(64, 64)], "<image>"),
    "one pixel": ([(1, 1)], "<image> why?"),
    "large": ([(300, 220)], "<image>\nname the colours"),
    "two": ([(90, 40), (33, 77)], f"first <image> and second {MARK} differ?"),
    "neighbours": ([(40, 40), (60, 24)], "<image><image> differ?"),
    "none": ([], "no picture at all, only words"),
}


def hf_inputs(images, prompt):
    """What transformers' processor makes of a raw prompt, without its half for videos."""
    data, text = {}, prompt.replace("<image>", MARK)
    if images:
        data = dict(qwen_images()(images=images, return_tensors="pt"))
        for _, height, width in data["image_grid_thw"].tolist():
            text = text.replace(PAD, "<pad>" * (height * width // 4), 1)
        text = text.replace("<pad>", PAD)
    ids = torch.tensor(qwen_tokenizer()(text)["input_ids"])[None]
    kinds = (ids == IMAGE_ID).int()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
    } | data


class Pair:
    """The same model twice: Hugging Face's and ours, loaded from its files; compiled once."""

    def __init__(self, family, folder):
        self.theirs = hf.qwen_model(family)
        self.path = hf.save(self.theirs, folder / "model", family)
        self.ours = vlcache_jax.load(self.path, buckets=Buckets(prompt=(256,), tiles=(0, 256)))
        self.ours.stop_ids = ()  # as Hugging Face's model: the tokenizer's own would be taken
        self.logits = jax.jit(Stages(self.ours.config).prompt_logits)
        self.vision = jax.jit(self._vision)

    def _vision(self, params, tiles, layout):
        def attend(*heads):
            return prefill_attention(*heads, causal=False)

        model = bind(self.ours.config)(params)
        # In groups that begin and end inside of windows; the rows are made of all patches at once.
        features = model.vision(tiles, layout, attend=attend, group=100)
        return model.visual_rows(tiles, layout, attend), jax.tree.leaves(features)[0]

    def inputs(self, name):
        sizes, prompt = PROMPTS[name]
        images = [picture(*size) for size in sizes]
        return self.ours.processor(images, prompt, raw_prompt=True), hf_inputs(images, prompt)


@pytest.fixture(scope="module", params=hf.QWEN)
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_and_positions(pair, name):
    inputs, theirs = pair.inputs(name)
    length = int(inputs.length[0])
    assert inputs.tokens[0, :length].tolist() == theirs["input_ids"][0].tolist()
    grids = theirs.get("image_grid_thw")
    positions, delta = pair.theirs.model.get_rope_index(
        theirs["input_ids"], theirs["mm_token_type_ids"], image_grid_thw=grids
    )
    assert np.array_equal(inputs.positions[:, 0, :length], positions[:, 0])
    assert inputs.next_position().tolist() == [length + int(delta)]
    assert not inputs.positions[:, 0, length:].any()


@pytest.mark.parametrize("name", [name for name in PROMPTS if name != "none"])
def test_features_and_visual_rows(pair, name):
    inputs, theirs = pair.inputs(name)
    with torch.no_grad():
        out = pair.theirs.model.visual(theirs["pixel_values"], theirs["image_grid_thw"])
    tables, features = pair.vision(pair.ours.params, inputs.tiles, inputs.layout)
    own = inputs.visual_index[inputs.visual_index >= 0]
    expected = [out.pooler_output, *getattr(out, "deepstack_features", ())]
    for table, rows in zip(tables, expected, strict=True):
        assert hf.relative_error(table[own], rows) < BOUND
    # Theirs are in the tower's order, as ours are.
    tower = features[: len(own)].reshape(-1, features.shape[-1])
    assert hf.relative_error(tower, out.last_hidden_state) < BOUND


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_of_every_position(pair, name):
    inputs, theirs = pair.inputs(name)
    hf.check_logits(pair, inputs, theirs, BOUND)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_same_greedy_tokens(pair, name):
    sizes, prompt = PROMPTS[name]
    images = [picture(*size) for size in sizes]
    hf.check_greedy(pair, hf_inputs(images, prompt), images, prompt)


@pytest.mark.parametrize("group", [None, 1])  # alone, a text stands beside tiles of padding only
def test_a_batch_of_unequal_prompts_equals_batch_one(group, pair):
    prompts = [PROMPTS[name] for name in ("tall", "none", "two", "one pixel")]
    images = [[picture(*size) for size in sizes] for sizes, _ in prompts]
    texts = [text for _, text in prompts]
    asked = {"max_new_tokens": 32, "raw_prompt": True, "cache": "vl-cache"}
    batch = pair.ours.generate(images, texts, **asked, prefill_batch=group)
    for row, (pictures, text) in enumerate(zip(images, texts, strict=True)):
        alone = pair.ours.generate(pictures, text, **asked)
        assert batch[row].tokens == alone.tokens
        assert batch[row].prompt_tokens == alone.prompt_tokens
        assert batch[row].cache.kept_bytes == alone.cache.kept_bytes


def test_padding_is_not_read(pair):
    inputs, _ = pair.inputs("two")
    count = np.count_nonzero(inputs.visual_index >= 0)
    tiles, layout = (np.array(x) for x in (inputs.tiles, inputs.layout))
    assert (layout[count:] == -1).all()
    clean = jax.tree.leaves(pair.vision(pair.ours.params, tiles, layout))
    tiles[count:] = np.nan
    for before, after in zip(
        clean, jax.tree.leaves(pair.vision(pair.ours.params, tiles, layout)), strict=True
    ):
        assert np.array_equal(before[:count], after[:count])
        assert np.isfinite(after).all()


def test_transformed_values_change_no_logits(pair):
    hf.check_transform(pair, pair.inputs("two")[0], BOUND)


def test_converted_and_loaded_by_transformers_again(pair, tmp_path):
    loaded = hf.check_conversion(pair, tmp_path)
    _, theirs = pair.inputs("two")
    with torch.no_grad():
        assert torch.equal(loaded(**theirs).logits, pair.theirs(**theirs).logits)


def old(config):
    """A config.json as the checkpoints of 2025 have it: of Qwen2.5-VL in one piece."""
    text = dict(config["text_config"])
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    tower = {k: v for k, v in config["vision_config"].items() if k != "rope_parameters"}
    tower["model_type"] = config["model_type"]
    if config["model_type"] == "qwen3_vl":
        return config | {"text_config": text | {"rope_scaling": rope}, "vision_config": tower}
    tower["in_chans"] = tower.pop("in_channels")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    rest = {k: v for k, v in config.items() if k != "text_config"}
    more = {"rope_scaling": scaling, "sliding_window": 64, "vision_config": tower}
    return {**text, **rest, **more}


SPELLINGS = ("model.visual.", "model.language_model."), ("visual.", "model.")
"""In front of a tower's tensors and of a decoder's."""


@pytest.mark.parametrize("family", hf.QWEN)
def test_tied_and_in_old_spellings(family, tmp_path):
    model = hf.qwen_model(family, tie_word_embeddings=True)
    path = hf.save(model, tmp_path / "model", family)
    sizes, prompt = PROMPTS["two"]
    images = [picture(*size) for size in sizes]
    theirs = hf_inputs(images, prompt)
    with torch.no_grad():
        expected = model(**theirs).logits[0].numpy()
    ours = vlcache_jax.load(path)
    assert "kernel" not in ours.params["head"]
    inputs = ours.processor(images, prompt, raw_prompt=True)
    logits = jax.jit(Stages(ours.config).prompt_logits)(ours.params, inputs)
    assert hf.relative_error(logits[0, : len(expected)], expected) < BOUND

    file = path / "config.json"
    file.write_text(json.dumps(old(json.loads(file.read_text()))))
    with torch.no_grad():  # the old spelling of config.json is transformers' too
        assert np.array_equal(type(model).from_pretrained(path)(**theirs).logits[0], expected)
    stored = read_tensors(path)
    for tower, decoder in SPELLINGS:
        spelled = {}
        for name, x in stored.items():
            name = re.sub(r"^model\.(language_model\.)?(?!visual)", decoder, name)
            spelled[re.sub(r"^(model\.)?visual\.", tower, name)] = x
        save_file(spelled, path / "model.safetensors", metadata={"format": "pt"})
        again = vlcache_jax.load(path)
        assert again.config == ours.config
        equal = jax.tree.map(lambda a, b: bool((a == b).all()), again.params, ours.params)
        assert jax.tree.all(equal)


def test_bfloat16_is_no_further_from_float32_than_hugging_face_is(pair):
    ours = vlcache_jax.load(pair.path, dtype="bfloat16")
    inputs, theirs = pair.inputs("two")
    with torch.no_grad():
        expected = pair.theirs(**theirs).logits[0].numpy()
        half = copy.deepcopy(pair.theirs).to(torch.bfloat16)
        hf_logits = half(**theirs).logits[0].float().numpy()
    logits = np.asarray(pair.logits(ours.params, inputs))
    error = hf.relative_error(logits[0, : len(expected)], expected)
    assert error < 1.25 * hf.relative_error(hf_logits, expected)


grids = st.tuples(st.integers(1, 20), st.integers(1, 20))


@given(grid=grids, side=st.integers(1, 5))
def test_windows_are_transformers(grid, side):
    size = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
    index, ends = get_vision_window_index(size, 2, 2 * side * PATCH, PATCH)
    window, row, column = tile_places(grid, side).T
    assert (row * grid[1] + column).tolist() == index.tolist()
    borders = np.flatnonzero(np.diff(window)) + 1
    assert [0, *(4 * borders), 4 * len(window)] == ends.tolist()
    assert (index.numpy()[tower_rows(grid, side)] == np.arange(len(index))).all()


@pytest.mark.parametrize("size", [(200, 30), (20, 150), (64, 64), (1, 1), (300, 220)])
def test_visual_tokens_show_equal_parts_of_a_picture(pair, size):
    width, height = size
    [found] = pair.ours.processor.patches([(height, width)])
    inputs = pair.ours.processor(picture(*size), "what?")
    assert len(found.rectangles) == (inputs.visual_index >= 0).sum()
    left, top, right, bottom = found.rectangles.T
    assert (left.min(), top.min()) == (0, 0)
    np.testing.assert_allclose((right.max(), bottom.max()), size)
    np.testing.assert_allclose(((right - left) * (bottom - top)).sum(), width * height)
    # Line by line, as the decoder's positions have them.
    at = inputs.positions[1:, 0, inputs.visual_index[0] >= 0]
    order = np.lexsort((left, top))
    assert np.array_equal(order, np.lexsort(at[::-1]))


@pytest.mark.full
def test_an_inspection_and_an_evaluation(pair, tmp_path):
    found = vlcache_jax.inspect(
        pair.ours, picture(90, 60), "what?", methods=[SnapKV("20tok"), VLCache(0.2)],
        max_new_tokens=3,
    )  # fmt: skip
    found.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000
    one = pair.ours.generate(picture(90, 60), "what?", cache=VLCache(0.2), max_new_tokens=5)
    both = pair.ours.generate(
        [picture(90, 60), None], ["what?", "why?"], cache=VLCache(0.2), max_new_tokens=5
    )
    assert both[0].tokens == one.tokens
