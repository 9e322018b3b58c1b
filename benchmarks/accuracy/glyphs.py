"""Glyph atlases: every character and shape that the task pictures are made of, one cell each.

Characters come from Pillow's built-in font in several sizes and weights, shapes from its polygons:
the same Pillow and FreeType give the same pixels.
"""

import math
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
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (225, 190, 0),
    "purple": (145, 50, 180),
    "grey": (125, 125, 125),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
CLASSES = (*CHARACTERS, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))
"""What a cell can show; the numbers in a table of cells are places in this list."""

CLASS = {name: i for i, name in enumerate(CLASSES)}

_SIZES = (13, 14, 15, 16)  # of the font, in pixels; capitals are 0.7 of it
_WEIGHTS = (0, 0.6)  # pixels by which strokes are widened on either side
NUM_STYLES = len(_SIZES) * len(_WEIGHTS)
_WIDEST = 13
_POLYGONS = {
    "square": (4, 1 / 8, (1.25,)),
    "triangle": (3, 0, (1.1,)),
    "star": (10, 0, (1.1, 0.45)),
}
"""Points, turn of the first, and their distances from the middle one after the other."""

_FINE = 16  # glyphs are drawn this much larger, then averaged


@lru_cache
def atlas() -> np.ndarray:
    """Coverage of each pixel, uint8 `[NUM_STYLES, len(CLASSES), CELL, CELL]`."""
    masks = np.zeros((NUM_STYLES, len(CLASSES), CELL, CELL), np.uint8)
    styles = [(size, weight) for size in _SIZES for weight in _WEIGHTS]
    for i, (size, weight) in enumerate(styles):
        characters = [_character(c, size, weight) for c in CHARACTERS]
        shapes = [_shape(name, radius=4.6 + 0.25 * i) for name in SHAPES]
        masks[i] = np.stack(characters + shapes * len(COLOURS))
    return masks


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


def _shape(name: str, radius: float) -> np.ndarray:
    """A shape in the middle of its cell."""
    side, r = CELL * _FINE, radius * _FINE
    middle = side / 2
    sheet = Image.new("L", (side, side))
    draw = ImageDraw.Draw(sheet)

    def corner(turn: float, radius: float) -> tuple[float, float]:
        angle = 2 * math.pi * turn
        return middle + radius * r * math.sin(angle), middle - radius * r * math.cos(angle)

    def box(x: float, y: float) -> tuple[float, float, float, float]:
        return middle - x, middle - y, middle + x, middle + y

    if name in _POLYGONS:
        points, turn, radii = _POLYGONS[name]
        draw.polygon([corner(i / points + turn, radii[i % len(radii)]) for i in range(points)], 255)
    elif name == "cross":
        draw.rectangle(box(r, 0.3 * r), fill=255)
        draw.rectangle(box(0.3 * r, r), fill=255)
    else:
        draw.ellipse(box(r, r), fill=255)
        if name == "ring":
            draw.ellipse(box(0.55 * r, 0.55 * r), fill=0)
    return np.asarray(sheet.reduce(_FINE))
