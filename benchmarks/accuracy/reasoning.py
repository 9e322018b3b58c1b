"""`reasoning`: the largest number, a sum, a choice, a count, as in MathVista.

Answers name what they were found from (`37 + 45 = 82`), so that each needs several patches.
"""

import random
from collections.abc import Sequence

from benchmarks.accuracy.glyphs import COLOURS, SHAPES
from benchmarks.accuracy.scene import (
    Cell,
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

COUNT_SHARE = 0.3  # of the scenes; in the others the questions are about numbers
NUMBER_KINDS = ("extreme", "sum", "choice")  # equally often

_NUMBERS = (
    "You are given a list of names, and each of them has a number.",
    "The page shows how many points each of several teams has.",
    "This is a bill with the price of every item.",
    "You see a page of numbers, each of them behind a short name.",
)
_SHAPES = (
    "You are given a picture with coloured shapes on plain paper.",
    "Several small shapes in different colours are spread over the page.",
    "Shapes of the same colour or of the same form can occur more than once.",
)
EXTREME = Wording(
    _NUMBERS,
    (
        "Which name has the {extreme} number {where}, and what is that number?",
        "Compare all numbers {where}; which of the names comes with the {extreme} one?",
        "Find the {extreme} number {where} together with its name.",
    ),
    (
        "Answer with the name and its number.",
        "Give first the name and then the number, without any other words.",
        "Write the name, a space and the number, and nothing else.",
    ),
)
SUM = Wording(
    _NUMBERS,
    (
        "What is the sum of the numbers of {first} and {second}?",
        "Take the number of {first}, add the number of {second}; how much is it?",
        "How much are the numbers of {first} and {second} together?",
    ),
    (
        "Answer with the full sum.",
        "Write both numbers with a plus between them, then the result.",
        "Give the two numbers and their sum as an equation, without any other words.",
    ),
)
CHOICE = Wording(
    _NUMBERS,
    (
        "Which of these is the number of {key} {where}? {options}",
        "Choose the number that belongs to {key} {where}: {options}",
        "What is the number behind the name {key} {where}? {options}",
    ),
    (
        "Answer with the letter and the number.",
        "Answer with the letter of the right option, followed by its number.",
        "Choose the correct option and write its letter and then its number.",
    ),
)
COUNT = Wording(
    _SHAPES,
    (
        "How many {first} and how many {second} are there {where}?",
        "Count the {first} {where}, then count the {second}.",
        "What is the number of {first} and the number of {second} {where}?",
    ),
    (
        "Answer with both numbers in this order.",
        "Give the two numbers in the order of the question, with a comma between them.",
        "Write the first number, a comma and the second number, and nothing else.",
    ),
)
EXTREMES = ("largest", "smallest")
PLURALS = tuple("crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES)
TEXTS = (*EXTREME.texts, *SUM.texts, *CHOICE.texts, *COUNT.texts, *EXTREMES, *PLURALS)


class Reasoning:
    """Lists of names and numbers, or pages of coloured shapes to be counted."""

    def __init__(self, rng: random.Random, sizes: Sequence[tuple[int, int]], level: float):
        self.pages = make_pages(sizes)
        self._entries: list[list[Entry]] = []
        self._counts: list[dict[str, tuple[Cell, ...]]] = []
        if rng.random() < COUNT_SHARE:
            self._counts = [_spread_shapes(rng, page, level) for page in self.pages]
            return
        pool = make_names(rng, 20)
        for page in self.pages:
            numbers = _different_numbers(rng, level)
            self._entries.append(
                write_lines(rng, page, pool, lambda most, it=numbers: it.pop(), level)
            )

    def ask(self, rng: random.Random, manner: Manner) -> Question:
        """A random question of the kinds that the scene allows."""
        page = rng.randrange(len(self.pages))
        if self._counts:
            return self._ask_count(rng, manner, page)
        kind = rng.choice(NUMBER_KINDS)
        if kind == "extreme":
            return self._ask_extreme(rng, manner, page)
        return (self._ask_sum if kind == "sum" else self._ask_choice)(rng, manner, page)

    def _ask_extreme(self, rng: random.Random, manner: Manner, page: int) -> Question:
        extreme = rng.choice(EXTREMES)
        choose = max if extreme == "largest" else min
        entry = choose(self._entries[page], key=lambda entry: int(entry.value))
        text = EXTREME.put(rng, manner, extreme=extreme, where=entry.page.where)
        answer = f"{entry.name} {entry.value}"
        return Question(text, answer, entry.name_cells + entry.value_cells)

    def _ask_sum(self, rng: random.Random, manner: Manner, page: int) -> Question:
        """The sum of two numbers; of two pictures, one number from each in half of the cases."""
        a, b = rng.sample(self._entries[page], 2)
        if len(self.pages) == 2 and rng.random() < 0.5:
            b = rng.choice(self._entries[1 - page])
        first = a.name if a.page is b.page else f"{a.name} {a.page.where}"
        text = SUM.put(rng, manner, first=first, second=f"{b.name} {b.page.where}")
        answer = f"{a.value} + {b.value} = {int(a.value) + int(b.value)}"
        return Question(text, answer, a.value_cells + b.value_cells)

    def _ask_choice(self, rng: random.Random, manner: Manner, page: int) -> Question:
        """The wrong options are two or three other numbers of the same page."""
        entries = self._entries[page]
        options = rng.sample(entries, min(4 if manner == "full" else 3, len(entries)))
        right = rng.randrange(len(options))
        entry = options[right]
        listed = " ".join(f"{'ABCD'[i]}: {o.value}" for i, o in enumerate(options))
        text = CHOICE.put(rng, manner, key=entry.name, where=entry.page.where, options=listed)
        return Question(text, f"{'ABCD'[right]} {entry.value}", entry.value_cells)

    def _ask_count(self, rng: random.Random, manner: Manner, page: int) -> Question:
        counts = self._counts[page]
        first, second = rng.sample(sorted(counts), 2)
        text = COUNT.put(
            rng, manner, first=_plural(first), second=_plural(second), where=self.pages[page].where
        )
        answer = f"{len(counts[first])}, {len(counts[second])}"
        return Question(text, answer, counts[first] + counts[second])


def _different_numbers(rng: random.Random, level: float) -> list[str]:
    """Numbers without leading zeros, enough for a page: the largest of them is one alone."""
    numbers = range(between(level, 1, 10), between(level, 20, 100))
    return [str(number) for number in rng.sample(numbers, 16)]


def _spread_shapes(rng: random.Random, page: Page, level: float) -> dict[str, tuple[Cell, ...]]:
    """Put 1 to 5 of each of some kinds of shapes on a page; the cells of each kind."""
    kinds = rng.sample(
        [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES],
        rng.randint(2, between(level, 2, 5)),
    )
    counts = [rng.randint(1, between(level, 3, 5)) for _ in kinds]
    places = rng.sample(range(page.rows * page.cols), sum(counts))
    found = {}
    for kind, count in zip(kinds, counts, strict=True):
        chosen = sorted(places.pop() for _ in range(count))
        found[kind] = tuple(page.put(*divmod(place, page.cols), kind) for place in chosen)
    return found


def _plural(kind: str) -> str:
    colour, shape = kind.split()
    return f"{colour} {PLURALS[SHAPES.index(shape)]}"
