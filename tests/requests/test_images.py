"""Reading pictures: as Hugging Face reads them, and clear errors for what is none."""

import base64
import contextlib
import io
import struct
import warnings
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image as hf_load_image

from tests.tiny import picture
from vlcache_jax.requests.images import load_image


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
    return np.asarray(hf_load_image(source))


def on_white(image):
    """What is transparent put on white, and 16 bits made 8, by numpy."""
    if image.mode == "I;16":
        return np.repeat(np.floor(np.asarray(image) / 257 + 0.5)[..., None], 3, 2).astype(np.uint8)
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("mode", modes())
def test_every_mode_is_read_alike_by_path_and_as_an_object(mode, tmp_path):
    image = modes()[mode]
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image.save(path)
    with Image.open(path) as opened:
        opened.load()
        changed = opened.has_transparency_data or mode == "I;16"
        expected = on_white(opened) if changed else hf_loaded(str(path))
        assert changed == (mode in ("RGBA", "LA", "P-transparent", "I;16"))
        for source in (path, str(path), opened, image, path.read_bytes()):
            read = np.asarray(load_image(source))
            assert read.shape == (30, 40, 3)
            np.testing.assert_allclose(read.astype(float), expected, atol=1 if changed else 0)


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "I;16"])
def test_a_colour_that_a_png_file_declares_transparent_is_white(mode, tmp_path):
    values = np.tile(np.arange(40, dtype=np.uint8) * 6, (30, 1))
    image = Image.fromarray(values)
    image = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    clear = {"L": 60, "RGB": (60, 60, 60), "1": 0, "I;16": 60}[mode]
    image.save(tmp_path / "image.png", transparency=clear)
    with Image.open(tmp_path / "image.png") as opened:
        assert "transparency" in opened.info
    read = np.asarray(load_image(tmp_path / "image.png"))
    places = np.asarray(image) == clear
    assert (read[places if mode != "RGB" else places.all(-1)] == 255).all()
    if mode != "1":
        assert (read[:, :10] < 255).all()


@pytest.mark.parametrize(
    ("values", "white", "black"),
    [
        (np.linspace(0, 1, 12), 1, 0),
        (np.linspace(0, 0.5, 12), 1, 0),
        (np.linspace(0, 200, 12), 255, 0),
        (np.linspace(0, 1000, 12), 65535, 0),
        (np.linspace(0, 1e6, 12), 1e6, 0),
        (np.linspace(-5, 5, 12), 255, -5),
        (np.zeros(12), 1, 0),
    ],
)
def test_floats_are_scaled_by_the_documented_rule(values, white, black):
    values = values.astype(np.float32).reshape(3, 4)
    read = np.asarray(load_image(Image.fromarray(values)))
    expected = np.floor((values - black) / (white - black) * 255 + 0.5)
    np.testing.assert_allclose(read[..., 0].astype(float), expected, atol=1)
    assert (read == read[..., :1]).all()


def test_integers_are_scaled_by_the_documented_rule():
    for most, white in ((1, 255), (255, 255), (256, 65535), (70000, 70000)):
        image = Image.fromarray(np.array([[0, most]], np.int32))
        assert image.mode == "I"
        assert np.asarray(load_image(image))[0, 1, 0] == int(most / white * 255 + 0.5)


def test_floats_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        load_image(Image.fromarray(np.array([[0, np.nan]], np.float32)))


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
    for path in (
        tmp_path / "none.png",
        tmp_path,
        "",
        "a\0b",
        "x" * 5000,
        "iVBORw0KGgo",
        "~" * 9**6,
    ):
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            load_image(path)
        assert len(str(caught.value)) < 200
    with pytest.raises(FileNotFoundError, match=r"no image file at .*none\.png"):
        load_image(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="download it"):
        load_image("https://example.com/cat.png")


def sources(path):
    """The ways to give one picture."""
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    wrapped = base64.encodebytes(data).decode()
    yield from (path, str(path), data, bytearray(data), memoryview(data), text, wrapped)
    yield from (
        f"data:image/png;base64,{text}",
        {"bytes": data},
        {"bytes": data, "path": "cat.png"},
    )
    yield from ({"bytes": None, "path": str(path)}, Image.open(path))
    array = np.asarray(Image.open(path))
    floats = array.astype(np.float32) / 255
    for values in (array, floats, floats.astype(np.float64), jnp.asarray(array)):
        yield from (values, values.transpose(2, 0, 1))


def test_all_ways_to_give_a_picture_are_one(tmp_path):
    path = tmp_path / "image"
    picture(40, 30).save(path, "PNG")
    expected = np.asarray(picture(40, 30))
    for source in sources(path):
        np.testing.assert_array_equal(np.asarray(load_image(source)), expected)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "bfloat16", "float32", "float64"])
def test_arrays_of_torch_and_jax(dtype):
    torch = pytest.importorskip("torch")
    values = np.asarray(picture(40, 30))
    if dtype != "uint8":
        values = values / np.float32(255)
    tensor = torch.tensor(values).to(getattr(torch, dtype)).requires_grad_(dtype != "uint8")
    arrays = [tensor, tensor.permute(2, 0, 1)]
    if dtype != "float64":
        arrays.append(jnp.asarray(values, dtype))
    for array in arrays:
        read = np.asarray(load_image(array)).astype(int)
        assert np.abs(read - np.asarray(picture(40, 30))).max() <= {"bfloat16": 1}.get(dtype, 0)


def test_grey_and_transparent_arrays():
    grey = np.arange(10, dtype=np.uint8).reshape(2, 5)
    for array in (grey, grey[..., None], grey[None]):
        read = np.asarray(load_image(array))
        assert (read == grey[..., None]).all()
    clear = np.zeros((3, 5, 4), np.uint8)
    assert (np.asarray(load_image(clear)) == 255).all()


def test_postscript_starts_no_program_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("Ghostscript"))
    path = tmp_path / "image.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with Image.open(path) as opened:
        assert opened.format == "EPS"
        for source in (path, path.read_bytes(), opened):
            with pytest.raises(ValueError, match="not an image that Pillow can read itself"):
                load_image(source)


@pytest.mark.parametrize(
    "source",
    [5, None, {}, {"bytes": None, "path": None}, {"url": "x"}, object(), "data:image/png;base64,!"],
)
def test_what_is_no_picture_is_refused_in_one_short_line(source):
    with pytest.raises(ValueError, match="image") as caught:
        load_image(source)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


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
    ("array", "message"),
    [
        (np.zeros((9, 9, 5), np.uint8), "must have the shape"),
        (np.zeros((1, 9, 9, 3), np.uint8), "must have the shape"),
        (np.zeros(9, np.uint8), "must have the shape"),
        (np.zeros((0, 9, 3), np.uint8), "must have the shape"),
        (np.zeros((9, 9, 3), np.int32), "must be of uint8 or of floats"),
        (np.zeros((9, 9, 3), bool), "must be of uint8 or of floats"),
        (np.full((9, 9, 3), 255.0), r"must lie in \[0, 1\], not 255 to 255"),
        (np.full((9, 9, 3), -0.1), r"must lie in \[0, 1\]"),
        (np.full((9, 9, 3), np.nan), r"must lie in \[0, 1\]"),
        (np.full((9, 9, 3), "x"), "must be of uint8 or of floats"),
    ],
)
def test_bad_arrays(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


def test_an_image_without_pixels():
    with pytest.raises(ValueError, match="0 x 9 pixels"):
        load_image(Image.new("RGB", (0, 9)))
