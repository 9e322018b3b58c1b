"""The task pictures: their glyphs, a cell each, and how a table of cells is drawn.

The glyphs come from Pillow's built-in font in several sizes and weights: the same Pillow and
FreeType give the same pixels. A picture varies in sizes, weights, small shifts and noise.
"""

import random
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 14
"""Side of a cell in pixels: a patch of the vision tower."""

EMPTY = -1
"""Stands in a table of cells where nothing is drawn."""

DIGITS = "0123456789"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O, which look like 1 and 0
CHARACTERS = DIGITS + LETTERS + ":"
"""What a cell can show; the numbers in a table of cells are places in this text."""

_SIZES = (13, 14, 15, 16)  # of the font, in pixels; capitals are 0.7 of it
_WEIGHTS = (0, 0.6)  # pixels by which strokes are widened on either side
NUM_STYLES = len(_SIZES) * len(_WEIGHTS)
_WIDEST = 13
FINE = 16
"""Glyphs are drawn this much larger, then averaged."""


@lru_cache
def atlas() -> np.ndarray:
    """Coverage of each pixel, uint8 `[NUM_STYLES, len(CHARACTERS), CELL, CELL]`."""
    styles = [
        (ImageFont.load_default(size=size * FINE), round(weight * FINE))
        for size in _SIZES
        for weight in _WEIGHTS
    ]
    return np.array([[character(each, *style) for each in CHARACTERS] for style in styles])


def character(text: str, font: Any, stroke: int = 0) -> np.ndarray:
    """A character whose capitals' height is centred, squeezed where it is too wide for a cell.

    Args:
        text: one character.
        font: of Pillow, `FINE` times as large as it is to be.
        stroke: by how much it is widened on either side, in the font's pixels.

    Returns:
        Coverage of each pixel, uint8 `[CELL, CELL]`.
    """
    height = -font.getbbox("H", anchor="ls")[1]
    left, _, right, _ = font.getbbox(text, anchor="ls", stroke_width=stroke)
    width, fine = round(right - left), CELL * FINE
    sheet = Image.new("L", (width, fine))
    ImageDraw.Draw(sheet).text(
        (-left, (fine + height) / 2), text, 255, font, anchor="ls", stroke_width=stroke
    )
    narrow = min(max(1, round(width / FINE)), _WIDEST)
    small = sheet.resize((narrow, CELL), Image.Resampling.BOX)
    cell = Image.new("L", (CELL, CELL))
    cell.paste(small, ((CELL - narrow) // 2, 0))
    return np.asarray(cell)


MAX_JITTER = 4
_NOISE_LEVELS = (0, 3, 6, 9)  # standard deviations, of 255


def draw(
    cells: np.ndarray, size: tuple[int, int], rng: random.Random, *, jitter: int
) -> np.ndarray:
    """Draw the cells of one picture.

    A picture has one background and one ink; three in four pictures have one size and weight for
    all of it, in the others they differ from glyph to glyph.

    Args:
        cells: `[rows, cols]`, the class of the glyph in each cell or `EMPTY`.
        size: (height, width) in pixels, no less than the cells take.
        rng: where every choice comes from.
        jitter: pixels by which a glyph may lie off its cell in each direction.

    Returns:
        uint8 `[height, width, 3]`, read-only.
    """
    rows, cols = np.nonzero(cells >= 0)
    classes, count = cells[rows, cols], rows.size
    dice = np.random.default_rng(rng.getrandbits(64))
    background, ink = paper(rng)
    many_styles = rng.random() < 0.25
    style = dice.integers(NUM_STYLES, size=count) if many_styles else rng.randrange(NUM_STYLES)
    masks = atlas()[style, classes]
    for most, width in ((20, 1), (6, 3)):  # once the shades of colours: pictures stay as they were
        dice.integers(-most, most + 1, (count, width), dtype=np.int16)
    corners = np.stack([rows, cols], axis=1) * CELL
    corners += dice.integers(-jitter, jitter + 1, corners.shape)
    return paint(_noise(size, rng) + background, masks, corners, ink - background)


def paint(
    canvas: np.ndarray, masks: np.ndarray, corners: np.ndarray, contrast: np.ndarray
) -> np.ndarray:
    """Put glyphs on a ground.

    Args:
        canvas: the ground, int16 `[height, width, 3]`; it is drawn into.
        masks: coverage of each pixel, uint8 `[n, CELL, CELL]`.
        corners: top and left of each in pixels `[n, 2]`; moved inside where they lie outside.
        contrast: the ink's colour less the ground's, int16 `[3]`.

    Returns:
        uint8 `[height, width, 3]`, read-only.
    """
    # Neighbours may overlap by their shifts, so changes are added up and cut off at the end.
    half = (masks >> 1)[..., None].astype(np.int16)  # whose products fit 16 bits
    changes = half * contrast >> 7
    corners = corners.clip(0, np.array(canvas.shape[:2]) - CELL)
    for (y, x), change in zip(corners.tolist(), changes, strict=True):
        canvas[y : y + CELL, x : x + CELL] += change
    picture = canvas.clip(0, 255).astype(np.uint8)
    picture.flags.writeable = False
    return picture


def paper(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Background and ink; light on dark in 3 of 10 pictures."""
    light = [rng.randrange(215, 256) for _ in range(3)]
    dark = [rng.randrange(0, 90) for _ in range(3)]
    if rng.random() < 0.3:
        light, dark = dark, light
    return np.array(light, np.int16), np.array(dark, np.int16)


@lru_cache
def _noise_bank(level: int) -> np.ndarray:
    """A store of Gaussian noise that pictures take windows of: drawing it anew is slow."""
    noise = np.random.default_rng(level).normal(0, level, 1 << 21)
    return noise.round().astype(np.int16)


def _noise(size: tuple[int, int], rng: random.Random) -> np.ndarray:
    """Noise of a random strength, int16 `[height, width, 3]`."""
    bank = _noise_bank(rng.choice(_NOISE_LEVELS))
    length = size[0] * size[1] * 3
    first = rng.randrange(bank.size - length)
    return bank[first : first + length].reshape(*size, 3)
