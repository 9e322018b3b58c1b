"""Pictures: what is taken for one, and how it is read."""

import base64
import binascii
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlcache_jax.errors import reason, short

ImageLike: TypeAlias = str | Path | bytes | Mapping[str, Any] | Image.Image | Any
"""A picture: a local file's path; its content as bytes, as base64 or as a `data:` URI;
`{"bytes": ..., "path": ...}` as datasets hold it; a PIL image; or an array of numpy, JAX or torch,
uint8 or floats in [0, 1], `[H, W]`, `[H, W, C]` or `[C, H, W]` with 1, 3 or 4 channels."""

Images: TypeAlias = ImageLike | Sequence[ImageLike] | None
"""The pictures of one prompt."""

FORMATS = (
    *("AVIF", "BMP", "CUR", "DCX", "DDS", "DIB", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000"),
    *("MPO", "MSP", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM"),
)
"""Raster formats that Pillow reads itself, whatever the file is called: others would start other
programs (Ghostscript for PostScript)."""

_KINDS = "give a path, bytes, base64, a PIL image or an array (height, width, 3)"


def load_image(source: ImageLike) -> Image.Image:
    """Open an image as 8-bit RGB, upright: the same for every kind of source.

    As `transformers.image_utils.load_image`: the EXIF orientation is applied, then Pillow converts
    to RGB; but what is transparent is put on white, and grey values of more than 8 bits are scaled,
    not clipped. 16-bit values v become v / 257. Of other integers and of floats, white is the
    smallest of 1 (floats only), 255, 65,535 that no value exceeds, else the largest value; black is
    0, or the smallest value where that is negative.

    Args:
        source: see `ImageLike`. An array `[3, W, 3]` counts as `[H, W, C]`.

    Raises:
        FileNotFoundError: there is no such file, or it is a URL, which is never fetched.
        ValueError: it is not an image, is damaged or empty, or is larger than Pillow's limit
            against decompression bombs.
    """
    name = name_of(source)
    if isinstance(source, Mapping):
        content, path = source.get("bytes"), source.get("path")
        if content is None and path is None:
            raise ValueError(f"{name} has neither bytes nor a path: {_KINDS}")
        source = path if content is None else content
    if isinstance(source, Image.Image):
        return _decode(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), name)
    if isinstance(source, str | Path):
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            raise FileNotFoundError(f"{name}: no image file is fetched: download it, give its path")
        if isinstance(source, str) and source.startswith("data:"):
            return _decode(io.BytesIO(_base64(source.partition(",")[2], name)), name)
        if os.path.isfile(source):
            with open(source, "rb") as file:
                return _decode(file, name)
        try:
            return _decode(io.BytesIO(_base64(str(source), name)), name)
        except ValueError:
            raise FileNotFoundError(f"no image file at {short(source)}: {_KINDS}") from None
    return _of_array(source, name)


def name_of(source: Any) -> str:
    """How error messages call an image."""
    if isinstance(source, str | Path):
        return f"image file {short(source)}"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"the image of {len(source)} bytes"
    if hasattr(source, "shape"):
        return f"the image array of shape {short(source.shape)}"
    return f"the image {short(source)}"


def _base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is not valid base64 ({reason(error)})") from None


def _decode(source: Any, name: str) -> Image.Image:
    """An image of a PIL image or of an open file."""
    Image.init()  # all formats, not only the usual ones
    try:
        if not isinstance(source, Image.Image):
            image = Image.open(source, formats=[kind for kind in FORMATS if kind in Image.OPEN])
        elif source.format in (None, *FORMATS):
            image = source
        else:
            raise UnidentifiedImageError
        if not image.width * image.height:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        # Up to twice its limit Pillow only warns. Checked here, not by turning the warning into an
        # error, because warning filters belong to the whole process.
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} is larger than Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels "
            f"({reason(error)}): scale it down"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{name} is not an image that Pillow can read itself: use PNG or JPEG"
        ) from None
    except Exception as error:  # decoders raise anything on damaged data
        raise ValueError(f"{name} is a damaged or truncated image: {reason(error)}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; `load_image` says how."""
    transparent = image.has_transparency_data
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        whites = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        grey = Image.fromarray(_to_bytes(values, (65535,) if ";" in image.mode else whites))
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey = Image.fromarray(np.where(values == clear, 255, np.asarray(grey)).astype("uint8"))
        return grey.convert("RGB")
    if not transparent:
        return image.convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_bytes(values: np.ndarray, whites: Sequence[int]) -> np.ndarray:
    """Grey values as uint8; white is the first of `whites` that none exceeds."""
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("it has values that are not finite")
    white = next((white for white in whites if high <= white), high)
    black = min(low, 0.0)
    return np.floor((values - black) * (255 / (white - black)) + 0.5).astype(np.uint8)


def _of_array(source: Any, name: str) -> Image.Image:
    """An image of uint8 values, or of floats in [0, 1]."""
    if not hasattr(source, "__array__"):
        raise ValueError(f"{name} is not an image: {_KINDS}")
    try:
        if hasattr(source, "detach"):  # torch, of which numpy knows no bfloat16
            source = source.detach().cpu()
            source = source.float() if source.is_floating_point() else source
        array = np.asarray(source)
    except Exception as error:  # any library's arrays may come here
        raise ValueError(f"{name} cannot be read ({reason(error)}): {_KINDS}") from None
    form = f"{array.dtype} of shape {short(array.shape)}"
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise ValueError(
            "an image array must have the shape (height, width, 3), with 1, 3 or 4 channels "
            f"last or first, not {form}"
        )
    if array.dtype != np.uint8:
        if not jnp.issubdtype(array.dtype, np.floating):  # which knows bfloat16
            raise ValueError(f"an image array must be of uint8 or of floats, not {form}")
        array = array.astype(np.float32)
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"an image array of floats must lie in [0, 1], not {array.min():.6g} to "
                f"{array.max():.6g}: scale it, or give uint8"
            )
        array = np.floor(array * 255 + 0.5).astype(np.uint8)
    array = np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)
    return _to_rgb(Image.fromarray(array))
