"""The index table of visual tokens, against constructions that share none of its code."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution as hf_best_resolution

from tests.tiny import tiny_config
from vlcache_jax.models.llava.anyres import (
    NEWLINE,
    num_tiles,
    select_best_resolution,
    tile_grid,
    visual_rows,
)

USUAL = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
NEXT = tiny_config("llava_next", 336, 14, pinpoints=USUAL)
MODELS = (
    NEXT,
    tiny_config("llava_next"),
    tiny_config("llava_next", 42, 14, pinpoints=((42, 42), (126, 84), (84, 168), (42, 210))),
    tiny_config("llava_next", 50, 14),  # a patch size that does not divide the tile
)

sizes = st.tuples(st.integers(1, 2000), st.integers(1, 2000))


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((480, 640), 2340),
        ((336, 336), 1176),
        ((100, 1000), 1160),
        ((1000, 100), 1224),
        ((768, 512), 2160),
    ],
)
def test_published_token_counts_of_next(size, tokens):
    assert len(visual_rows(size, NEXT)) == tokens


def test_llava_15_is_one_tile_in_order():
    config = tiny_config("llava", 336, 14)
    for size in ((1, 1), (480, 640), (1, 2000)):
        assert visual_rows(size, config).tolist() == list(range(576))
        assert (tile_grid(size, config), num_tiles(size, config)) == ((0, 0), 1)
    assert config.max_tiles == 1


def test_the_drawing_in_the_module():
    config = tiny_config("llava_next", 42, 14, pinpoints=((42, 84),))
    rows = visual_rows((10, 60), config)
    assert rows.tolist() == [*range(9), 12, 13, 14, 21, 22, 23, NEWLINE]
    assert rows.dtype == np.int32


def extreme_sizes(test):
    """Thin images, and sizes whose product comes out as 14.999999999999998 or the like."""
    for size in ((1, 1), (1, 2000), (2000, 1), (55, 176), (352, 110), (748, 352), (47, 1128)):
        test = example(size=size, model=NEXT)(test)
    return test


@settings(deadline=None)
@given(size=sizes, model=st.sampled_from(MODELS))
@extreme_sizes
def test_best_resolution_is_hugging_faces(size, model):
    best = select_best_resolution(size, model.grid_pinpoints)
    assert best == hf_best_resolution(size, list(model.grid_pinpoints))


def _rows_of_a_drawing(size, config):
    """Write every patch's label on a canvas, patch by patch, and read the canvas line by line."""
    height, width = size
    side, patches = config.vision.grid, config.vision.num_patches
    best_height, best_width = hf_best_resolution(size, list(config.grid_pinpoints))
    down, across = best_height // config.vision.image_size, best_width // config.vision.image_size
    canvas = [[0] * (across * side) for _ in range(down * side)]
    label = patches
    for i in range(down):
        for j in range(across):
            for r in range(side):
                for c in range(side):
                    canvas[i * side + r][j * side + c] = label
                    label += 1
    rows, columns = len(canvas), len(canvas[0])
    # Whole-number arithmetic: the share of the canvas that the image covers, rounded down.
    top = left = 0
    if width * rows > columns * height:
        top = (rows - height * columns // width) // 2
    else:
        left = (columns - width * rows // height) // 2
    tokens = list(range(patches))
    for line in canvas[top : rows - top]:
        tokens += [*line[left : columns - left], NEWLINE]
    return tokens, label // patches


@settings(deadline=None)
@given(size=sizes, model=st.sampled_from(MODELS))
@extreme_sizes
def test_rows_are_those_of_a_drawing(size, model):
    tokens, tiles = _rows_of_a_drawing(size, model)
    assert visual_rows(size, model).tolist() == tokens
    assert num_tiles(size, model) == tiles <= model.max_tiles


@settings(deadline=None)
@given(size=sizes, model=st.sampled_from(MODELS))
@extreme_sizes
def test_rows_are_what_hugging_face_packs(size, model):
    torch = pytest.importorskip("torch")
    from transformers.models.llava_next import modeling_llava_next as hf

    pinpoints = [list(p) for p in model.grid_pinpoints]
    tiles = hf.image_size_to_num_patches(list(size), pinpoints, model.vision.image_size)
    assert num_tiles(size, model) == tiles
    # A feature is its own row number, so that what is packed can be read off.
    features = torch.arange(tiles * model.vision.num_patches, dtype=torch.float64)
    hf_model = SimpleNamespace(
        config=SimpleNamespace(vision_config=model.vision, image_grid_pinpoints=pinpoints)
    )
    (packed,), _ = hf.LlavaNextModel.pack_image_features(
        hf_model,  # pyright: ignore[reportArgumentType]
        [features.reshape(tiles, -1, 1)],
        [list(size)],
        vision_feature_select_strategy="default",
        image_newline=torch.tensor([float(NEWLINE)], dtype=torch.float64),
    )
    assert visual_rows(size, model).tolist() == packed[:, 0].tolist()
