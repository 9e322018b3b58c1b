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

from typing import Any, NamedTuple

import numpy as np

from vlcache_jax.models.llava.anyres import NEWLINE, select_best_resolution, visual_rows
from vlcache_jax.models.llava.config import LlavaConfig

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


class View(NamedTuple):
    """A picture after some steps of a processor: what of the original it shows.

    Attributes:
        size: its (height, width), in its own pixels, [2].
        corner: (top, left) of its first pixel, in pixels of the original, float64 [2]; negative in
            padding.
        step: pixels of the original that one of its own covers, (down, across), float64 [2].
    """

    size: np.ndarray
    corner: np.ndarray
    step: np.ndarray

    def resized(self, size: np.ndarray) -> "View":
        """All of it in another number of pixels."""
        return View(size, self.corner, self.step * self.size / size)

    def cut(self, first: np.ndarray, size: np.ndarray) -> "View":
        """A part of it from a pixel (top, left) on; what lies outside is padding."""
        return View(size, self.corner + first * self.step, self.step)

    def padded(self, size: np.ndarray) -> "View":
        """All of it in the middle of a larger picture; an odd pixel of padding is at the end."""
        return self.cut(-((size - self.size) // 2), size)


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
    views = _tile_views(image_size, config, image_processor)
    _, corner, step = (np.array(each)[tile] for each in zip(*views, strict=True))
    first = corner + patch * step * np.stack(np.divmod(place, across), axis=1)
    corners = np.clip(np.stack([first, first + patch * step], axis=1), 0, image_size)
    rectangles = corners[:, :, ::-1].reshape(-1, 4)  # (y, x) twice, and the result is (x, y) twice
    rectangles[newline] = np.nan
    part = np.where(tile == 0, BASE, GRID)
    return Patches(rectangles, np.where(newline, NEWLINE_PART, part).astype(np.int8))


def _tile_views(
    image_size: tuple[int, int], config: LlavaConfig, image_processor: Any
) -> list[View]:
    """What each tile of a picture shows of it, the base tile first.

    The steps are those of transformers' `LlavaNextImageProcessorPil` and of its
    `CLIPImageProcessorPil` or `LlavaImageProcessorPil`, with the floats and the rounding of its
    `get_patch_output_size` and `get_resize_output_image_size`.
    """
    size = np.array(image_size)
    whole = View(size, np.zeros(2), np.ones(2))
    if config.family == "llava":
        # CLIP's own processor has the setting too, and pads nothing that was cropped.
        if image_processor.do_pad and hasattr(image_processor, "pad_to_square"):
            whole = whole.padded(np.full(2, max(image_size)))
        return [_finished(whole, image_processor)]
    base, side = image_processor.size, config.vision.image_size
    base = np.array([base.height or base.shortest_edge, base.width or base.shortest_edge])
    best = np.array(select_best_resolution(image_size, config.grid_pinpoints))
    fitted = np.minimum(np.ceil(size * min(best / size)), best)  # with its aspect kept
    grid = whole.resized(fitted).padded(best)
    places = side * np.array(list(np.ndindex(*best // side)))
    tiles = [whole.resized(base), *(grid.cut(first, np.full(2, side)) for first in places)]
    return [_finished(tile, image_processor) for tile in tiles]


def _finished(view: View, image_processor: Any) -> View:
    """A tile after the steps that every tile is put through."""
    size, crop = image_processor.size, image_processor.crop_size
    if image_processor.do_resize:
        if size.height and size.width:
            view = view.resized(np.array([size.height, size.width]))
        elif size.shortest_edge and not size.longest_edge:
            view = view.resized(size.shortest_edge * view.size // min(view.size))
        else:
            raise NotImplementedError(
                f"an image processor whose size is {size}: only shortest_edge, or height and width"
            )
    if image_processor.do_center_crop:
        crop = np.array([crop.height, crop.width])
        view = view.cut((view.size - crop) // 2, crop)  # an odd pixel is left at the end
    return view
