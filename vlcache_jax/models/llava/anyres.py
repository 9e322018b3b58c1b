"""Anyres: which tiles an image is cut into, and which of their patches become visual tokens.

LLaVA-NeXT shows the vision tower one downscaled view of the whole image (the base tile) and a grid
of full-resolution tiles. The image is scaled to fit the grid and centred in it, so some patches of
the grid hold nothing but padding. The decoder sees the base tile's patches, then the grid's rows of
patches without the padding, each row ended by a learned newline:

```
 grid of 1 x 2 tiles,            . padding        visual tokens
 3 x 3 patches each              # image
 . . . | . . .                                    base 0..8,
 # # # | # # #    rows of the visual table        12 13 14 21 22 23 newline
 . . . | . . .    9..17 | 18..26
```

All of it depends on the image's size alone, so it is an index table made here in numpy, and one
gather on the device. LLaVA-1.5 is the case of one tile and no newline.

Source: LLaVA-NeXT (Liu et al., January 2024); the arithmetic, floats and rounding included, is that
of Hugging Face's `LlavaNextModel.pack_image_features`.
"""

import numpy as np

from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.requests.packing import NEWLINE


def select_best_resolution(
    image_size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """Choose the resolution that keeps most of an image and wastes least.

    Args:
        image_size: (height, width) of the image, in pixels.
        pinpoints: (height, width) of the resolutions to choose from, in pixels.

    Returns:
        The (height, width) in which the scaled image has most pixels (enlarging adds none); of
        equals the one of the smallest area, then the first.
    """
    image_height, image_width = image_size

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        height, width = resolution
        scale = min(width / image_width, height / image_height)
        kept = int(image_width * scale) * int(image_height * scale)
        return min(kept, image_width * image_height), -height * width

    return max(pinpoints, key=merit)


def tile_grid(image_size: tuple[int, int], config: LlavaConfig) -> tuple[int, int]:
    """Tiles down and across of one image's grid, (height, width); (0, 0) for LLaVA-1.5."""
    if config.family == "llava":
        return 0, 0
    height, width = select_best_resolution(image_size, config.grid_pinpoints)
    return height // config.vision.image_size, width // config.vision.image_size


def num_tiles(image_size: tuple[int, int], config: LlavaConfig) -> int:
    """Tiles that an image of (height, width) pixels becomes, the base tile included."""
    height, width = tile_grid(image_size, config)
    return 1 + height * width


def visual_rows(image_size: tuple[int, int], config: LlavaConfig) -> np.ndarray:
    """Rows of the visual table that one image's visual tokens are, in the decoder's order.

    Args:
        image_size: (height, width) of the image, in pixels.
        config: the model.

    Returns:
        int32 `[n]`: tile * P + patch, tiles counted from the image's first, or `NEWLINE`.
    """
    base = np.arange(config.vision.num_patches, dtype=np.int32)
    if config.family == "llava":
        return base
    lines = np.pad(grid_rows(image_size, config), ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([base, lines.ravel()])


def grid_rows(image_size: tuple[int, int], config: LlavaConfig) -> np.ndarray:
    """Rows of the visual table that the patches of an image's grid are, without its padding.

    Args:
        image_size: (height, width) of the image, in pixels.
        config: the model.

    Returns:
        int32 `[rows, columns]` of the grid's patches, numbered as in `visual_rows`.
    """
    patches, side = config.vision.num_patches, config.vision.grid
    down, across = tile_grid(image_size, config)
    grid = np.arange(patches, (1 + down * across) * patches, dtype=np.int32)
    grid = grid.reshape(down, across, side, side).transpose(0, 2, 1, 3)
    return _unpad(grid.reshape(down * side, across * side), image_size)


def _unpad(grid: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Cut away the rows or columns of patches that hold no part of the centred image."""
    height, width = image_size
    rows, columns = grid.shape
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[cut : rows - cut]
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, cut : columns - cut]
