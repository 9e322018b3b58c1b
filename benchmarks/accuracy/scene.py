"""What the task families share: pages of cells, lines of names and values, questions about them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from benchmarks.accuracy.glyphs import CLASS, EMPTY, LETTERS

Cell = tuple[int, int, int]
"""(picture, row, column)."""

Manner = Literal["full", "brief", "terse"]
"""How a question is put: with a context and a format for the answer; without a context, in the
shortest format, as in one turn of several; just its fields, to train with."""


@dataclass(frozen=True)
class Question:
    """A question without its pictures, its answer, and the cells that are read, in their order."""

    text: str
    answer: str
    evidence: tuple[Cell, ...]


class Scene(Protocol):
    """The pages of one item and the questions that can be asked about them."""

    pages: "list[Page]"

    def __init__(self, rng: random.Random, sizes: Sequence[tuple[int, int]], level: float): ...

    def ask(self, rng: random.Random, manner: Manner) -> Question:
        """A random question."""
        ...


class Page:
    """The cells of one picture while they are written.

    Args:
        index: which of the item's pictures it is.
        size: (rows, columns) of cells.
        count: pictures of the item.
    """

    def __init__(self, index: int, size: tuple[int, int], count: int):
        self.index = index
        self.rows, self.cols = size
        self.cells = np.full(size, EMPTY, np.int16)
        self.where = "in the picture"
        if count > 1:
            self.where = f"in the {('first', 'second')[index]} picture"

    def put(self, row: int, col: int, name: str) -> Cell:
        """Put one glyph into a cell."""
        if self.cells[row, col] != EMPTY:
            raise ValueError(f"cell {(row, col)} is taken")
        self.cells[row, col] = CLASS[name]
        return self.index, row, col

    def write(self, row: int, col: int, text: str) -> tuple[Cell, ...]:
        """Write characters from left to right."""
        return tuple(self.put(row, col + i, character) for i, character in enumerate(text))


def make_pages(sizes: Sequence[tuple[int, int]]) -> list[Page]:
    """Empty pages of one item."""
    return [Page(i, size, len(sizes)) for i, size in enumerate(sizes)]


@dataclass(frozen=True)
class Entry:
    """A name and its value on a page."""

    page: Page
    name: str
    value: str
    name_cells: tuple[Cell, ...]
    value_cells: tuple[Cell, ...]


def between(level: float, easy: float, hard: float) -> int:
    """A bound that moves with the level of the curriculum."""
    return round(easy + level * (hard - easy))


def make_names(rng: random.Random, count: int) -> list[str]:
    """Different names of two letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[rng.choice(LETTERS) + rng.choice(LETTERS)] = None
    return list(names)


def write_lines(
    rng: random.Random,
    page: Page,
    pool: Sequence[str],
    make_value: Callable[[int], str],
    level: float,
) -> list[Entry]:
    """Write lines like `KQ: 4821`, below one another in one or two columns.

    At level 0 half of the pages start in the corner with wide spacing, at level 1 none does.

    Args:
        rng: where every choice comes from.
        page: an empty page.
        pool: names to choose from.
        make_value: called once for each line with the greatest length that fits.
        level: 0 for 2 to 4 lines, 1 for 4 to 8 in each column.
    """
    in_corner = rng.random() < 0.5 * (1 - level)
    columns = 2 if page.cols >= 16 and rng.random() < 0.3 * level else 1
    gap = 1 if in_corner else rng.randrange(2)
    most = (page.cols - columns + 1) // columns - 3 - gap
    spacing = 2 if in_corner else rng.choice((1, 2))
    deepest = min(between(level, 4, 8), (page.rows + spacing - 1) // spacing)
    fewest = min(between(level, 2, 4), deepest)
    count = rng.randint(fewest, deepest * columns)
    names = rng.sample(pool, count)
    values = [make_value(most) for _ in names]

    depth = -(-count // columns)
    width = 3 + gap + max(map(len, values))
    stride = width + 1
    free_rows = page.rows - 1 - (depth - 1) * spacing
    free_cols = page.cols - width - (columns - 1) * stride
    top, left = (0, 0) if in_corner else (rng.randint(0, free_rows), rng.randint(0, free_cols))
    entries = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        row, col = top + i % depth * spacing, left + i // depth * stride
        name_cells = page.write(row, col, name + ":")[:2]
        value_cells = page.write(row, col + 3 + gap, value)
        entries.append(Entry(page, name, value, name_cells, value_cells))
    return entries


@dataclass(frozen=True)
class Wording:
    """The ways in which one kind of question is put.

    Attributes:
        contexts: what the picture is, said before the question.
        questions: the question, with fields in braces.
        formats: how to answer, said last; the first is the shortest.
    """

    contexts: tuple[str, ...]
    questions: tuple[str, ...]
    formats: tuple[str, ...]

    def put(self, rng: random.Random, manner: Manner, **fields: str) -> str:
        """One wording of the question."""
        if manner == "terse":
            return " ".join(fields.values())
        question = rng.choice(self.questions).format(**fields)
        if manner == "brief":
            return f"{question} {self.formats[0]}"
        return f"{rng.choice(self.contexts)} {question} {rng.choice(self.formats)}"

    @property
    def texts(self) -> tuple[str, ...]:
        """Every sentence, fields included."""
        return self.contexts + self.questions + self.formats
