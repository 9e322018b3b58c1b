"""Reading pictures: as Hugging Face reads them, and clear errors for what is none."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image as hf_load_image

from tests.tiny import picture
from vlcache_jax.images import load_image


def modes():
    """Pictures in every mode that a decoder may give."""
    rgb = picture(40, 30)
    values = np.random.default_rng(1).integers(0, 65536, (30, 40))
    clear = rgb.convert("P")
    clear.info["transparency"] = bytes(range(256))
    return {
        "RGB": rgb,
        "RGBA": Image.merge("RGBA", [*rgb.split(), rgb.convert("L")]),
        "LA": Image.merge("LA", [rgb.convert("L"), rgb.convert("L").rotate(180)]),
        "L": rgb.convert("L"),
        "1": rgb.convert("1"),
        "P": rgb.convert("P"),
        "P-transparent": clear,
        "I;16": Image.fromarray(values.astype(np.uint16)),
        "CMYK": rgb.convert("CMYK"),
    }


def hf_loaded(source):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
        return np.asarray(hf_load_image(source))


@pytest.mark.parametrize("mode", modes())
def test_every_mode_is_read_as_hugging_face_reads_it(mode, tmp_path):
    image = modes()[mode]
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image.save(path)
    expected = hf_loaded(str(path))
    assert expected.shape == (30, 40, 3)
    with Image.open(path) as opened:
        for source in (path, str(path), opened):
            np.testing.assert_array_equal(np.asarray(load_image(source)), expected)
    np.testing.assert_array_equal(np.asarray(load_image(image)), hf_loaded(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    path = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(40, 30).save(path, exif=exif)
    image = load_image(path)
    assert image.size == ((40, 30) if orientation < 5 else (30, 40))
    np.testing.assert_array_equal(np.asarray(image), hf_loaded(str(path)))


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "none.png", tmp_path, "https://example.com/cat.png"):
        with pytest.raises(FileNotFoundError, match="no image file at"):
            load_image(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_not_an_image(content, tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png"):
        load_image(path)


def encoded(kind):
    file = io.BytesIO()
    picture(60, 50).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_image(kind, tmp_path):
    path = tmp_path / "bad.image"
    data = encoded(kind)
    path.write_bytes(data)
    assert load_image(path).size == (60, 50)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"bad\.image"):
        load_image(path)
    if kind not in ("TIFF", "WEBP"):  # these two cannot even be opened
        opened = Image.open(io.BytesIO(path.read_bytes()))
        with pytest.raises(ValueError, match="damaged or truncated"):
            load_image(opened)


@settings(deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(data, tmp_path_factory):
    content = bytearray(encoded(data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(300, len(content) - 1)))] = data.draw(
            st.integers(0, 255)
        )
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage that it can read over
        with contextlib.suppress(ValueError):
            assert load_image(path).mode == "RGB"


def bomb(width, height):
    """The header of a PNG file that claims a size and holds nothing."""

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.parametrize("size", [(9500, 9500), (60000, 60000)])
def test_a_decompression_bomb(size, action, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(*size))
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match=r"bomb\.png is larger than .* limit of 89478485"):
            load_image(path)


def test_the_limit_may_be_lifted(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    picture(60, 50).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="limit of 1000 pixels"):
        load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(path).size == (60, 50)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((3, 9, 9), np.uint8),
        np.zeros((9, 9, 3), np.float32),
        np.zeros((0, 9, 3), np.uint8),
    ],
)
def test_bad_arrays(array):
    with pytest.raises(ValueError, match="must be uint8 of shape"):
        load_image(array)


def test_an_image_without_pixels():
    with pytest.raises(ValueError, match="0 x 9 pixels"):
        load_image(Image.new("RGB", (0, 9)))
