"""Seeded items of the visual tasks: pictures, a question, its answer and where it is read.

The same arguments give the same item on every machine, and splits never share a random stream.
"""

import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.accuracy import document, reading
from benchmarks.accuracy.glyphs import CELL, MAX_JITTER, draw
from benchmarks.accuracy.scene import Cell, Fact, Manner, Page
from benchmarks.command import check_known

TASKS = {"document": document, "reading": reading}
SPLITS = ("train", "tune", "test", "report")
VARIANTS = {"plain": 0.55, "two pictures": 0.15, "question first": 0.15, "multi-turn": 0.15}
"""How often each occurs where none is asked for."""

SHAPES = {"square": (2, 2), "wide": (1, 2), "tall": (2, 1)}
"""Tiles down and across. One picture is square, so that every prompt has 300 tokens or more."""

PAIR_SHARES = {"square": 0.2, "wide": 0.4, "tall": 0.4}
"""Shapes of the pictures where there are two, drawn for each of them."""

IMAGE = "<image>"

VOCABULARY_WORDS = sorted(
    {
        word
        for family in (document, reading)
        for text in (*family.WORDING.texts, reading.DIRECTION, "row", "in the first second picture")
        for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", text))
    }
)
"""Every word of the questions and answers; names and values are spelt with single characters."""


@dataclass(frozen=True)
class Item:
    """A picture or two and a question about them.

    Attributes:
        task: a key of `TASKS`.
        images: uint8 `[height, width, 3]` each, read-only.
        prompt: the user's text. `<image>` stands where a picture goes; in a conversation of
            several turns the pictures are in the first one.
        turns: earlier (user's text, answer) of the same conversation.
        answer: what is to be answered to `prompt`.
        cells: for each picture int16 `[rows, cols]`: the place in `glyphs.CHARACTERS` of what is
            drawn in each cell, or `glyphs.EMPTY`.
        evidence: (picture, row, column) of the cells that the answer is read from, in its order.
    """

    task: str
    images: tuple[np.ndarray, ...]
    prompt: str
    turns: tuple[tuple[str, str], ...]
    answer: str
    cells: tuple[np.ndarray, ...]
    evidence: tuple[Cell, ...]


def make_item(task: str, seed: int, **options: Any) -> Item:
    """Make one item: the first of `questions_of_one_picture`, which has the same options."""
    return questions_of_one_picture(task, seed, 1, **options)[0]


def questions_of_one_picture(
    task: str,
    seed: int,
    count: int = 16,
    *,
    split: str = "train",
    level: float = 1.0,
    jitter: int = 2,
    variant: str | None = None,
    shape: str | None = None,
    manner: Manner = "full",
    tile: int = 112,
) -> list[Item]:
    """Make several items about the same pictures.

    Args:
        task: a key of `TASKS`.
        seed: which item of the split.
        count: items. They differ in what they ask; where a picture has fewer questions than that,
            the later ones ask the same again.
        split: one of `SPLITS`: to train, to choose settings, to test while training, to report.
        level: of the curriculum: 0 for few and short lines, 1 for all.
        jitter: pixels by which a glyph may lie off its cell in each direction, 0 to 4.
        variant: a key of `VARIANTS`, which says how often each occurs if None. All items have it.
        shape: a key of `SHAPES` for every picture; None for square ones, mixed if there are two.
        manner: how a question is put; a full one is brief where there are several turns.
        tile: pixels of a tile's side, at least 112; pictures have one or two tiles a side.

    Raises:
        ValueError: an argument is none of those named here.
    """
    check_known("task", [task], TASKS)
    check_known("split", [split], SPLITS)
    check_known("variant", [variant or "plain"], VARIANTS)
    check_known("shape", [shape or "square"], SHAPES)
    check_numbers(seed, count, level, jitter, tile=tile, least=112)

    def stream(use: str) -> random.Random:
        return random.Random(f"{split}/{task}/{seed}/{use}")

    rng = stream("scene")
    variant = variant or rng.choices(list(VARIANTS), list(VARIANTS.values()))[0]
    shapes = ["square"]
    if variant == "two pictures":
        shapes = rng.choices(list(PAIR_SHARES), list(PAIR_SHARES.values()), k=2)
    grids = [SHAPES[shape or each] for each in shapes]
    sizes = [(down * tile, across * tile) for down, across in grids]
    pages = [
        Page(index, (height // CELL, width // CELL), len(sizes))
        for index, (height, width) in enumerate(sizes)
    ]
    facts = TASKS[task].write(rng, pages, level)
    brush = stream("picture")
    images = tuple(
        draw(page.cells, size, brush, jitter=jitter)
        for page, size in zip(pages, sizes, strict=True)
    )
    cells = tuple(page.cells for page in pages)
    for table in cells:
        table.flags.writeable = False

    if variant == "multi-turn" and manner == "full":
        manner = "brief"
    rng, asked, items = stream("questions"), [], []
    for _ in range(count):
        fact, text = _new_question(task, facts, rng, manner, asked)
        asked.append(fact)
        marks, turns = IMAGE * len(images), ()
        prompt = f"{text} {marks}" if variant == "question first" else f"{marks}{text}"
        if variant == "multi-turn":
            earlier, first = _new_question(task, facts, rng, "brief", [fact])
            prompt, turns = text, ((f"{marks}{first}", earlier.answer),)
        items.append(Item(task, images, prompt, turns, fact.answer, cells, fact.evidence))
    return items


def check_numbers(
    seed: int, count: int, level: float, jitter: int, *, least: int, **size: int
) -> None:
    """Refuse what no item can be made of; `size` is named, and is `least` or more.

    Raises:
        ValueError: a number is out of its bounds.
    """
    [(name, value)] = size.items()
    sound = seed >= 0 and count >= 1 and 0 <= level <= 1 and 0 <= jitter <= MAX_JITTER
    if not sound or value < least:
        raise ValueError(
            f"{seed=}, {count=}, {level=}, {jitter=}, {name}={value}: a seed is 0 or more, a count "
            f"1 or more, a level 0 to 1, jitter 0 to {MAX_JITTER}, a {name} {least} or more"
        )


def _new_question(
    task: str, facts: list[Fact], rng: random.Random, manner: Manner, asked: list[Fact]
) -> tuple[Fact, str]:
    """A question about a fact that was not asked for yet, if one is found soon."""
    for _ in range(21):
        fact = rng.choice(facts)
        text = TASKS[task].WORDING.put(rng, manner, **fact.fields)
        if fact not in asked:
            break
    return fact, text
