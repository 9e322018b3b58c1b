"""The visual tasks: repeatable, answerable from the picture, of the sizes that are promised."""

import hashlib
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.accuracy.glyphs import CELL, CHARACTERS, EMPTY
from benchmarks.accuracy.tasks import (
    SPLITS,
    TASKS,
    VARIANTS,
    VOCABULARY_WORDS,
    Item,
    make_item,
    questions_of_one_picture,
)
from tests.benchmarks.accuracy.solvers import digest, questions, solve
from tests.tiny import tiny_config
from vlcache_jax.models.llava.anyres import visual_rows

all_tasks = pytest.mark.parametrize("task", TASKS)
all_variants = pytest.mark.parametrize("variant", VARIANTS)

CONFIG = tiny_config("llava_next", 112, 14, pinpoints=((112, 224), (224, 112), (224, 224)))
TEMPLATE_TOKENS = 8  # what a chat template adds around a turn or two


def tokens(text: str) -> int:
    """Tokens of a small tokenizer: words, and single digits, capitals and signs."""
    return len(re.findall(r"[a-z]+|[^\sa-z]", text.replace("<image>", "")))


@all_tasks
def test_a_seed_gives_the_same_item_in_any_order(task):
    arguments = [(seed, split) for seed in range(12) for split in SPLITS]
    once = {a: digest(make_item(task, a[0], split=a[1])) for a in arguments}
    again = {a: digest(make_item(task, a[0], split=a[1])) for a in reversed(arguments)}
    assert once == again
    assert len(set(once.values())) == len(arguments)


def test_items_are_the_same_on_every_machine():
    """All but pixels, which are FreeType's.

    A change of the generators changes the figure, and the tasks are then no longer those of models
    that were trained before and of results about them.
    """
    found = hashlib.sha256()
    for task in TASKS:
        for variant in VARIANTS:
            for item in questions_of_one_picture(task, 7, 4, split="test", variant=variant):
                found.update(digest(item, pictures=False).encode())
    assert found.hexdigest()[:16] == "4449082d6f3f6918"


@all_tasks
def test_splits_have_no_picture_in_common(task):
    seen = Counter()
    for split in SPLITS:
        seen.update({make_item(task, s, split=split).cells[0].tobytes() for s in range(100)})
    assert max(seen.values()) == 1


@all_tasks
@all_variants
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_answers_are_those_of_an_independent_solver(task, variant, level):
    for seed in range(60):
        item = make_item(task, seed, level=level, variant=variant, split="tune")
        for question, answer in questions(item):
            assert solve(task, item.cells, question) == answer, (seed, question)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(TASKS)),
    st.integers(0, 2**63),
    st.sampled_from(SPLITS),
    st.floats(0, 1),
    st.sampled_from([None, "square", "wide", "tall"]),
    st.sampled_from([112, 115, 140, 168]),
)
def test_every_argument_gives_a_sound_item(task, seed, split, level, shape, tile):
    item = make_item(task, seed, split=split, level=level, shape=shape, tile=tile)
    assert solve(task, item.cells, item.prompt) == item.answer
    assert len(item.images) == len(item.cells) in (1, 2)
    for image, table in zip(item.images, item.cells, strict=True):
        assert image.dtype == np.uint8
        assert table.dtype == np.int16
        assert table.shape == (image.shape[0] // CELL, image.shape[1] // CELL)
        sides = {"square": (2, 2), "wide": (1, 2), "tall": (2, 1)}
        known = sides.values() if shape is None else [sides[shape]]
        assert image.shape in [(down * tile, across * tile, 3) for down, across in known]
        assert table.min() == EMPTY
        assert table.max() < len(CHARACTERS)


@all_tasks
def test_evidence_holds_the_glyphs_of_the_answer_in_its_order(task):
    for seed in range(150):
        item = make_item(task, seed)
        glyphs = [CHARACTERS[item.cells[image][row, col]] for image, row, col in item.evidence]
        assert "".join(glyphs) == item.answer


@all_tasks
def test_answers_at_full_level_need_several_patches(task):
    several = [len(set(make_item(task, seed, variant="plain").evidence)) for seed in range(200)]
    assert min(several) >= 2


@all_tasks
@all_variants
def test_prompts_are_long_and_mostly_visual(task, variant):
    for seed in range(60):
        item = make_item(task, seed, variant=variant, split="test")
        visual = sum(visual_rows(image.shape[:2], CONFIG).size for image in item.images)
        text = sum(tokens(question) for question, _ in questions(item))
        text += sum(tokens(answer) for _, answer in item.turns)
        assert visual + text > 330
        assert visual / (visual + text + TEMPLATE_TOKENS) >= 0.8
        assert 30 <= text <= 80


@all_tasks
def test_variants_are_what_they_say(task):
    for seed in range(20):
        items = {variant: make_item(task, seed, variant=variant) for variant in VARIANTS}
        assert items["plain"].prompt.startswith("<image>")
        assert not items["plain"].turns
        assert items["question first"].prompt.endswith(" <image>")
        two = items["two pictures"]
        assert two.prompt.startswith("<image><image>")
        assert len(two.images) == 2
        assert re.search("(first|second) picture", two.prompt)
        ((earlier, answer),) = items["multi-turn"].turns
        assert earlier.startswith("<image>")
        assert "<image>" not in items["multi-turn"].prompt
        assert (earlier[7:], answer) != (items["multi-turn"].prompt, items["multi-turn"].answer)
        for item in items.values():
            marks = sum(question.count("<image>") for question, _ in questions(item))
            assert marks == len(item.images)


def test_variants_occur_as_often_as_documented():
    def variant(item: Item) -> str:
        if len(item.images) == 2:
            return "two pictures"
        if item.turns:
            return "multi-turn"
        return "question first" if item.prompt.endswith("<image>") else "plain"

    found = Counter(variant(make_item("reading", seed)) for seed in range(800))
    for name, share in VARIANTS.items():
        assert found[name] / 800 == pytest.approx(share, abs=0.06)
    pairs = [make_item("reading", seed, variant="two pictures").images for seed in range(60)]
    assert len({image.shape for pair in pairs for image in pair}) == 3


@all_tasks
def test_level_0_shows_less_than_level_1(task):
    def glyphs(level: float) -> float:
        items = [make_item(task, s, level=level, variant="plain") for s in range(60)]
        return float(np.mean([(item.cells[0] >= 0).sum() for item in items]))

    assert glyphs(0) < 0.75 * glyphs(1)


@all_tasks
def test_many_questions_of_one_picture(task):
    for seed in range(15):
        items = questions_of_one_picture(task, seed, 16, variant="plain")
        assert digest(items[0]) == digest(make_item(task, seed, variant="plain"))
        assert len(items) == 16
        assert all(item.images is items[0].images for item in items)
        assert all(solve(task, item.cells, item.prompt) == item.answer for item in items)
        asked = [(item.answer, item.evidence) for item in items]
        first = next((i for i, subject in enumerate(asked) if subject in asked[:i]), 16)
        assert first >= min(3, len(set(asked)))
        assert len({item.prompt for item in items}) >= 12


@all_tasks
def test_prompts_do_not_repeat_themselves(task):
    wordings = set()
    for seed in range(300):
        item = make_item(task, seed)
        text = " ".join(question for question, _ in questions(item)).replace("<image>", "")
        sentences = re.findall(r"[A-Z][^.?]{15,}[.?]", text)
        formats = len(item.turns)  # the two turns may ask for the same format
        assert len(sentences) - len(set(sentences)) <= formats
        words = re.findall(r"\w+", text)
        assert all(a != b for a, b in pairwise(words))
        wordings.add(re.sub(r"\b[A-Z0-9]+\b|<image>", "", item.prompt))
    assert len(wordings) >= 60


@all_tasks
def test_the_vocabulary_has_every_word(task):
    assert sorted(set(VOCABULARY_WORDS)) == VOCABULARY_WORDS
    for seed in range(150):
        for texts in questions(make_item(task, seed)):
            words = re.findall(r"[A-Za-z]+", " ".join(texts).replace("<image>", ""))
            unknown = {word for word in words if re.search("[a-z]", word)} - {*VOCABULARY_WORDS}
            assert not unknown
            signs = re.sub(r"[a-z\s]", "", "".join(texts).replace("<image>", ""))
            assert set(signs) <= {*CHARACTERS, *".,:;?+=IO"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"task": "poetry"}, {"split": "exam"}, {"variant": "loud"}, {"shape": "round"},
        {"seed": -1}, {"level": 1.5}, {"jitter": 5}, {"tile": 56},
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="|".join(arguments)):
        make_item(**({"task": "reading", "seed": 0} | arguments))
