"""Answers found from the cells and the words of a question alone, without the generators."""

import hashlib
import re

import numpy as np

from benchmarks.accuracy.glyphs import CLASSES
from benchmarks.accuracy.tasks import Item

ZONES = [
    ["at the top left", "at the top", "at the top right"],
    ["at the left", "in the middle", "at the right"],
    ["at the bottom left", "at the bottom", "at the bottom right"],
]
COLOURS = "red|green|blue|yellow|purple|grey"
PLURALS = {
    "circles": "circle", "squares": "square", "triangles": "triangle", "stars": "star",
    "crosses": "cross", "rings": "ring",
}  # fmt: skip
WHERE = r" in the (first|second) picture"

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
    grids = [[[CLASSES[i] if i >= 0 else " " for i in row] for row in table] for table in cells]
    solver = {"document": document, "reading": reading, "caption": caption}.get(task)
    if solver is None:
        return reasoning(grids, question)
    return solver(grids[_picture(question)], question)


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


def reasoning(grids: list[Grid], question: str) -> str:
    shapes = re.findall(rf"({COLOURS}) ({'|'.join(PLURALS)})", question)
    if shapes:
        drawn = [name for line in grids[_picture(question)] for name in line]
        return ", ".join(str(drawn.count(f"{colour} {PLURALS[form]}")) for colour, form in shapes)
    numbers = [{name: int(value) for name, value in lines_of(grid).items()} for grid in grids]
    here = numbers[_picture(question)]
    extreme = re.search("largest|smallest", question)
    if extreme:
        name = (max if extreme[0] == "largest" else min)(here, key=lambda name: here[name])
        return f"{name} {here[name]}"
    named = re.findall(rf"\b([A-Z]{{2}})\b(?:{WHERE})?", question)
    options = re.findall(r"\b([A-D]): (\d+)", question)
    if options:
        ((name, _),) = named
        (letter,) = (letter for letter, number in options if int(number) == here[name])
        return f"{letter} {here[name]}"
    (a, in_a), (b, in_b) = named
    first, second = numbers[(in_a or in_b) == "second"][a], numbers[in_b == "second"][b]
    return f"{first} + {second} = {first + second}"


def caption(grid: Grid, question: str) -> str:
    part = re.search("(upper|central|lower|left|right) part", question)
    colour = re.search(rf"\b({COLOURS}) shapes", question)  # not of "coloured shapes"
    form = re.search("|".join(PLURALS), question)
    phrases = {}
    for i, line in enumerate(grid):
        for j, name in enumerate(line):
            down, across = int(3 * (i + 0.5) / len(grid)), int(3 * (j + 0.5) / len(line))
            bands = ["upper", "central", "lower"][down], ["left", "", "right"][across]
            if (
                name == " "
                or (part and part[1] not in bands)
                or (colour and not name.startswith(colour[1]))
                or (form and not name.endswith(PLURALS[form[0]]))
            ):
                continue
            assert (down, across) not in phrases
            phrases[down, across] = f"a {name} {ZONES[down][across]}"
    return ", ".join(phrases[zone] for zone in sorted(phrases))


def _picture(question: str) -> int:
    return int("second picture" in question)
