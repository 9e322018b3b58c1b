"""Where the tiles of a picture stand: for the tower in windows, for the decoder in rows.

Two frames of a video are one picture of it, a step: steps follow each other, for tower and decoder.

A tile is what becomes one visual token, 2 x 2 patches. The tower is given a picture's tiles window
by window, so that those of a window follow each other; the decoder sees them line by line:

```
 grid of 3 x 5 tiles,        the tower's order        windows
 windows of 2 x 2            0 1 5 6  2 3 7 8  4 9    0 0 0 0  1 1 1 1  2 2
  0  1 |  2  3 |  4          10 11  12 13  14         3 3  4 4  5
  5  6 |  7  8 |  9
 ------+-------+---
 10 11 | 12 13 | 14
```

All of it depends on the grid alone and is made here in numpy; what the device gets is an index.

Source: Qwen2.5-VL (Bai et al. 2025), section 2.1; for positions Qwen2-VL (Wang et al. 2024),
section 2.1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Grid = tuple[int, int]
"""Tiles down and across of a picture."""


class Span(NamedTuple):
    """Where the tokens of a picture or a video lie.

    Attributes:
        steps: pictures that follow each other in time, one of a picture.
        grid: tiles of each.
        interval: positions from one step to the next.
    """

    steps: int
    grid: Grid
    interval: float = 1.0


def tile_places(grid: Grid, side: int | None) -> np.ndarray:
    """Window, row and column of each tile of a picture, in the tower's order.

    Args:
        grid: tiles down and across.
        side: tiles along one side of a window; at the right and at the bottom they may be smaller.
            None for one window, the whole picture: then the tower's order is line by line too.

    Returns:
        int32 `[n, 3]`, windows counted from 0.
    """
    row, column = np.indices(grid, np.int32).reshape(2, -1)
    side = side or max(grid)
    window = row // side * -(-grid[1] // side) + column // side
    order = np.argsort(window, kind="stable")
    return np.stack([window, row, column], axis=1)[order]


def tower_rows(grid: Grid, side: int | None) -> np.ndarray:
    """Where each tile of a picture, line by line, stands in the tower's order, int32 `[n]`."""
    _, row, column = tile_places(grid, side).T
    return np.argsort(row * grid[1] + column).astype(np.int32)


def prompt_positions(is_visual: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Positions in time, down and across of a prompt's tokens.

    A token of text has three times the same, one more than what is in front of it. A picture stands
    at one point of time; its tokens count down and across from there, and what follows it goes on
    behind its longer side. So does what follows a video, however long it is.

    Args:
        is_visual: which tokens are a picture's or a video's, bool `[m]`.
        spans: of each of these.

    Returns:
        int32 `[3, m]`.
    """
    step, inside = np.where(is_visual, 0, 1), np.zeros((3, len(is_visual)), np.int32)
    places, first = np.flatnonzero(is_visual), 0
    for steps, grid, interval in spans:
        time, *tile = np.indices((steps, *grid), np.int32).reshape(3, -1)
        own = places[first : first + len(time)]
        # In float32, as transformers has it: whole numbers come of the rounded product.
        inside[:, own] = (time.astype(np.float32) * np.float32(interval)).astype(np.int32), *tile
        step[own[-1]] = max(grid)
        first += len(own)
    return (np.cumsum(step) - step + inside).astype(np.int32)
