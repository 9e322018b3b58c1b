"""`reading`: read a row of a grid of digits."""

import random
from collections.abc import Sequence

from benchmarks.accuracy.glyphs import DIGITS, LETTERS
from benchmarks.accuracy.scene import Cell, Manner, Page, Question, Wording, between, make_pages

_QUESTIONS = (
    "Read the {line} {where} {direction}.",
    "Which characters stand in the {line} {where}, {direction}?",
    "What does the {line} of the grid {where} say, read {direction}?",
    "Go through the {line} {where} {direction} and write down what you see.",
)
_FORMATS = (
    "Answer with the characters only.",
    "Write them one after the other, without spaces and without any other words.",
    "Answer with a single word that holds all the characters in their order.",
)
WORDING = Wording(
    (
        "Each row has its letter on the left and each column has its letter above it.",
        "The letters on the left name the rows and those at the top name the columns.",
        "You are given a grid of characters with a letter for every row and column.",
    ),
    _QUESTIONS,
    _FORMATS,
)
DIRECTION = "from left to right"
TEXTS = (*WORDING.texts, DIRECTION, "row column from top to bottom")
"""Columns are not asked for, but the shipped tokenizer has the words."""


class Reading:
    """Grids of digits, 2 to 8 rows and columns, with letters that name the lines.

    At level 0 half of the pages have the grid in the corner with wide spacing, at level 1 none.
    """

    def __init__(self, rng: random.Random, sizes: Sequence[tuple[int, int]], level: float):
        self.pages = make_pages(sizes)
        self._rows: list[tuple[Page, str, str, tuple[Cell, ...]]] = []
        for page in self.pages:
            self._write_grid(rng, page, level)

    def ask(self, rng: random.Random, manner: Manner) -> Question:
        """The digits of a random row."""
        page, label, answer, cells = rng.choice(self._rows)
        text = WORDING.put(rng, manner, line=f"row {label}", where=page.where, direction=DIRECTION)
        return Question(text, answer, cells)

    def _write_grid(self, rng: random.Random, page: Page, level: float) -> None:
        in_corner = rng.random() < 0.5 * (1 - level)
        border = 2  # the letters and a free line
        depth, row_step, top = _extent(rng, page.rows - border, level, in_corner)
        width, col_step, left = _extent(rng, page.cols - border, level, in_corner)
        top, left = top + border, left + border
        content = "".join(rng.choices(DIGITS, k=depth * width))
        grid = [
            [
                page.put(top + j * row_step, left + i * col_step, content[j * width + i])
                for i in range(width)
            ]
            for j in range(depth)
        ]
        names = rng.sample(LETTERS, depth + width)
        for j in range(depth):
            page.put(top + j * row_step, left - border, names[j])
        for i in range(width):
            page.put(top - border, left + i * col_step, names[depth + i])
        for j in range(depth):
            answer = content[j * width : (j + 1) * width]
            self._rows.append((page, names[j], answer, tuple(grid[j])))


def _extent(rng: random.Random, room: int, level: float, in_corner: bool) -> tuple[int, int, int]:
    """Lines of a grid along one axis, the step between them, and where the first one lies."""
    most = min(between(level, 4, 8), room)
    count = rng.randint(between(level, 2, 3), most)
    fits_wide = 2 * count - 1 <= room
    step = 2 if fits_wide and (in_corner or rng.random() < 0.5) else 1
    free = room - 1 - (count - 1) * step
    return count, step, 0 if in_corner else rng.randint(0, free)
