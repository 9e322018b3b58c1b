"""`reading`: read a row of a grid of digits."""

import random
from collections.abc import Sequence

from benchmarks.accuracy.glyphs import DIGITS, LETTERS
from benchmarks.accuracy.scene import Fact, Page, Wording, between

WORDING = Wording(
    (
        "Each row has its letter on the left and each column has its letter above it.",
        "The letters on the left name the rows and those at the top name the columns.",
        "You are given a grid of characters with a letter for every row and column.",
    ),
    (
        "Read the {line} {where} {direction}.",
        "Which characters stand in the {line} {where}, {direction}?",
        "What does the {line} of the grid {where} say, read {direction}?",
        "Go through the {line} {where} {direction} and write down what you see.",
    ),
    (
        "Answer with the characters only.",
        "Write them one after the other, without spaces and without any other words.",
        "Answer with a single word that holds all the characters in their order.",
    ),
)
DIRECTION = "from left to right"
BORDER = 2
"""Cells before a grid: the letters that name its lines, and a free line."""


def write(rng: random.Random, pages: Sequence[Page], level: float) -> list[Fact]:
    """Write grids of digits, 2 to 8 rows and columns, with letters that name the lines.

    At level 0 half of the pages have the grid in the corner with wide spacing, at level 1 none.

    Args:
        rng: where every choice comes from.
        pages: empty ones.
        level: 0 for 2 to 4 rows and columns, 1 for 3 to 8.
    """
    facts = []
    for page in pages:
        in_corner = rng.random() < 0.5 * (1 - level)
        depth, down, top = _extent(rng, page.rows, level, in_corner)
        width, across, left = _extent(rng, page.cols, level, in_corner)
        content = rng.choices(DIGITS, k=depth * width)
        names = rng.sample(LETTERS, depth + width)
        for i, name in enumerate(names[depth:]):
            page.put(top - BORDER, left + i * across, name)
        for j, name in enumerate(names[:depth]):
            page.put(top + j * down, left - BORDER, name)
            digits = content[j * width : (j + 1) * width]
            places = ((top + j * down, left + i * across) for i in range(width))
            cells = tuple(page.put(*at, digit) for at, digit in zip(places, digits, strict=True))
            fields = {"line": f"row {name}", "where": page.where, "direction": DIRECTION}
            facts.append(Fact(fields, "".join(digits), cells))
    return facts


def _extent(rng: random.Random, cells: int, level: float, in_corner: bool) -> tuple[int, int, int]:
    """Lines of a grid along one axis of a page, the step between them, and where the first lies."""
    room = cells - BORDER
    count = rng.randint(between(level, 2, 3), min(between(level, 4, 8), room))
    fits_wide = 2 * count - 1 <= room
    step = 2 if fits_wide and (in_corner or rng.random() < 0.5) else 1
    free = room - 1 - (count - 1) * step
    return count, step, BORDER + (0 if in_corner else rng.randint(0, free))
