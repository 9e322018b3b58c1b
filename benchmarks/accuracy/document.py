"""`document`: look a value up by its key, or by its row and column, as in DocVQA."""

import random
from collections.abc import Sequence

from benchmarks.accuracy.glyphs import DIGITS, LETTERS
from benchmarks.accuracy.scene import (
    Entry,
    Manner,
    Page,
    Question,
    Wording,
    between,
    make_names,
    make_pages,
    write_lines,
)

TABLE_SHARE = 0.0
"""Of the pages that are wide enough for a table. None: the small model does not learn to find a
column, since its positions have one axis alone."""

_CONTEXTS = (
    "You are given a page with short names and a value for each of them.",
    "This is a form that was filled in by a machine.",
    "The page holds several entries, and each entry has its own value.",
    "You see a part of a printed record with keys and values.",
)
_FORMATS = (
    "Answer with the value only.",
    "Give the value alone, without any other words.",
    "Answer the question using a single word or phrase.",
    "Write the characters of the value in their order and nothing else.",
)
LINE = Wording(
    _CONTEXTS,
    (
        "What is the value that is written after the key {key} {where}?",
        "Find the line that begins with {key} {where}; what comes behind the colon?",
        "Which characters stand on the line of {key} {where}?",
        "Look for the entry named {key} {where} and read its value.",
    ),
    _FORMATS,
)
TABLE = Wording(
    _CONTEXTS,
    (
        "What is written in the row {row} and the column {column} of the table {where}?",
        "Which value stands in the column {column} of the row {row} {where}?",
        "Go along the row {row} to the column {column} {where}; what do you read there?",
    ),
    _FORMATS,
)
TEXTS = LINE.texts + TABLE.texts


class Document:
    """Pages of `KQ: 4821` lines, or tables with a name for each row and column.

    Values are digits alone or digits and letters, half and half. All pages choose their names from
    the same few, so that with two pictures a name is often in both, with another value.
    """

    def __init__(self, rng: random.Random, sizes: Sequence[tuple[int, int]], level: float):
        self.pages = make_pages(sizes)
        pool = make_names(rng, 20)
        self._lines: list[Entry] = []
        self._table: list[tuple[str, str, Entry]] = []

        def value(most: int) -> str:
            longest = min(most, between(level, 3, 6))
            length = rng.randint(between(level, 2, 3), longest)
            return make_value(rng, length)

        for page in self.pages:
            if page.cols >= 16 and rng.random() < TABLE_SHARE:
                self._table += _write_table(rng, page, pool, level)
            else:
                self._lines += write_lines(rng, page, pool, value, level)

    def ask(self, rng: random.Random, manner: Manner) -> Question:
        """The value of a random entry."""
        pick = rng.randrange(len(self._lines) + len(self._table))
        if pick < len(self._lines):
            entry = self._lines[pick]
            text = LINE.put(rng, manner, key=entry.name, where=entry.page.where)
        else:
            row, column, entry = self._table[pick - len(self._lines)]
            text = TABLE.put(rng, manner, row=row, column=column, where=entry.page.where)
        return Question(text, entry.value, entry.value_cells)


def make_value(rng: random.Random, length: int) -> str:
    """Random characters: digits alone, or digits and letters, half and half."""
    alphabet = DIGITS if rng.random() < 0.5 else DIGITS + LETTERS
    return "".join(rng.choices(alphabet, k=length))


def _write_table(
    rng: random.Random, page: Page, pool: Sequence[str], level: float
) -> list[tuple[str, str, Entry]]:
    """Write a table with headings; (row name, column name, entry) of each of its values."""
    width, first = 3, 3  # characters of a value; columns of cells before the first value
    columns = rng.randint(between(level, 1, 2), (page.cols - first + 1) // (width + 1))
    spacing = rng.choice((1, 2))
    deepest = min(between(level, 3, 7), (page.rows - 1) // spacing)
    depth = rng.randint(min(between(level, 1, 3), deepest), deepest)
    top = rng.randint(0, page.rows - 1 - depth * spacing)
    left = rng.randint(0, page.cols - first - columns * (width + 1) + 1)
    names = rng.sample(pool, depth + columns)
    for i, name in enumerate(names[depth:]):
        page.write(top, left + first + i * (width + 1), name)
    found = []
    for j, row_name in enumerate(names[:depth]):
        row = top + (j + 1) * spacing
        name_cells = page.write(row, left, row_name)
        for i, column_name in enumerate(names[depth:]):
            value = make_value(rng, width)
            cells = page.write(row, left + first + i * (width + 1), value)
            found.append((row_name, column_name, Entry(page, row_name, value, name_cells, cells)))
    return found
