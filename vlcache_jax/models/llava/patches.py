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

from vlcache_jax.models.llava.anyres import select_best_resolution, visual_rows
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.requests.packing import BASE, GRID, NEWLINE, NEWLINE_PART, Patches


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
    views, rows = tile_views(image_size, config, image_processor), visual_rows(image_size, config)
    newline = rows == NEWLINE
    rows = np.where(newline, 0, rows)
    part = np.where(rows < config.vision.num_patches, BASE, GRID)
    return clipped(corners(views, rows, config), np.where(newline, NEWLINE_PART, part), image_size)


def corners(views: list[View], rows: np.ndarray, config: LlavaConfig) -> np.ndarray:
    """Where patches of tiles lie, those that reach into padding included.

    Args:
        views: what each tile shows of the picture.
        rows: the patches' rows of the visual table, as `anyres.visual_rows` numbers them, int [n].
        config: the model.

    Returns:
        (top, left) and (bottom, right) of each in pixels of the picture, float64 [n, 2, 2].
    """
    patch, across = config.vision.patch_size, config.vision.grid
    tile, place = np.divmod(rows, config.vision.num_patches)
    _, corner, step = (np.array(each)[tile] for each in zip(*views, strict=True))
    first = corner + patch * step * np.stack(np.divmod(place, across), axis=1)
    return np.stack([first, first + patch * step], axis=1)


def clipped(corners: np.ndarray, part: np.ndarray, image_size: tuple[int, int]) -> Patches:
    """The patches of a picture from their `corners` [n, 2, 2] and parts [n]."""
    rectangles = np.clip(corners, 0, image_size)[:, :, ::-1].reshape(-1, 4)  # (y, x) to (x, y)
    rectangles[part == NEWLINE_PART] = np.nan
    return Patches(rectangles, part.astype(np.int8))


def tile_views(
    image_size: tuple[int, int], config: LlavaConfig, image_processor: Any
) -> list[View]:
    """What each tile of a picture shows of it, the base tile first.

    The steps are those of transformers' `LlavaNextImageProcessorPil` and of its
    `CLIPImageProcessorPil` or `LlavaImageProcessorPil`, with the floats and the rounding of its
    `get_patch_output_size` and `get_resize_output_image_size`.
    """
    if config.family == "llava":
        # CLIP's own processor has the setting too, and pads nothing that was cropped.
        pads = image_processor.do_pad and hasattr(image_processor, "pad_to_square")
        return [single_view(image_size, image_processor, pads=pads)]
    size, view = np.array(image_size), whole(image_size)
    base, side = image_processor.size, config.vision.image_size
    base = np.array([base.height or base.shortest_edge, base.width or base.shortest_edge])
    best = np.array(select_best_resolution(image_size, config.grid_pinpoints))
    fitted = np.minimum(np.ceil(size * min(best / size)), best)  # with its aspect kept
    grid = view.resized(fitted).padded(best)
    places = side * np.array(list(np.ndindex(*best // side)))
    tiles = [view.resized(base), *(grid.cut(first, np.full(2, side)) for first in places)]
    return [_finished(tile, image_processor) for tile in tiles]


def single_view(image_size: tuple[int, int], image_processor: Any, *, pads: bool) -> View:
    """What the one tile of a picture shows of it, which may be padded to a square first."""
    view = whole(image_size)
    if pads:
        view = view.padded(np.full(2, max(image_size)))
    return _finished(view, image_processor)


def whole(image_size: tuple[int, int]) -> View:
    """A picture of (height, width) pixels as it is."""
    return View(np.array(image_size), np.zeros(2), np.ones(2))


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
