"""Which pixels of a picture each of its visual tokens shows; see `models.llava.patches`.

A token of a grid that was scaled down shows its share of the grid: the patches that it is made of
may reach a little further.
"""

from typing import Any

import numpy as np

from vlcache_jax.models.llava.anyres import grid_rows
from vlcache_jax.models.llava.patches import clipped, corners, single_view, tile_views, whole
from vlcache_jax.models.onevision.anyres import scaled_size
from vlcache_jax.models.onevision.config import OnevisionConfig
from vlcache_jax.requests.packing import BASE, GRID, NEWLINE_PART, Patches


def patch_rectangles(
    image_size: tuple[int, int], config: OnevisionConfig, image_processor: Any, *, alone: bool
) -> Patches:
    """Where the visual tokens of one picture lie in it.

    Args:
        image_size: (height, width) of the picture, in pixels.
        config: the model.
        image_processor: the checkpoint's `transformers` image processor, for its settings.
        alone: whether it is the only picture of its prompt.

    Raises:
        NotImplementedError: it resizes in a way other than to a short edge or to a fixed size.
        ValueError: the picture is too thin for the model.
    """
    base = np.arange(config.vision.num_patches)
    if alone:
        views, rows = tile_views(image_size, config, image_processor), grid_rows(image_size, config)
    else:  # a newline is all of the grid
        views, rows = [single_view(image_size, image_processor, pads=True)], base[:0].reshape(1, 0)
    lines, places = scaled_size(rows.shape, config)
    grid = _scaled(corners(views, rows.ravel(), config).reshape(*rows.shape, 2, 2), lines, places)
    ends = (0, 0), (0, 1)
    grid = np.pad(grid, (*ends, (0, 0), (0, 0))).reshape(-1, 2, 2)
    part = np.pad(np.full((lines, places), GRID), ends, constant_values=NEWLINE_PART).ravel()
    return clipped(
        np.concatenate([corners(views, base, config), grid]),
        np.concatenate([np.full(base.size, BASE), part]),
        image_size,
    )


def frame_rectangles(
    frame_size: tuple[int, int], config: OnevisionConfig, *, last: bool
) -> Patches:
    """Where the visual tokens of a video's frame lie in it; the last frame's end with a newline.

    Args:
        frame_size: (height, width) of the frame, in pixels, which are squashed to a square.
        config: the model.
        last: whether it is the video's last.
    """
    side, half = config.vision.grid, -(-config.vision.grid // 2)
    view = whole(frame_size).resized(np.full(2, config.vision.image_size))
    grid = corners([view], np.arange(side * side), config).reshape(side, side, 2, 2)
    places = np.pad(_scaled(grid, half, half).reshape(-1, 2, 2), ((0, last), (0, 0), (0, 0)))
    part = np.pad(np.full(half * half, BASE), (0, last), constant_values=NEWLINE_PART)
    return clipped(places, part, frame_size)


def _scaled(grid: np.ndarray, lines: int, places: int) -> np.ndarray:
    """The corners of a grid's patches [rows, columns, 2, 2], scaled to another number of them."""
    if (lines, places) == grid.shape[:2]:
        return grid
    down, across = _spans(grid[:, 0, :, 0], lines), _spans(grid[0, :, :, 1], places)
    return np.stack(np.broadcast_arrays(down[:, None], across[None]), axis=-1)


def _spans(spans: np.ndarray, wanted: int) -> np.ndarray:
    """Spans [n, 2] along an axis, scaled to another number of them that cover the same."""
    edge = len(spans) * np.arange(wanted + 1)  # in patches, times `wanted`
    size = spans[:, 1] - spans[:, 0]
    first, last = edge[:-1] // wanted, (edge[1:] - 1) // wanted
    return np.stack(
        [
            spans[first, 0] + (edge[:-1] / wanted - first) * size[first],
            spans[last, 0] + (edge[1:] / wanted - last) * size[last],
        ],
        axis=1,
    )
