"""Answers found from the cells and the words of a question alone, without the generators."""

import hashlib
import re

import numpy as np

from benchmarks.accuracy.glyphs import CHARACTERS
from benchmarks.accuracy.tasks import Item

Grid = list[list[str]]


def digest(item: Item, pictures: bool = True) -> str:
    """All of an item, with or without its pixels."""
    texts = (item.task, item.prompt, item.turns, item.answer, item.evidence)
    found = hashlib.sha256(repr(texts).encode())
    for table, image in zip(item.cells, item.images, strict=True):
        found.update(table.tobytes())
        if pictures:
            found.update(image.tobytes())
    return found.hexdigest()


def questions(item: Item) -> list[tuple[str, str]]:
    """What the user says in each turn, and the right answer."""
    return [*item.turns, (item.prompt, item.answer)]


def solve(task: str, cells: tuple[np.ndarray, ...], question: str) -> str:
    """The answer to a question of a task."""
    table = cells[int("second picture" in question)]
    grid = [[CHARACTERS[i] if i >= 0 else " " for i in row] for row in table]
    return {"document": document, "reading": reading}[task](grid, question)


def document(grid: Grid, question: str) -> str:
    (key,) = re.findall(r"\b[A-Z]{2}\b", question)
    return lines_of(grid)[key]


def lines_of(grid: Grid) -> dict[str, str]:
    """Values by name of all `KQ: 4821` on a page."""
    found = {}
    for line in grid:
        for name, value in re.findall(r"([A-Z]{2}): ?([0-9A-Z]+)", "".join(line)):
            assert name not in found
            found[name] = value
    return found


def reading(grid: Grid, question: str) -> str:
    match = re.search(r"(row|column) ([0-9A-Z])\b", question)
    assert match
    kind, label = match.groups()
    table = np.array(grid)
    table = table[(table != " ").any(1)][:, (table != " ").any(0)]
    if kind == "column":
        table = table.T
    return "".join(next(line[1:] for line in table[1:] if line[0] == label))
