"""Pages as people photograph them, and questions about them: seeded, with one right answer each.

`content` says what stands on a page, `wording` how it is asked for, `drawing` how it looks; an item
is the same `Item` as those of the small tasks.
"""

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks.accuracy.pages.content import ASKED, BLOCKS, KINDS, MOST_LINES, Block, Fact, Supply
from benchmarks.accuracy.pages.drawing import CHARACTERS, Box, draw_page
from benchmarks.accuracy.pages.wording import put
from benchmarks.accuracy.scene import Cell, Page
from benchmarks.accuracy.tasks import IMAGE, SPLITS, Item, check_numbers
from benchmarks.command import check_known

Placed = tuple[Fact, tuple[Cell, ...]]
"""A fact, and the cells that its answer is read from."""

TILE_CELLS = 24
"""Cells along a side of a tile: 336 pixels of 14."""

SHAPES = {"square": (2, 2), "tall": (3, 1), "wide": (1, 3), "half": (1, 2)}
"""Tiles down and across: 2,928, 2,376, 2,328 and 1,752 visual tokens."""

VARIANTS = {"plain": 0.8, "two pictures": 0.08, "multi-turn": 0.12}
"""How often each occurs where none is asked for."""


def questions_of_one_page(
    kinds: Mapping[str, float],
    seed: int,
    count: int = 12,
    *,
    split: str = "train",
    level: float = 1.0,
    jitter: int = 2,
    variant: str | None = None,
    shape: str | None = None,
    side: int = TILE_CELLS,
) -> list[Item]:
    """Make several items about the same page, or pair of pages.

    Args:
        kinds: kind of question (of `KINDS`) to its weight in the draw. The first question's kind
            is drawn from them; the others' from those that the page allows.
        seed: which item of the split.
        count: items.
        split: one of `SPLITS`.
        level: 0 for a page with one short block, 1 for full ones.
        jitter: pixels by which a glyph may lie off its cell in each direction.
        variant: a key of `VARIANTS`, which says how often each occurs if None.
        shape: a key of `SHAPES`; drawn if None, square half of the time.
        side: cells along a side of a tile.

    Raises:
        ValueError: an argument is none of those named here.
    """
    check_known("kind", list(kinds), KINDS)
    check_known("split", [split], SPLITS)
    check_known("variant", [variant or "plain"], VARIANTS)
    check_known("shape", [shape or "square"], SHAPES)
    check_numbers(seed, count, level, jitter, side=side, least=TILE_CELLS)
    name = ",".join(f"{kind}" for kind in sorted(kinds))
    rng = random.Random(f"{split}/pages/{name}/{seed}/scene")
    variant = variant or _draw(rng, VARIANTS)
    first = _draw(rng, kinds)
    pages, asked, images = [], [], []
    for index in range(2 if variant == "two pictures" else 1):
        tiles = SHAPES[shape or rng.choice((*SHAPES, "square", "square"))]
        size = tiles[0] * side, tiles[1] * side
        page = Page(index, size, 2 if variant == "two pictures" else 1, CHARACTERS)
        facts, bars = _fill(page, Supply(rng), first, level)
        brush = random.Random(f"{split}/pages/{name}/{seed}/picture {index}")
        images.append(draw_page(page.cells, bars, brush, jitter=jitter))
        page.cells.flags.writeable = False
        pages.append(page)
        asked += [(fact, index, cells) for fact, cells in facts]
    where = [f" {page.where}" if len(pages) > 1 else "" for page in pages]
    allowed = {
        kind: weight
        for kind, weight in kinds.items()
        if any(fact.kind == kind for fact, *_ in asked)
    }
    marks, used, items = IMAGE * len(pages), set(), []
    several = variant == "multi-turn"
    for number in range(count):
        kind = first if number == 0 else _draw(rng, allowed)
        at = _choose(rng, asked, kind, used)
        fact, index, cells = asked[at]
        text = put(fact, rng, where=where[index], brief=several)
        prompt, turns = f"{marks}{text}", ()
        if several:
            earlier, before, _ = asked[_choose(rng, asked, _draw(rng, allowed), {at})]
            opening = put(earlier, rng, where=where[before])
            prompt, turns = text, ((f"{marks}{opening}", earlier.answer),)
        shown = tuple(page.cells for page in pages)
        items.append(Item(kind, tuple(images), prompt, turns, fact.answer, shown, cells))
    return items


def make_page_item(kind: str, seed: int, **options: Any) -> Item:
    """One item of a kind: the first of `questions_of_one_page`, which has the same options."""
    return questions_of_one_page({kind: 1.0}, seed, 1, **options)[0]


def _draw(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _choose(
    rng: random.Random, asked: list[tuple[Fact, int, tuple[Cell, ...]]], kind: str, used: set[int]
) -> int:
    """A question of a kind, one that was not asked yet while there is one; it is then `used`."""
    fitting = [at for at, (fact, *_) in enumerate(asked) if fact.kind == kind]
    at = rng.choice([at for at in fitting if at not in used] or fitting)
    used.add(at)
    return at


def _fill(page: Page, supply: Supply, first: str, level: float) -> tuple[list[Placed], list[Box]]:
    """Write columns of blocks; one of them has a question of the kind `first`."""
    rng = supply.rng
    most = page.cols // TILE_CELLS
    columns = rng.randint(1, most) if rng.random() < level else 1
    stride = page.cols // columns
    width = stride - (3 if columns > 1 else 0)
    facts: list[Placed] = []
    bars: list[Box] = []
    for number, column in enumerate(rng.sample(range(columns), columns)):
        blocks = _blocks(supply, page.rows, width, "" if number else first, level)
        placed, painted = _place(page, blocks, column * stride, width, rng)
        facts += placed
        bars += painted
    # Two lines of prose may begin with the same words.
    times = Counter((fact.wording, *fact.fields.values()) for fact, _ in facts)
    return [each for each in facts if times[each[0].wording, *each[0].fields.values()] == 1], bars


def _blocks(supply: Supply, rows: int, width: int, first: str, level: float) -> list[Block]:
    """Blocks that fit below one another; the first has a question of the kind `first`, if named."""
    rng = supply.rng
    room = round(min(0.1 + 0.9 * level, 0.9) * rows)  # lines in all
    longest = round(3 + (MOST_LINES - 3) * level)
    blocks: list[Block] = []
    while not blocks or room > 3:
        kind = rng.choice(ASKED[first] if first and not blocks else supply.blocks())
        count = rng.randint(2, max(2, min(longest, room - 1)))
        block = BLOCKS[kind](supply, rng.randint(min(22, width), width), count)
        if blocks or not first or any(fact.kind == first for fact in block.facts):
            blocks.append(block)
            room -= len(block.lines) + 1
        if rng.random() < 0.2 * (1 - level) * len(blocks):
            break
    rng.shuffle(blocks)
    return blocks


def _place(
    page: Page, blocks: list[Block], left: int, width: int, rng: random.Random
) -> tuple[list[Placed], list[Box]]:
    """Write blocks below one another into a column of a page: where their facts and bars are."""
    facts, bars = [], []
    step = 1
    if rng.random() < 0.3 and sum(2 * len(block.lines) + 1 for block in blocks) < page.rows:
        step = 2  # an empty line behind each
    free = page.rows - sum(step * len(block.lines) + 1 for block in blocks)
    row = 0
    for block in blocks:
        skip = rng.randint(0, max(free, 0))
        row, free = row + skip, free - skip
        col = left + rng.randint(0, width - max(map(len, block.lines)))
        for line, text in enumerate(block.lines):
            for at, character in enumerate(text):
                if character != " ":
                    page.put(row + step * line, col + at, character)
        for fact in block.facts:
            cells = tuple(
                (page.index, row + step * line, col + at + i)
                for line, at, length in fact.evidence
                for i in range(length)
            )
            facts.append((fact, cells))
        bars += [(row + step * line, col + at, 1, length) for line, at, length in block.bars]
        row += step * len(block.lines) + 1
    return facts, bars
