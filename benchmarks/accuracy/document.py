"""`document`: look a value up by its key, as in DocVQA."""

import random
from collections.abc import Sequence

from benchmarks.accuracy.glyphs import DIGITS, LETTERS
from benchmarks.accuracy.scene import (
    Entry,
    Manner,
    Question,
    Wording,
    between,
    make_names,
    make_pages,
    write_lines,
)

WORDING = Wording(
    (
        "You are given a page with short names and a value for each of them.",
        "This is a form that was filled in by a machine.",
        "The page holds several entries, and each entry has its own value.",
        "You see a part of a printed record with keys and values.",
    ),
    (
        "What is the value that is written after the key {key} {where}?",
        "Find the line that begins with {key} {where}; what comes behind the colon?",
        "Which characters stand on the line of {key} {where}?",
        "Look for the entry named {key} {where} and read its value.",
    ),
    (
        "Answer with the value only.",
        "Give the value alone, without any other words.",
        "Answer the question using a single word or phrase.",
        "Write the characters of the value in their order and nothing else.",
    ),
)
TEXTS = (*WORDING.texts, "stands do along table")
"""Tables are not asked for, but the shipped tokenizer has the words."""


class Document:
    """Pages of `KQ: 4821` lines; values are digits alone or digits and letters, half and half.

    All pages choose their names from the same few, so that with two pictures a name is often in
    both, with another value.
    """

    def __init__(self, rng: random.Random, sizes: Sequence[tuple[int, int]], level: float):
        self.pages = make_pages(sizes)
        pool = make_names(rng, 20)
        self._lines: list[Entry] = []

        def value(most: int) -> str:
            longest = min(most, between(level, 3, 6))
            length = rng.randint(between(level, 2, 3), longest)
            alphabet = DIGITS if rng.random() < 0.5 else DIGITS + LETTERS
            return "".join(rng.choices(alphabet, k=length))

        for page in self.pages:
            if page.cols >= 16:
                rng.random()  # it once decided for a table: items stay as they were
            self._lines += write_lines(rng, page, pool, value, level)

    def ask(self, rng: random.Random, manner: Manner) -> Question:
        """The value of a random entry."""
        entry = rng.choice(self._lines)
        text = WORDING.put(rng, manner, key=entry.name, where=entry.page.where)
        return Question(text, entry.value, entry.value_cells)
