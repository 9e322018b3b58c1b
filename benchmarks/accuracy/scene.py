"""What the tasks share: pages of cells, what can be asked about them, and how it is worded."""

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.accuracy.glyphs import CHARACTERS, EMPTY

Cell = tuple[int, int, int]
"""(picture, row, column)."""

Manner = Literal["full", "brief", "terse"]
"""How a question is put: with a context and a format for the answer; without a context, in the
shortest format, as in one turn of several; just its fields, to train with."""


@dataclass(frozen=True)
class Fact:
    """What can be asked about: the fields of a question, its answer, and the cells of that."""

    fields: dict[str, str]
    answer: str
    evidence: tuple[Cell, ...]


class Page:
    """The cells of one picture while they are written.

    Args:
        index: which of the item's pictures it is.
        size: (rows, columns) of cells.
        count: pictures of the item.
        characters: what a cell can show.
    """

    def __init__(self, index: int, size: tuple[int, int], count: int, characters: str = CHARACTERS):
        self.index, self.characters = index, characters
        self.rows, self.cols = size
        self.cells = np.full(size, EMPTY, np.int16)
        self.where = "in the picture"
        if count > 1:
            self.where = f"in the {('first', 'second')[index]} picture"

    def put(self, row: int, col: int, name: str) -> Cell:
        """Put one glyph into a cell."""
        if self.cells[row, col] != EMPTY:
            raise ValueError(f"cell {(row, col)} is taken")
        self.cells[row, col] = self.characters.index(name)
        return self.index, row, col

    def write(self, row: int, col: int, text: str) -> tuple[Cell, ...]:
        """Write characters from left to right."""
        return tuple(self.put(row, col + i, character) for i, character in enumerate(text))


def between(level: float, easy: float, hard: float) -> int:
    """A bound that moves with the level of the curriculum."""
    return round(easy + level * (hard - easy))


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
