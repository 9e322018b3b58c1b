"""`caption`: list the coloured shapes and where they are, in reading order, as in COCO-Caption."""

import random
from collections.abc import Callable, Sequence

from benchmarks.accuracy.glyphs import COLOURS, SHAPES
from benchmarks.accuracy.reasoning import PLURALS
from benchmarks.accuracy.scene import Cell, Manner, Page, Question, Wording, between, make_pages

WHOLE_SHARE = 0.7  # of the questions that stand alone; the others ask about a part

ZONES = (
    "at the top left", "at the top", "at the top right",
    "at the left", "in the middle", "at the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
BANDS = {
    "upper": (0, 1, 2), "central": (3, 4, 5), "lower": (6, 7, 8),
    "left": (0, 3, 6), "right": (2, 5, 8),
}  # fmt: skip

_CONTEXTS = (
    "You are given a picture with a few coloured shapes on plain paper.",
    "Some small shapes were put on a sheet, each of them in one colour.",
    "The paper shows several forms in different colours and places.",
)
_FORMATS = (
    "Name each colour, shape and place.",
    "Answer in one sentence, with the colour, the shape and the place of each of them.",
    "List them in reading order, each with its colour, its form and where it is.",
)
WHOLE = Wording(
    _CONTEXTS,
    (
        "Describe all that can be seen {where}, line by line from the top.",
        "What is there {where}, from top to bottom and from left to right?",
        "Give a short description of everything {where}.",
    ),
    _FORMATS,
)
PART = Wording(
    _CONTEXTS,
    (
        "Describe only the {part}.",
        "Which are the {part}, and where is each of them?",
        "Leave out everything but the {part}.",
    ),
    _FORMATS,
)
TEXTS = (
    *WHOLE.texts, *PART.texts, *ZONES, *BANDS, "shapes in the part of",
    *COLOURS, *SHAPES, *PLURALS, "a",
)  # fmt: skip


class Caption:
    """Pages of 2 to 6 shapes, each in another ninth of the picture and away from its borders."""

    def __init__(self, rng: random.Random, sizes: Sequence[tuple[int, int]], level: float):
        self.pages = make_pages(sizes)
        self._shapes = [_place(rng, page, level) for page in self.pages]

    def ask(self, rng: random.Random, manner: Manner) -> Question:
        """Describe a whole page, or a part of it (always so unless full).

        A part has two or three shapes, so that several patches are read; one where there is no such
        part. In shorter questions it has one or two: they come in pairs, which must differ.
        """
        index = rng.randrange(len(self.pages))
        shapes, where = self._shapes[index], self.pages[index].where
        if manner == "full" and rng.random() < WHOLE_SHARE:
            return _question(WHOLE.put(rng, manner, where=where), shapes)
        parts = [
            part
            for part in _parts(shapes, where)
            if 1 <= len(part[1]) <= (3 if manner == "full" else 2)
        ]
        if manner == "full":
            parts = [part for part in parts if len(part[1]) > 1] or parts
        name, chosen = rng.choice(parts)
        return _question(PART.put(rng, manner, part=name), chosen)


Shape = tuple[int, str, Cell]
"""(zone, colour and form, cell)."""


def _place(rng: random.Random, page: Page, level: float) -> list[Shape]:
    count = rng.randint(between(level, 2, 3), between(level, 3, 6))
    shapes = []
    for zone in sorted(rng.sample(range(9), count)):
        kind = f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
        row = rng.choice(_inside(page.rows, zone // 3))
        col = rng.choice(_inside(page.cols, zone % 3))
        shapes.append((zone, kind, page.put(row, col, kind)))
    return shapes


def _inside(count: int, third: int) -> list[int]:
    """The lines of one third that nobody would count to another one."""
    places = ((i, 3 * (i + 0.5) / count - third) for i in range(count))
    return [i for i, place in places if 0.2 <= place <= 0.8]


def _parts(shapes: list[Shape], where: str) -> list[tuple[str, list[Shape]]]:
    """Every way of naming a part of the shapes, with the shapes that are meant."""

    def those(test: Callable[[Shape], bool]) -> list[Shape]:
        return [shape for shape in shapes if test(shape)]

    parts = [
        (
            f"shapes in the {band} part {where.replace('in', 'of', 1)}",
            those(lambda shape, zones=zones: shape[0] in zones),
        )
        for band, zones in BANDS.items()
    ]
    for colour in COLOURS:
        chosen = those(lambda shape, colour=colour: shape[1].split()[0] == colour)
        parts.append((f"{colour} shapes {where}", chosen))
    for plural, form in zip(PLURALS, SHAPES, strict=True):
        chosen = those(lambda shape, form=form: shape[1].split()[1] == form)
        parts.append((f"{plural} {where}", chosen))
    return parts


def _question(text: str, shapes: list[Shape]) -> Question:
    answer = ", ".join(f"a {kind} {ZONES[zone]}" for zone, kind, _ in shapes)
    return Question(text, answer, tuple(cell for _, _, cell in shapes))
