"""Where visual tokens lie in a picture, against the pixels that the processors make of it."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.tiny import IMAGE_SIZE, PATCH_SIZE, tiny_config, tiny_processor
from vlcache_jax.models.llava.anyres import visual_rows
from vlcache_jax.models.llava.patches import patch_rectangles
from vlcache_jax.requests.packing import BASE, GRID, NEWLINE, NEWLINE_PART
from vlcache_jax.requests.processing import Processor
from vlcache_jax.results.inspection import locate

sides = st.integers(1, 300)
sizes = st.tuples(sides, sides)


def padding_processor():
    """LLaVA-1.5's processor as it is set for padding instead of cropping."""
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    hf = tiny_processor("llava")
    hf.image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=crop, do_pad=True
    )
    return hf


def unmixed(hf):
    """A processor that resizes without mixing colours: each of its pixels is one of the picture."""
    hf.image_processor.resample = Image.Resampling.NEAREST
    return hf


HF = {
    "llava": unmixed(tiny_processor("llava")),
    "padded": unmixed(padding_processor()),
    "llava_next": unmixed(tiny_processor("llava_next")),
    "llava_onevision": unmixed(tiny_processor("llava_onevision")),
}
CONFIGS = {
    "llava": tiny_config("llava"),
    "padded": tiny_config("llava"),
    "llava_next": tiny_config("llava_next"),
    "llava_onevision": tiny_config("llava_onevision", anyres_max=9999),  # no grid is scaled
}
PROCESSORS = {name: Processor(CONFIGS[name], hf) for name, hf in HF.items()}
kinds = st.sampled_from(list(HF))


def coordinates(height: int, width: int) -> Image.Image:
    """A picture whose colours tell where a pixel is, and by a blue of 1 to 4 that it is one."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x % 256, y % 256, 1 + x // 256 + 2 * (y // 256)], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def patches_of_tokens(inputs, image_processor):
    """For each visual token of a prompt its patch's colours, or None: a newline."""
    grid, count = IMAGE_SIZE // PATCH_SIZE, (IMAGE_SIZE // PATCH_SIZE) ** 2
    mean, std = (
        np.array(value)[:, None, None]
        for value in (image_processor.image_mean, image_processor.image_std)
    )
    for index in inputs.visual_index[0]:
        tile, patch = divmod(int(index), count)
        if tile == len(inputs.tiles):
            yield None
        elif index >= 0:
            top, left = (PATCH_SIZE * place for place in divmod(patch, grid))
            pixels = inputs.tiles[tile][:, top : top + PATCH_SIZE, left : left + PATCH_SIZE]
            yield np.rint(255 * (pixels * std + mean)).astype(int)


def check(kind, colours, rectangle, height, width):
    """A patch's colours are those of its rectangle."""
    if colours is None:
        assert np.isnan(rectangle).all()
        return
    red, green, blue = colours
    inside = (blue > 0) & (blue < 5)
    left, top, right, bottom = rectangle
    assert 0 <= left <= right <= width
    assert 0 <= top <= bottom <= height
    # The most of the picture that a pixel of the tile may show; the grid's show less.
    pads = kind in ("padded", "llava_onevision")
    shown = [max(width, height)] * 2 if pads else [width, height]
    steps = np.maximum(np.array(shown) / IMAGE_SIZE, 1)
    if not inside.any():  # padding alone, or a strip of the picture between two pixels' middles
        assert (np.array([right - left, bottom - top]) <= steps).any()
        return
    x, y = red + 256 * ((blue - 1) % 2) + 0.5, green + 256 * ((blue - 1) // 2) + 0.5
    for low, high, middles, step in zip(
        (left, top), (right, bottom), (x[inside], y[inside]), steps, strict=True
    ):
        assert abs(middles.min() - low) < step + 0.51
        assert abs(middles.max() - high) < step + 0.51
        assert abs(middles.mean() - (low + high) / 2) < step / 2 + 0.51


@settings(deadline=None, max_examples=40)
@given(kind=kinds, shapes=st.lists(sizes, min_size=1, max_size=3))
@example(kind="llava_next", shapes=[(1, 1), (300, 20), (20, 300)])
@example(kind="llava", shapes=[(56, 56), (280, 70), (70, 280)])
@example(kind="padded", shapes=[(56, 56), (280, 70), (70, 280)])
@example(kind="llava_onevision", shapes=[(56, 56), (280, 70), (70, 280)])
@example(kind="llava_onevision", shapes=[(250, 299)])
def test_rectangles_hold_what_the_processor_shows(kind, shapes):
    processor = PROCESSORS[kind]
    pictures = [coordinates(*shape) for shape in shapes]
    inputs = processor(pictures, "a <image>" * len(shapes) + " what?")
    visual = inputs.visual_index[0, : inputs.length[0]] >= 0
    tokens = inputs.tokens[0, : inputs.length[0]]
    located = locate(processor, pictures, (), tokens, visual)
    places = np.concatenate([picture.positions for picture in located])
    assert places.tolist() == np.flatnonzero(visual).tolist()
    colours = patches_of_tokens(inputs, HF[kind].image_processor)
    for picture, (height, width) in zip(located, shapes, strict=True):
        assert picture.image.size == (width, height)
        for rectangle in picture.rectangles:
            check(kind, next(colours), rectangle, height, width)
    assert next(colours, "no more") == "no more"


def drawn(image_size, config):
    """Rectangles and parts of a LLaVA-NeXT picture, by slices of arrays of pixels' edges."""
    (height, width), tile, patch = image_size, config.vision.image_size, config.vision.patch_size
    best_height, best_width = select_best_resolution((height, width), config.grid_pinpoints)
    scale = min(best_height / height, best_width / width)
    if best_width / width < best_height / height:
        size = min(math.ceil(height * scale), best_height), best_width
    else:
        size = best_height, min(math.ceil(width * scale), best_width)

    def pixels(rows, columns, high, wide):
        """(left, top, right, bottom) of each pixel, [high, wide, 4]; NaN around the picture."""
        y, x = np.mgrid[:rows, :columns]
        found = np.stack([x / columns, y / rows, (x + 1) / columns, (y + 1) / rows], axis=2)
        found = found * np.array([width, height, width, height])
        canvas = np.full((high, wide, 4), np.nan)
        top, left = (high - rows) // 2, (wide - columns) // 2
        canvas[top : top + rows, left : left + columns] = found
        return canvas

    def patches(canvas):
        for top in range(0, tile - patch + 1, patch):
            for left in range(0, tile - patch + 1, patch):
                block = canvas[top : top + patch, left : left + patch].reshape(-1, 4)
                seen = block[~np.isnan(block[:, 0])]
                if len(seen):
                    yield (*seen[:, :2].min(axis=0), *seen[:, 2:].max(axis=0))
                else:
                    yield None

    table = [*patches(pixels(tile, tile, tile, tile))]
    grid = pixels(*size, best_height, best_width)
    for top in range(0, best_height, tile):
        for left in range(0, best_width, tile):
            table += patches(grid[top : top + tile, left : left + tile])
    return table


NEXT = (
    tiny_config("llava_next", 336, 14),
    tiny_config("llava_next"),
    tiny_config("llava_next", 42, 14, pinpoints=((42, 42), (126, 84), (84, 168), (42, 210))),
)


@settings(deadline=None, max_examples=25)
@given(size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)), which=st.integers(0, 2))
@example(size=(1, 1), which=0)
@example(size=(640, 480), which=0)
@example(size=(480, 640), which=0)
@example(size=(1, 2000), which=2)
@example(size=(2000, 1), which=2)
def test_each_token_of_the_grid_lands_on_its_rectangle(size, which):
    config = NEXT[which]
    side = config.vision.image_size
    processor = tiny_processor("llava_next", side, config.vision.patch_size)
    found = patch_rectangles(size, config, processor.image_processor)
    rows, table = visual_rows(size, config), drawn(size, config)
    assert len(found.rectangles) == len(found.part) == len(rows)
    assert found.part.dtype == np.int8
    for row, rectangle, part in zip(rows, found.rectangles, found.part, strict=True):
        if row == NEWLINE:
            assert part == NEWLINE_PART
            assert np.isnan(rectangle).all()
            continue
        assert part == (BASE if row < config.vision.num_patches else GRID)
        if table[row] is None:
            left, top, right, bottom = rectangle
            assert (right - left) * (bottom - top) == 0
        else:
            assert rectangle == pytest.approx(table[row], abs=1e-6)


def test_the_tokens_of_a_picture_by_hand():
    """Tiles of 28, patches of 14; a picture of 20 x 40 in a grid of 28 x 56 is not padded."""
    config = tiny_config("llava_next", 28, 14, pinpoints=((28, 56),))
    processor = tiny_processor("llava_next", 28, 14).image_processor
    found = patch_rectangles((20, 40), config, processor)
    assert found.part.tolist() == [0] * 4 + [1, 1, 1, 1, 2] * 2
    base = [[0, 0, 20, 10], [20, 0, 40, 10], [0, 10, 20, 20], [20, 10, 40, 20]]
    assert found.rectangles[:4].tolist() == base
    lines = [[[left, top, left + 10, top + 10] for left in (0, 10, 20, 30)] for top in (0, 10)]
    assert found.rectangles[4:8].tolist() == lines[0]
    assert found.rectangles[9:13].tolist() == lines[1]
    # One of 14 x 56: padded by 7 above and below, so that a line of patches shows half of them.
    found = patch_rectangles((14, 56), config, processor)
    assert found.rectangles[4].tolist() == [0, 0, 14, 7]
    assert found.rectangles[9].tolist() == [0, 7, 14, 14]


def test_the_middle_of_a_picture_for_llava_15():
    config, hf = CONFIGS["llava"], HF["llava"].image_processor
    found = patch_rectangles((56, 112), config, hf)
    assert found.rectangles[0].tolist() == [28, 0, 42, 14]
    assert found.rectangles[-1].tolist() == [70, 42, 84, 56]
    padded = patch_rectangles((56, 112), config, HF["padded"].image_processor)
    assert padded.rectangles[0].tolist() == [0, 0, 28, 0]  # padding alone
    assert padded.rectangles[4].tolist() == [0, 0, 28, 28]
    assert set(padded.part) == {BASE}


def test_a_processor_that_resizes_to_a_fixed_size():
    hf = tiny_processor("llava").image_processor
    hf.size = type(hf.size)(height=112, width=56)
    found = patch_rectangles((200, 100), CONFIGS["llava"], hf)
    step = 200 / 112
    assert found.rectangles[0] == pytest.approx([0, 28 * step, 25, 42 * step])
    hf.size = type(hf.size)(shortest_edge=56, longest_edge=90)
    with pytest.raises(NotImplementedError, match="longest_edge=90"):
        patch_rectangles((200, 100), CONFIGS["llava"], hf)
