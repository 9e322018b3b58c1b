"""Which pixels of a picture each of its visual tokens shows; see `models.llava.patches`.

A token of a grid that was scaled down shows its share of the grid: the patches that it is made of
may reach a little further.
"""

from typing import Any

import numpy as np

from vlcache_jax.models.llava.anyres import grid_rows
from vlcache_jax.models.llava.patches import clipped, corners, single_view, tile_views
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
    grid = corners(views, rows.ravel(), config).reshape(*rows.shape, 2, 2)
    if (lines, places) != rows.shape:
        down, across = _scaled(grid[:, 0, :, 0], lines), _scaled(grid[0, :, :, 1], places)
        whole = np.broadcast_arrays(down[:, None], across[None])
        grid = np.stack(whole, axis=-1)
    ends = (0, 0), (0, 1)
    grid = np.pad(grid, (*ends, (0, 0), (0, 0))).reshape(-1, 2, 2)
    part = np.pad(np.full((lines, places), GRID), ends, constant_values=NEWLINE_PART).ravel()
    return clipped(
        np.concatenate([corners(views, base, config), grid]),
        np.concatenate([np.full(base.size, BASE), part]),
        image_size,
    )


def _scaled(spans: np.ndarray, wanted: int) -> np.ndarray:
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
