"""Changed pictures and prompts: an answer, or one line that says what is wrong; never a traceback.

Case i is always the same change, drawn with the seed i.
"""

import io
import random
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.cli.program import run_alone
from tests.test_mutations_config import answer, marks
from tests.tiny import picture

FORMATS = {"PNG": "png", "JPEG": "jpg", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff", "WEBP": "webp"}
MODES = (
    *("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX"),
    *("RGBa", "La", "I;16"),
)
SAME = "same"
cases = pytest.mark.parametrize("case", [pytest.param(n, marks=marks(n)) for n in range(300)])

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),  # of what Pillow reads all the same
]


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def in_mode(mode):
    image = picture(60, 50)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode in ("LAB", "HSV", "RGBa", "La", "PA"):
        through = {"RGBa": "RGBA", "La": "LA", "PA": "P"}.get(mode, "RGB")
        image = image.convert(through)
    return image.convert(mode)


def changed_picture(draw):
    """The content of a file, its ending, and what was done; SAME means nothing."""
    kind = draw.choice(sorted(FORMATS))
    content, ending = encoded(picture(60, 50), kind), FORMATS[kind]
    match draw.choice(["truncated", "flipped", "suffix", "mode", "tail"]):
        case "truncated":
            return content[: draw.randrange(len(content))], ending, "truncated"
        case "flipped":
            flipped = bytearray(content)
            for _ in range(draw.randrange(1, 9)):
                flipped[draw.randrange(min(len(flipped), 400))] ^= 1 << draw.randrange(8)
            return bytes(flipped), ending, "flipped"
        case "suffix":
            other = draw.choice(["jpg", "png", "eps", "txt", "x", "PNG"])
            return encoded(picture(60, 50)), other, SAME
        case "tail":
            return encoded(picture(60, 50)) + draw.randbytes(draw.randrange(1, 99)), "png", SAME
    mode = draw.choice(MODES)
    for kind in draw.sample(sorted(FORMATS), len(FORMATS)):
        try:
            lossless = mode == "RGB" and kind in ("PNG", "BMP", "TIFF")
            return encoded(in_mode(mode), kind), FORMATS[kind], SAME if lossless else mode
        except (OSError, ValueError):
            continue
    return encoded(picture(60, 50)), "png", SAME


@pytest.fixture(scope="module")
def plain(model_dir, tmp_path_factory):
    file = tmp_path_factory.mktemp("plain") / "image.png"
    file.write_bytes(encoded(picture(60, 50)))
    return file, answer(model_dir, "--image", file)


@cases
def test_a_changed_picture_is_answered_or_refused_in_one_line(case, model_dir, plain, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content, ending, what = changed_picture(random.Random(case))
    file = tmp_path / f"image.{ending}"
    file.write_bytes(content)
    found = answer(model_dir, "--image", file)
    if what == SAME:
        assert found == plain[1]


def changed_prompt(draw):
    """A prompt, and what was done; SAME means nothing."""
    words = draw.choice(["x", "what is it?", "USER: ", "[INST]", "</s>", "{{ x }}", "<image", "\n"])
    any_character = [chr(draw.choice([draw.randrange(0x110000), draw.randrange(0x300)]))
                     for _ in range(draw.randrange(1, 40))]  # fmt: skip
    match draw.choice(["mark", "marks", "characters", "long", "bytes", "spaces", "mixed"]):
        case "mark":
            return draw.choice(["<image>x", "<image>\nx", "x"]), SAME
        case "marks":
            return "<image>" * draw.randrange(2, 5) + words, "marks"
        case "characters":
            return "".join(any_character), "characters"
        case "long":
            return words * draw.randrange(1, 2000), "long"
        case "bytes":
            return draw.randbytes(draw.randrange(1, 30)).decode("utf-8", "surrogateescape"), "bytes"
        case "spaces":
            return draw.choice(["", " ", "\n", "\t\r\n", "\u3000", "\0"]), "spaces"
    return words + "".join(any_character) + "<image>" + words, "mixed"


@cases
def test_a_changed_prompt_is_answered_or_refused_in_one_line(case, model_dir, plain):
    prompt, what = changed_prompt(random.Random(case))
    found = answer(model_dir, "--image", plain[0], prompt=prompt)
    if what == SAME:
        assert found == plain[1]


@pytest.mark.full
@pytest.mark.parametrize("case", range(6))
def test_a_process_of_its_own_says_the_same_of_a_picture(case, model_dir, tmp_path):
    content, ending, _ = changed_picture(random.Random(case))
    file = tmp_path / f"image.{ending}"
    file.write_bytes(content)
    found = answer(model_dir, "--image", file, run=run_alone)
    assert found == answer(model_dir, "--image", file)


@pytest.mark.full
@pytest.mark.parametrize("case", range(6))
def test_a_process_of_its_own_says_the_same_of_a_prompt(case, model_dir, plain):
    prompt, _ = changed_prompt(random.Random(case))
    alone = answer(model_dir, "--image", plain[0], prompt=prompt, run=run_alone)
    assert alone == answer(model_dir, "--image", plain[0], prompt=prompt)
