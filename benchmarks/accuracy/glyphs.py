"""The glyph atlas: every character that the task pictures are made of, one cell each.

They come from Pillow's built-in font in several sizes and weights: the same Pillow and FreeType
give the same pixels.
"""

from functools import lru_cache

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
_FINE = 16  # glyphs are drawn this much larger, then averaged


@lru_cache
def atlas() -> np.ndarray:
    """Coverage of each pixel, uint8 `[NUM_STYLES, len(CHARACTERS), CELL, CELL]`."""
    styles = [(size, weight) for size in _SIZES for weight in _WEIGHTS]
    return np.array([[_character(each, *style) for each in CHARACTERS] for style in styles])


def _character(character: str, size: int, weight: float) -> np.ndarray:
    """A character whose capitals' height is centred, squeezed where it is too wide for a cell."""
    font = ImageFont.load_default(size=size * _FINE)
    stroke = round(weight * _FINE)
    height = -font.getbbox("H", anchor="ls")[1]
    left, _, right, _ = font.getbbox(character, anchor="ls", stroke_width=stroke)
    width, fine = round(right - left), CELL * _FINE
    sheet = Image.new("L", (width, fine))
    ImageDraw.Draw(sheet).text(
        (-left, (fine + height) / 2), character, 255, font, anchor="ls", stroke_width=stroke
    )
    narrow = min(max(1, round(width / _FINE)), _WIDEST)
    small = sheet.resize((narrow, CELL), Image.Resampling.BOX)
    cell = Image.new("L", (CELL, CELL))
    cell.paste(small, ((CELL - narrow) // 2, 0))
    return np.asarray(cell)
