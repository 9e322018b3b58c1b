"""`document`: look a value up by its key, as in DocVQA."""

import random
from collections.abc import Sequence

from benchmarks.accuracy.glyphs import DIGITS, LETTERS
from benchmarks.accuracy.scene import Fact, Page, Wording, between

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


def write(rng: random.Random, pages: Sequence[Page], level: float) -> list[Fact]:
    """Write lines like `KQ: 4821`; values are digits alone or digits and letters, half and half.

    All pages choose their names from the same few, so that with two pictures a name is often in
    both, with another value.

    Args:
        rng: where every choice comes from.
        pages: empty ones.
        level: 0 for 2 to 4 short lines, 1 for 4 to 8 in each column.
    """
    names: dict[str, None] = {}
    while len(names) < 20:
        names[rng.choice(LETTERS) + rng.choice(LETTERS)] = None
    facts = []
    for page in pages:
        if page.cols >= 16:
            rng.random()  # it once decided for a table: items stay as they were
        facts += _write_lines(rng, page, list(names), level)
    return facts


def _write_lines(rng: random.Random, page: Page, pool: Sequence[str], level: float) -> list[Fact]:
    """Write lines below one another in one or two columns.

    At level 0 half of the pages start in the corner with wide spacing, at level 1 none does.
    """
    in_corner = rng.random() < 0.5 * (1 - level)
    columns = 2 if page.cols >= 16 and rng.random() < 0.3 * level else 1
    gap = 1 if in_corner else rng.randrange(2)
    most = min((page.cols - columns + 1) // columns - 3 - gap, between(level, 3, 6))
    spacing = 2 if in_corner else rng.choice((1, 2))
    deepest = min(between(level, 4, 8), (page.rows + spacing - 1) // spacing)
    fewest = min(between(level, 2, 4), deepest)
    count = rng.randint(fewest, deepest * columns)
    names = rng.sample(pool, count)
    values = []
    for _ in names:
        length = rng.randint(between(level, 2, 3), most)
        alphabet = DIGITS if rng.random() < 0.5 else DIGITS + LETTERS
        values.append("".join(rng.choices(alphabet, k=length)))

    depth = -(-count // columns)
    width = 3 + gap + max(map(len, values))
    stride = width + 1
    free_rows = page.rows - 1 - (depth - 1) * spacing
    free_cols = page.cols - width - (columns - 1) * stride
    top, left = (0, 0) if in_corner else (rng.randint(0, free_rows), rng.randint(0, free_cols))
    facts = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        row, col = top + i % depth * spacing, left + i // depth * stride
        page.write(row, col, name + ":")
        cells = page.write(row, col + 3 + gap, value)
        facts.append(Fact({"key": name, "where": page.where}, value, cells))
    return facts
