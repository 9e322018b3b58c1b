"""Which pixels of a picture each of its visual tokens shows.

The processors resize, pad, crop and cut a picture until it is tiles of one size, and the vision
tower cuts each tile into patches. Every step is a change of coordinates, the same arithmetic as in
Hugging Face's processors, roundings included: it is followed here without a pixel being touched.

```
 LLaVA-1.5    resize the short edge, crop the middle          or  pad to a square, resize
 LLaVA-NeXT   base tile: squash the whole picture to a square
              grid: resize, keeping the aspect, pad to the grid's resolution, cut into tiles
```
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlcache_jax.anyres import NEWLINE, select_best_resolution, visual_rows
from vlcache_jax.config import LlavaConfig

BASE, GRID, NEWLINE_PART = 0, 1, 2
"""Parts of a picture's visual tokens: its base tile, the tiles of its grid, ends of lines."""


class Patches(NamedTuple):
    """Where the n visual tokens of one picture lie, in the decoder's order.

    Attributes:
        rectangles: (left, top, right, bottom) in pixels of the picture, clipped to it, float64
            [n, 4]. NaN for a newline; of no area where a patch shows padding alone.
        part: `BASE`, `GRID` or `NEWLINE_PART`, int8 [n].
    """

    rectangles: np.ndarray
    part: np.ndarray


@dataclass(frozen=True)
class View:
    """A picture after some steps of a processor: what of the original it shows.

    Attributes:
        size: its (height, width), in its own pixels.
        corner: (top, left) of its first pixel, in pixels of the original; negative in padding.
        step: pixels of the original that one of its own covers, (down, across).
    """

    size: tuple[int, int]
    corner: tuple[float, float] = (0.0, 0.0)
    step: tuple[float, float] = (1.0, 1.0)

    def resized(self, height: int, width: int) -> "View":
        """All of it in another number of pixels."""
        down, across = self.step
        step = down * self.size[0] / height, across * self.size[1] / width
        return View((height, width), self.corner, step)

    def cut(self, top: int, left: int, height: int, width: int) -> "View":
        """A part of it; what lies outside is padding."""
        corner = self.corner[0] + top * self.step[0], self.corner[1] + left * self.step[1]
        return View((height, width), corner, self.step)

    def centred(self, height: int, width: int) -> "View":
        """Its middle, or all of it with padding around; an odd pixel is left at the end."""
        return self.cut((self.size[0] - height) // 2, (self.size[1] - width) // 2, height, width)

    def padded(self, height: int, width: int) -> "View":
        """All of it in the middle of a larger picture; an odd pixel of padding is at the end."""
        return self.cut(
            -((height - self.size[0]) // 2), -((width - self.size[1]) // 2), height, width
        )


def patch_rectangles(
    image_size: tuple[int, int], config: LlavaConfig, image_processor: Any
) -> Patches:
    """Where the visual tokens of one picture lie in it.

    Args:
        image_size: (height, width) of the picture, in pixels.
        config: the model.
        image_processor: the checkpoint's `transformers` image processor, for its settings.

    Raises:
        NotImplementedError: it resizes in a way other than to a short edge or to a fixed size.
    """
    rows = visual_rows(image_size, config)
    patch, across = config.vision.patch_size, config.vision.grid
    newline = rows == NEWLINE
    tile, place = np.divmod(np.where(newline, 0, rows), config.vision.num_patches)
    views = tile_views(image_size, config, image_processor)
    corner, step = (
        np.array([getattr(v, name) for v in views])[tile] for name in ("corner", "step")
    )
    first = corner + patch * step * np.stack(np.divmod(place, across), axis=1)
    corners = np.stack([first, first + patch * step], axis=1)
    corners = np.clip(corners, 0, np.array(image_size, np.float64))
    rectangles = corners[:, :, ::-1].reshape(-1, 4)  # (y, x) twice, and the result is (x, y) twice
    rectangles[newline] = np.nan
    part = np.where(tile == 0, BASE, GRID)
    return Patches(rectangles, np.where(newline, NEWLINE_PART, part).astype(np.int8))


def tile_views(
    image_size: tuple[int, int], config: LlavaConfig, image_processor: Any
) -> list[View]:
    """What each tile of a picture shows of it, the base tile first.

    The arguments are those of `patch_rectangles`. The steps are those of transformers'
    `LlavaNextImageProcessorPil` and of its `CLIPImageProcessorPil` or `LlavaImageProcessorPil`.
    """
    whole, size = View(image_size), image_processor.size
    if config.family == "llava":
        # CLIP's own processor has the setting too, and pads nothing that was cropped.
        if image_processor.do_pad and hasattr(image_processor, "pad_to_square"):
            whole = whole.padded(max(image_size), max(image_size))
        return [_finished(whole, image_processor)]
    base = whole.resized(size.height or size.shortest_edge, size.width or size.shortest_edge)
    best = select_best_resolution(image_size, config.grid_pinpoints)
    grid = whole.resized(*_fitted(image_size, best)).padded(*best)
    side = config.vision.image_size
    tiles = [
        grid.cut(top, left, side, side)
        for top in range(0, best[0], side)
        for left in range(0, best[1], side)
    ]
    return [_finished(view, image_processor) for view in (base, *tiles)]


def _fitted(image_size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The size in which a picture fits into another with its aspect kept.

    Source: transformers' `get_patch_output_size`, floats and their rounding included.
    """
    (height, width), (most_height, most_width) = image_size, target
    across, down = most_width / width, most_height / height
    if across < down:
        return min(math.ceil(height * across), most_height), most_width
    return most_height, min(math.ceil(width * down), most_width)


def _finished(view: View, image_processor: Any) -> View:
    """A tile after the steps that every tile is put through."""
    size, crop = image_processor.size, image_processor.crop_size
    if image_processor.do_resize:
        view = view.resized(*_resized(view.size, size))
    return view.centred(crop.height, crop.width) if image_processor.do_center_crop else view


def _resized(image_size: tuple[int, int], size: Any) -> tuple[int, int]:
    """The (height, width) that a picture is resized to.

    Source: transformers' `PilBackend.resize` and `get_resize_output_image_size`.
    """
    if size.height and size.width:
        return size.height, size.width
    if not size.shortest_edge or size.longest_edge:
        raise NotImplementedError(
            f"an image processor whose size is {size}: only shortest_edge, or height and width"
        )
    height, width = image_size
    short, long = sorted(image_size)
    new_short, new_long = size.shortest_edge, int(size.shortest_edge * long / short)
    return (new_long, new_short) if width <= height else (new_short, new_long)
