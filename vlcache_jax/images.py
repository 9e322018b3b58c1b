"""Pictures: what is taken for one, and how it is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray
"""A picture: a local file, a PIL image, or a uint8 array `[height, width, 3]`."""

Images: TypeAlias = ImageLike | Sequence[ImageLike] | None
"""The pictures of one prompt."""


def load_image(source: ImageLike) -> Image.Image:
    """Open an image as 8-bit RGB, upright, as `transformers.image_utils.load_image` does.

    The EXIF orientation is applied, then Pillow converts to RGB (transparency is dropped, 16-bit
    values are clipped).

    Args:
        source: a local file's path, a PIL image, or a uint8 array [height, width, 3].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, is damaged or empty, or is larger than Pillow's limit
            against decompression bombs.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ValueError(
                f"an image array must be uint8 of shape (height, width, 3), not {source.dtype} "
                f"of shape {source.shape}"
            )
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _decode(source, name_of(source))
    if not isinstance(source, str | Path):
        raise ValueError(
            f"{source!r} is not an image: give a path, a PIL image or an array (height, width, 3)"
        )
    if not Path(source).is_file():
        raise FileNotFoundError(f"no image file at {source}: images are read from local files")
    with Path(source).open("rb") as file:
        return _decode(file, name_of(source))


def _decode(source: BinaryIO | Image.Image, name: str) -> Image.Image:
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        pixels = image.width * image.height
        if not pixels:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        # Up to twice its limit Pillow only warns. Checked here, not by turning the warning into an
        # error, because warning filters belong to the whole process.
        if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours, without Pillow's warning
        return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} is larger than Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels ({error}): "
            "scale it down"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that Pillow can read") from None
    except Exception as error:  # decoders raise anything on damaged data
        raise ValueError(f"{name} is a damaged or truncated image: {error}") from error


def name_of(source: ImageLike) -> str:
    """How error messages call an image."""
    if isinstance(source, str | Path):
        return f"image file {source}"
    return "the image" if isinstance(source, np.ndarray) else f"the image {source!r}"
