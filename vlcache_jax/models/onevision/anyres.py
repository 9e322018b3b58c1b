"""Anyres of LLaVA-OneVision: a grid that is too large is scaled down before the decoder sees it.

A picture alone in its prompt becomes a base tile and a grid, as in LLaVA-NeXT. A grid of more
patches than `anyres_max` tiles have is scaled down by bilinear interpolation, so that each of its
visual tokens is a weighted sum of up to four patches. Pictures that share a prompt become a base
tile each, and one newline.

The frames of a video are tiles that are scaled to half their sides, and one newline ends them.

Source: LLaVA-OneVision (Li et al. 2024), section 3; the arithmetic, floats and rounding included,
is that of Hugging Face's `LlavaOnevisionModel.pack_image_features` and `apply_pooling`, and of
torch's `interpolate`.
"""

import math
from typing import NamedTuple

import numpy as np

from vlcache_jax.models.llava.anyres import grid_rows
from vlcache_jax.models.onevision.config import OnevisionConfig
from vlcache_jax.requests.packing import NEWLINE

SLACK = 1.1
"""How far a grid's sides may be above those that `anyres_max` allows before it is scaled down."""


class Axis(NamedTuple):
    """What each of n places of a scaled axis lies between.

    Attributes:
        first, second: two neighbours on the axis as it was, int [n].
        share: the second one's weight, float32 [n].
    """

    first: np.ndarray
    second: np.ndarray
    share: np.ndarray


def scaled_size(shape: tuple[int, ...], config: OnevisionConfig) -> tuple[int, int]:
    """Lines and columns of a grid of patches [rows, columns] after scaling.

    Raises:
        ValueError: nothing would be left of it.
    """
    rows, columns = shape
    ratio = math.sqrt(rows * columns / (config.anyres_max * config.vision.num_patches))
    if ratio <= SLACK:
        return rows, columns
    lines, places = int(rows // ratio), int(columns // ratio)
    if not lines * places:
        raise ValueError(
            f"an image whose grid has {rows} x {columns} patches is too thin to be scaled down to "
            f"anyres_max_{config.anyres_max}: crop it"
        )
    return lines, places


def between(count: int, wanted: int) -> Axis:
    """An axis of `count` places scaled to `wanted`, in torch's float32 (corners not aligned)."""
    scale = np.float32(count) / np.float32(max(wanted, 1))
    at = np.maximum(scale * (np.arange(wanted, dtype=np.float32) + 0.5) - 0.5, 0)
    first = np.floor(at)
    place = first.astype(np.int64)
    return Axis(place, np.minimum(place + 1, count - 1), at - first)


def visual_tokens(
    image_size: tuple[int, int], config: OnevisionConfig, *, alone: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What one image's visual tokens are, in the decoder's order.

    Args:
        image_size: (height, width) of the image, in pixels.
        config: the model.
        alone: whether it is the only image of its prompt.

    Returns:
        Rows of the visual table, int32 `[n, 4]`, as in `llava.anyres.visual_rows`, and their
        weights, float32 `[n, 4]`.
    """
    grid = grid_rows(image_size, config) if alone else np.zeros((1, 0), np.int32)
    near, shares = _scaled(grid, scaled_size(grid.shape, config))
    # Each line of the grid ends with a newline, in front of them is the base tile.
    end, base = ((0, 0), (0, 1), (0, 0)), np.arange(config.vision.num_patches, dtype=np.int32)
    rows = np.pad(near, end, constant_values=NEWLINE).reshape(-1, 4)
    weights = np.pad(shares, end, constant_values=0.25).reshape(-1, 4)
    rows = np.concatenate([np.repeat(base[:, None], 4, axis=1), rows])
    return rows, np.concatenate([np.full((base.size, 4), 0.25, np.float32), weights])


def frame_tokens(config: OnevisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """What the visual tokens of a video's frame are: its tile with half as many patches a side.

    Returns:
        Rows and weights `[n, 4]`, as of `visual_tokens`.
    """
    side = config.vision.grid
    grid = np.arange(config.vision.num_patches, dtype=np.int32).reshape(side, side)
    half = -(-side // 2)
    rows, weights = _scaled(grid, (half, half))
    return rows.reshape(-1, 4), weights.reshape(-1, 4)


def _scaled(grid: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A grid of rows, scaled: the rows that each of its places is made of, and their weights."""
    down, across = (between(*axis) for axis in zip(grid.shape, size, strict=True))
    near = [grid[np.ix_(row, column)] for row in down[:2] for column in across[:2]]
    shares = [
        np.outer(row, column)
        for row in (1 - down.share, down.share)
        for column in (1 - across.share, across.share)
    ]
    return np.stack(near, axis=2), np.stack(shares, axis=2)
