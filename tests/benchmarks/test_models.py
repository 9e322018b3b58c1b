"""The shapes of the published models, and prompts for them."""

from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.models import MODELS, abstract_inputs, with_places
from benchmarks.speed import cases
from benchmarks.speed.cases import Case
from tests.tiny import tiny_config
from tests.tiny_qwen import qwen_json
from vlcache_jax import Generate, VLCache
from vlcache_jax.models.families import abstract_params, read_config
from vlcache_jax.models.qwen_vl.layout import Span, prompt_positions, tile_places, tower_rows
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.results.report import count_parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-vl-3b", 3_754_622_976),
        ("qwen2.5-vl-7b", 8_292_166_656),
        ("qwen3-vl-8b", 8_767_123_696),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    assert count_parameters(MODELS[name])["total"] == parameters


CONFIGS: dict[str, Any] = {
    "llava_next": tiny_config("llava_next"),
    "llava_onevision": tiny_config("llava_onevision"),
    "qwen2_5_vl": read_config(qwen_json()),
    "qwen3_vl": read_config(qwen_json("qwen3_vl")),
}


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_prompts_are_of_the_shapes_that_are_compiled(family, images, monkeypatch):
    config = CONFIGS[family]
    monkeypatch.setattr(cases, "models", lambda: {"tiny": config})
    case = Case("tiny", 128, 2, images=images)
    made = case.inputs()
    shapes = abstract_inputs(config, 2, 128, None if images else 0)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    generate = Generate(config, VLCache(0.5), 3)
    params, key = abstract_params(config), jax.eval_shape(lambda: jax.random.key(0))
    out = jax.eval_shape(generate.__call__, params, shapes, key)
    assert out.tokens.shape == (2, 3)


def test_places_of_a_square_picture_are_the_packings():
    """36 tiles and 14 tokens of text in each of two prompts, of 64 rows; 40 tiles are there."""
    config, rows, own, grid = CONFIGS["qwen2_5_vl"], 64, 36, (6, 6)
    index = np.arange(rows)
    visual = np.broadcast_to(np.where(index < own, index, -1), (2, rows)).astype(np.int32)
    length = np.full((2,), 50, np.int32)
    tiles = np.zeros((2 * 40, 3, 8, 8), np.float32)
    given = ModelInputs(np.zeros((2, rows), np.int32), length, visual, tiles)
    made = with_places(config, given)
    side, layout = config.vision.window_side, made.layout
    assert layout is not None
    assert made.positions is not None
    for b, first in enumerate((0, own)):
        expected = prompt_positions(index[:50] < own, [Span(1, grid)])
        assert np.array_equal(made.positions[:, b, :50], expected)
        assert np.array_equal(made.visual_index[b, :own], first + tower_rows(grid, side))
        tile = layout[first : first + own]
        window, *places = tile_places(grid, side).T
        assert (tile[:, 0] == b).all()
        assert np.array_equal(tile[:, 1] - tile[0, 1], window)
        assert np.array_equal(tile[:, 2:], np.stack(places, axis=1))
    assert (layout[2 * own :] == -1).all()
    assert not made.positions[:, :, 50:].any()
    assert set(layout[:own, 1]).isdisjoint(layout[own : 2 * own, 1])
    assert made.next_position().tolist() == [6 + 14] * 2
