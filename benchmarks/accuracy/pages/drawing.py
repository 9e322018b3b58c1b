"""Pages as pictures: monospaced letters over paper, colours, textures, bars and pictures."""

import random
import string
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from benchmarks.accuracy.glyphs import CELL, character, paint, paper

CHARACTERS = string.ascii_letters + string.digits + ".,:;-/%&+()?!#'"
"""What a cell of a page can show; the numbers in a table of cells are places in this text."""

Box = tuple[int, int, int, int]
"""(first row, first column, rows, columns) of cells."""

_FACES = ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSans.ttf", "DejaVuSerif.ttf")
_SIZES = (12, 13, 14)  # pixels; capitals are 0.73 of it, and what hangs below the line fits
_FINE = 16


@lru_cache
def atlas() -> np.ndarray:
    """Coverage of each pixel, uint8 `[styles, len(CHARACTERS), CELL, CELL]`."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [
        ImageFont.truetype(str(folder / face), size * _FINE) for face in _FACES for size in _SIZES
    ]
    faces += [ImageFont.load_default(size=(size + 1) * _FINE) for size in _SIZES]
    return np.array([[character(each, face) for each in CHARACTERS] for face in faces])


def draw_page(
    cells: np.ndarray,
    bars: Sequence[Box],
    rng: random.Random,
    *,
    jitter: int,
    plain: bool = False,
) -> np.ndarray:
    """Draw the cells of one page.

    Args:
        cells: `[rows, cols]`, the class of the glyph in each cell or `EMPTY`.
        bars: areas that are filled with a colour.
        rng: where every choice comes from.
        jitter: pixels by which a glyph may lie off its cell in each direction.
        plain: neither texture nor pictures.

    Returns:
        uint8 `[height, width, 3]`, read-only.
    """
    dice = np.random.default_rng(rng.getrandbits(64))
    background, ink = paper(rng)
    height, width = (side * CELL for side in cells.shape)
    ground = np.broadcast_to(background, (height, width, 3)).astype(np.int16)
    toward = np.sign(ink.mean() - background.mean())
    if not plain:
        ground += _texture(ground.shape, toward, rng, dice)
        for box in _free_boxes(cells, bars, rng):
            _area(ground, box)[:] = _picture(box, dice)
    for box in bars:
        colour = background + (ink - background) * rng.uniform(0.2, 0.6)
        inner = _area(ground, box)[3:-3]
        inner[:] = colour + dice.integers(-25, 26, 3)
    rows, cols = np.nonzero(cells >= 0)
    styles = atlas()
    style = dice.integers(len(styles), size=rows.size)
    if rng.random() < 0.8:
        style[:] = rng.randrange(len(styles))
    corners = np.stack([rows, cols], axis=1) * CELL
    drift = dice.integers(-jitter, jitter + 1, (cells.shape[0], 2))[rows]  # lines move as one
    own = dice.integers(-1, 2, corners.shape) if jitter > 1 else 0
    corners += (drift + own).clip(-jitter, jitter)
    return paint(ground, styles[style, cells[rows, cols]], corners, ink - background)


def _area(ground: np.ndarray, box: Box) -> np.ndarray:
    top, left, rows, cols = (side * CELL for side in box)
    return ground[top : top + rows, left : left + cols]


def _texture(
    shape: tuple[int, ...], toward: float, rng: random.Random, dice: np.random.Generator
) -> np.ndarray:
    """Noise, and perhaps a shade along the page, stains, or ruled lines, toward the ink's side."""
    height, width, _ = shape
    change = dice.normal(0, rng.choice((0.5, 2, 4, 7)), shape)
    kind = rng.choice(("none", "shade", "stains", "rules", "grain"))
    if kind == "shade":
        down, across = rng.uniform(-1, 1), rng.uniform(-1, 1)
        y, x = np.linspace(0, down, height)[:, None], np.linspace(0, across, width)
        change += (toward * 30 * np.abs(y + x))[..., None]
    elif kind in ("stains", "grain"):
        step = rng.randint(60, 160) if kind == "stains" else rng.randint(3, 9)
        strength = 24 if kind == "stains" else 12
        change += toward * strength * _smooth(dice, height, width, step)[..., None]
    elif kind == "rules":
        change[rng.randrange(CELL) :: CELL * rng.randint(1, 3)] += toward * 40
    return change.astype(np.int16)


def _smooth(dice: np.random.Generator, height: int, width: int, step: int) -> np.ndarray:
    """Values from 0 to 1 that change over so many pixels, `[height, width]`."""
    coarse = dice.integers(0, 256, (height // step + 2, width // step + 2), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), 3), np.float64) / 255


def _picture(box: Box, dice: np.random.Generator) -> np.ndarray:
    """Something like a photograph: soft colours with edges."""
    height, width = box[2] * CELL, box[3] * CELL
    picture = np.stack(
        [255 * _smooth(dice, height, width, int(dice.integers(12, 60))) for _ in range(3)], axis=-1
    )
    y, x = np.mgrid[:height, :width]
    for _ in range(int(dice.integers(2, 7))):
        centre = dice.uniform(0, 1, 2) * (height, width)
        radii = dice.uniform(0.1, 0.5, 2) * (height, width)
        inside = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
        picture[inside] = picture[inside] * 0.3 + dice.integers(0, 256, 3) * 0.7
    return picture + dice.normal(0, 4, picture.shape)


def _free_boxes(cells: np.ndarray, bars: Sequence[Box], rng: random.Random) -> list[Box]:
    """Up to three areas of free cells, a cell away from every glyph."""
    taken = cells >= 0
    for top, left, rows, cols in bars:
        taken[top : top + rows, left : left + cols] = True
    found = []
    for _ in range(rng.randint(0, 12)):
        rows, cols = rng.randint(4, 14), rng.randint(4, 16)
        if rows + 2 > cells.shape[0] or cols + 2 > cells.shape[1]:
            continue
        top = rng.randint(0, cells.shape[0] - rows)
        left = rng.randint(0, cells.shape[1] - cols)
        around = taken[max(top - 1, 0) : top + rows + 1, max(left - 1, 0) : left + cols + 1]
        if not around.any() and len(found) < 3:
            found.append((top, left, rows, cols))
            taken[top : top + rows, left : left + cols] = True
    return found
