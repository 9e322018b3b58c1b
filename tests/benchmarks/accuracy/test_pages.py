"""The pages: seeded, readable, with one right answer to each question."""

import hashlib
import random

import numpy as np
import pytest

from benchmarks.accuracy.glyphs import CELL
from benchmarks.accuracy.pages import (
    ASKED,
    KINDS,
    SHAPES,
    TILE_CELLS,
    make_page_item,
    questions_of_one_page,
)
from benchmarks.accuracy.pages.content import BLOCKS, MOST_LINES, Supply
from benchmarks.accuracy.pages.drawing import CHARACTERS, atlas, draw_page
from benchmarks.accuracy.pages.wording import WORDINGS
from benchmarks.accuracy.tasks import IMAGE, SPLITS
from tests.benchmarks.accuracy.page_solver import solve

ALL = dict.fromkeys(KINDS, 1.0)


def digest(items):
    found = hashlib.sha256()
    for item in items:
        found.update(repr((item.task, item.prompt, item.turns, item.answer)).encode())
        for array in (*item.images, *item.cells):
            found.update(array.tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("variant", ["plain", "two pictures", "multi-turn"])
def test_an_independent_solver_agrees(variant, level):
    asked = 0
    for seed in range(6):
        for item in questions_of_one_page(ALL, seed, 24, level=level, variant=variant):
            for question, answer in (*item.turns, (item.prompt, item.answer)):
                assert solve(item.cells, question.replace(IMAGE, "")) == answer, question
                asked += 1
    assert asked == 6 * 24 * (1 + (variant == "multi-turn"))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_asked_and_its_evidence_is_the_answer(kind):
    for seed in range(4):
        item = make_page_item(kind, seed, split="test", level=0.5, variant="plain")
        assert item.task == kind
        assert solve(item.cells, item.prompt.replace(IMAGE, "")) == item.answer
        shown = "".join(
            CHARACTERS[item.cells[picture][row, column]]
            for picture, row, column in item.evidence
            if item.cells[picture][row, column] >= 0
        )
        assert shown == (
            "" if kind in ("compare", "total", "present") else item.answer.replace(" ", "")
        )


def test_the_same_seed_is_the_same_page_and_splits_differ():
    first = questions_of_one_page(ALL, 3, 2)
    assert digest(first) == digest(questions_of_one_page(ALL, 3, 2))
    digests = {digest(questions_of_one_page(ALL, 3, 2, split=split)) for split in SPLITS}
    assert len(digests) == len(SPLITS)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_page_has_whole_tiles_and_mostly_empty_patches(shape):
    items = [make_page_item("look up", seed, shape=shape, variant="plain") for seed in range(12)]
    down, across = SHAPES[shape]
    for item in items:
        assert item.images[0].shape == (336 * down, 336 * across, 3)
        assert item.cells[0].shape == (TILE_CELLS * down, TILE_CELLS * across)
        assert not item.images[0].flags.writeable
    filled = [(item.cells[0] >= 0).mean() for item in items]
    assert 0.15 < np.median(filled) < 0.5


def test_easy_pages_are_short():
    easy, hard = (
        np.mean([(make_page_item("look up", s, level=level).cells[0] >= 0).sum() for s in range(8)])
        for level in (0.0, 1.0)
    )
    assert easy < 90 < 4 * easy < hard


def test_a_glyph_lies_within_the_jitter_of_its_cell():
    cells = np.full((24, 24), -1, np.int16)
    cells[4, 7] = CHARACTERS.index("W")
    for seed in range(20):
        page = draw_page(cells, [], random.Random(seed), jitter=2, plain=True).astype(int)
        changed = np.abs(page - page[0, 0]).sum(axis=-1) > 0
        rows, columns = np.nonzero(changed)
        assert rows.size > 10
        assert rows.min() >= 4 * CELL - 2
        assert rows.max() < 5 * CELL + 2
        assert columns.min() >= 7 * CELL - 2
        assert columns.max() < 8 * CELL + 2


def test_characters_look_different():
    styles = atlas().astype(int)
    assert styles.shape[1:] == (len(CHARACTERS), CELL, CELL)
    for style in styles:
        flat = style.reshape(len(CHARACTERS), -1)
        distance = np.abs(flat[:, None] - flat[None]).sum(-1)
        assert (distance + np.eye(len(CHARACTERS)) * 10**6).min() > 0


def test_every_wording_belongs_to_a_fact():
    used = set()
    for kind in BLOCKS:
        supply = Supply(random.Random(0))
        block = BLOCKS[kind](supply, 40, MOST_LINES)
        assert max(map(len, block.lines)) <= 40
        for fact in block.facts:
            assert fact.kind in KINDS
            assert kind in ASKED[fact.kind]
            used.add(fact.wording)
            for line, at, length in fact.evidence:
                assert len(block.lines[line][at : at + length]) == length
    for seed in range(4):  # a form is aligned or has lines to read
        supply = Supply(random.Random(seed))
        used |= {fact.wording for fact in BLOCKS["form"](supply, 40, 4).facts}
    assert used == set(WORDINGS)


@pytest.mark.parametrize(
    "change",
    [
        {"kinds": {"guess": 1.0}},
        {"split": "dev"},
        {"variant": "upside down"},
        {"shape": "round"},
        {"seed": -1},
        {"count": 0},
        {"level": 1.5},
        {"jitter": 9},
        {"side": 10},
    ],
)
def test_impossible_arguments(change):
    with pytest.raises(ValueError):
        questions_of_one_page(**({"kinds": ALL, "seed": 0} | change))
