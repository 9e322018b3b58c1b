"""What stands on a page: blocks of lines, and what can be asked about them.

A block is a list of lines of at most so many cells, and its facts: questions with their answers and
where these are read. Every word that a question leads to stands once on the page, so that each has
one answer.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

_WORDS: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "words.json").read_text(encoding="utf-8")
)
_CAPITALS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O, which look like 1 and 0

KINDS: tuple[str, ...] = ("look up", "read", "which", "compare", "total", "present", "copy")
"""What questions ask for: a value by its name, a line, a name by its value, the larger of two,
their sum, whether something is there, a paragraph."""

MOST_LINES = 12
"""Of one block."""

_FAMILIES = {
    "form": ("labels",),
    "receipt": ("items",),
    "table": ("labels", "items"),
    "timetable": ("places",),
    "plot": ("items",),
    "prose": (),
}

Span = tuple[int, int, int]
"""(line, first column, columns) in a block."""


@dataclass(frozen=True)
class Fact:
    """What can be asked: the kind, the wording's name and fields, the answer, and where it stands.

    `evidence` is empty where the answer is not on the page in its own letters.
    """

    kind: str
    wording: str
    fields: dict[str, str]
    answer: str
    evidence: tuple[Span, ...] = ()


@dataclass
class Block:
    """Lines of text and their facts.

    Attributes:
        lines: of the same width or less.
        facts: what can be asked about them.
        bars: (line, first column, columns) that a bar is painted over.
    """

    lines: list[str]
    facts: list[Fact]
    bars: list[Span] = field(default_factory=list)


class Supply:
    """Words and values of one page, none of which is given twice."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self._left = {
            family: rng.sample(_WORDS[family], len(_WORDS[family]))
            for family in ("labels", "items", "places")
        }
        self._values: set[str] = set()

    def word(self, family: str) -> str:
        """A word of `labels`, `items` or `places`."""
        return self._left[family].pop()

    def blocks(self) -> list[str]:
        """The kinds of blocks for which enough words are left."""
        enough = {family: len(left) >= 2 * MOST_LINES for family, left in self._left.items()}
        return [kind for kind in BLOCKS if all(enough[family] for family in _FAMILIES[kind])]

    def new(self, make: Callable[[], str]) -> str:
        """What `make` draws, until it is something new."""
        while (value := make()) in self._values:
            pass
        self._values.add(value)
        return value

    def amount(self, most: int = 40) -> str:
        """A price, in quarters."""
        return self.new(lambda: f"{self.rng.randrange(1, most)}.{self.rng.choice(_CENTS)}")

    def value(self, widest: int) -> str:
        """What a form's field is filled with, at most so wide (8 or more)."""
        rng = self.rng
        makers: list[Callable[[], str]] = [
            lambda: str(rng.randrange(10, 10 ** rng.randint(2, 6))),
            lambda: f"{rng.randrange(1, 500)}.{rng.randrange(100):02}",
            lambda: f"{rng.randint(1, 28):02}.{rng.randint(1, 12):02}.{rng.randint(19, 32)}",
            lambda: f"{''.join(rng.choices(_CAPITALS, k=2))}-{rng.randrange(1000, 9999)}",
            lambda: rng.choice(_WORDS["adjectives"]),
            lambda: " ".join(rng.choice(_WORDS[each]) for each in ("adjectives", "nouns")),
            lambda: f"{rng.randint(0, 23):02}:{rng.randrange(0, 60, 5):02}",
            lambda: f"{rng.randrange(1, 99)} {rng.choice(_UNITS)}",
        ]

        def fitting() -> str:
            while len(text := rng.choice(makers)()) > widest:
                pass
            return text

        return self.new(fitting)


_CENTS = ("00", "25", "50", "75")
_UNITS = ("kg", "cm", "km", "days", "pieces", "%")


def form(supply: Supply, width: int, count: int) -> Block:
    """Lines `Label: value`."""
    lines, facts = [], []
    align = supply.rng.random() < 0.3
    labels = [supply.word("labels") for _ in range(count)]
    edge = max(map(len, labels)) + 2
    for line, label in enumerate(labels):
        column = edge if align else len(label) + 2
        value = supply.value(min(20, width - column))
        lines.append(f"{label}:".ljust(column) + value)
        spot = ((line, column, len(value)),)
        facts.append(Fact("look up", "field", {"name": label}, value, spot))
        facts.append(Fact("which", "field of", {"value": value}, label, ((line, 0, len(label)),)))
        if not align:
            whole = ((line, 0, len(lines[-1])),)
            facts.append(Fact("read", "line", {"name": label}, lines[-1], whole))
    facts += _present(supply, "labels", "an entry named", labels)
    return Block(lines, facts)


def receipt(supply: Supply, width: int, count: int) -> Block:
    """Items with prices at the right edge."""
    names = [supply.word("items") for _ in range(count)]
    prices = [supply.amount() for _ in names]
    room = min(width, max(map(len, names)) + supply.rng.randint(7, 14))
    lines = [
        name.ljust(room - len(price)) + price for name, price in zip(names, prices, strict=True)
    ]
    facts = []
    for line, (name, price) in enumerate(zip(names, prices, strict=True)):
        spot = ((line, room - len(price), len(price)),)
        facts.append(Fact("look up", "price", {"name": name}, price, spot))
        facts.append(Fact("which", "item of", {"value": price}, name, ((line, 0, len(name)),)))
    facts += _pairs(supply.rng, names, prices, "more", "together")
    facts += _present(supply, "items", "the item", names)
    return Block(lines, facts)


def table(supply: Supply, width: int, count: int) -> Block:
    """Names with two or three columns of whole numbers, each column under its head."""
    rng = supply.rng
    names = [supply.word("items") for _ in range(count)]
    room = max(map(len, names)) + 1
    heads: list[str] = []
    for _ in range(3):
        if room + sum(len(head) + 1 for head in heads) + 10 <= width:
            heads.append(supply.word("labels"))
    lines, facts, at, ends = [" " * room], [], room, []
    for head in heads:
        at += max(len(head), 4) + 1
        ends.append(at - 1)
        lines[0] = lines[0].ljust(at - 1 - len(head)) + head
    columns = [[supply.new(lambda: str(rng.randrange(2, 400))) for _ in names] for _ in heads]
    for row, name in enumerate(names):
        line = name
        for column, end in zip(columns, ends, strict=True):
            line = line.ljust(end - len(column[row])) + column[row]
        lines.append(line)
        for head, column, end in zip(heads, columns, ends, strict=True):
            value = column[row]
            spot = ((row + 1, end - len(value), len(value)),)
            facts.append(Fact("look up", "cell", {"name": name, "head": head}, value, spot))
            place = ((row + 1, 0, len(name)),)
            facts.append(Fact("which", "row of", {"value": value, "head": head}, name, place))
    for head, column in zip(heads, columns, strict=True):
        facts += _pairs(rng, names, column, "larger", "sum", head=head)
    facts += _present(supply, "items", "a row for", names)
    return Block(lines, facts)


def timetable(supply: Supply, width: int, count: int) -> Block:
    """Lines `08:15  Harbour  3`: time, where to, platform."""
    rng = supply.rng
    places = [supply.word("places") for _ in range(count)]
    times = sorted(
        supply.new(lambda: f"{rng.randint(5, 23):02}:{rng.randrange(60):02}") for _ in places
    )
    edge = max(map(len, places)) + 8
    lines, facts = [], []
    for line, (time, place) in enumerate(zip(times, places, strict=True)):
        track = str(rng.randint(1, 18))
        lines.append(f"{time}  {place}".ljust(edge) + track)
        fields = {"name": place}
        facts.append(Fact("look up", "departure", fields, time, ((line, 0, 5),)))
        facts.append(Fact("look up", "track", fields, track, ((line, edge, len(track)),)))
        facts.append(Fact("which", "train of", {"value": time}, place, ((line, 7, len(place)),)))
    facts += _pairs(rng, places, times, "earlier", None)
    facts += _present(supply, "places", "a departure to", places)
    return Block(lines, facts)


def plot(supply: Supply, width: int, count: int) -> Block:
    """Names, bars as long as their values, and the values behind them."""
    names = [supply.word("items") for _ in range(count)]
    values = [supply.new(lambda: str(supply.rng.randrange(5, 100))) for _ in names]
    room = max(map(len, names)) + 1
    most = max(map(int, values))
    lines, facts, bars = [], [], []
    for line, (name, value) in enumerate(zip(names, values, strict=True)):
        length = max(1, int(value) * (width - room - 4) // most)
        bars.append((line, room, length))
        column = room + length + 1
        lines.append(name.ljust(column) + value)
        spot = ((line, column, len(value)),)
        facts.append(Fact("look up", "bar", {"name": name}, value, spot))
        facts.append(Fact("which", "bar of", {"value": value}, name, ((line, 0, len(name)),)))
    facts += _pairs(supply.rng, names, values, "longer", "bars")
    return Block(lines, facts, bars)


def prose(supply: Supply, width: int, count: int) -> Block:
    """A paragraph of so many lines, at least one sentence."""
    rng = supply.rng
    lines = [""]
    while len(lines) <= count:
        noun, other, third = (rng.choice(_WORDS["nouns"]) for _ in range(3))
        first, second = (rng.choice(_WORDS["adjectives"]) for _ in range(2))
        sentence = f"The {first} {noun} {rng.choice(_WORDS['verbs'])} the {other}"
        if rng.random() < 0.6:
            sentence += f" {rng.choice(_WORDS['links'])} the {second} {third}"
        before = list(lines)
        for word in f"{sentence}.".split():
            if len(lines[-1]) + 1 + len(word) > width:
                lines.append("")
            lines[-1] += f" {word}" if lines[-1] else word
        if len(lines) > count and before != [""]:
            lines = before
            break
    spots = tuple((line, 0, len(text)) for line, text in enumerate(lines))
    start = " ".join(lines[0].split()[:3])
    text = " ".join(lines)
    facts = [Fact("copy", "paragraph", {"start": start}, text, spots)]
    for line, text in enumerate(lines):
        head = text.split()[:3]
        if len(head) == 3:
            fields = {"start": " ".join(head)}
            facts.append(Fact("read", "text line", fields, text, spots[line : line + 1]))
    return Block(lines, facts)


BLOCKS = {
    "form": form,
    "receipt": receipt,
    "table": table,
    "timetable": timetable,
    "plot": plot,
    "prose": prose,
}

ASKED = {
    "look up": ("form", "receipt", "table", "timetable", "plot"),
    "read": ("form", "prose"),
    "which": ("form", "receipt", "table", "timetable", "plot"),
    "compare": ("receipt", "table", "timetable", "plot"),
    "total": ("receipt", "table", "plot"),
    "present": ("form", "receipt", "table", "timetable"),
    "copy": ("prose",),
}
"""The blocks that each kind of question is asked about."""


def _pairs(
    rng: random.Random,
    names: list[str],
    values: list[str],
    more: str,
    both: str | None,
    **fields: str,
) -> Iterator[Fact]:
    """Comparisons and sums of neighbours in a drawn order; `more` and `both` are their wordings."""
    order = rng.sample(range(len(names)), len(names))
    for i, j in pairwise(order):
        asked = {"one": names[i], "other": names[j], **fields}
        first, second = (_number(values[k]) for k in (i, j))
        larger = first < second if more == "earlier" else first > second
        yield Fact("compare", more, asked, names[i] if larger else names[j])
        if both is not None:
            total = first + second
            hundredths = "." in values[i]
            text = f"{total // 100}.{total % 100:02}" if hundredths else str(total)
            yield Fact("total", both, asked, text)


def _number(text: str) -> int:
    """A whole number, a price in hundredths, or a time in hundredths of an hour's digits."""
    return int(text.replace(".", "").replace(":", ""))


def _present(supply: Supply, family: str, what: str, names: list[str]) -> Iterator[Fact]:
    """Questions for what is there, and as many for what is not."""
    for name in names:
        yield Fact("present", "is there", {"what": what, "name": name}, "yes")
        absent = supply.word(family) if supply.rng.random() < 0.5 else None
        if absent is not None:
            yield Fact("present", "is there", {"what": what, "name": absent}, "no")
