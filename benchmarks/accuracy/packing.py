"""Items as arrays to train on: many questions behind one shared picture.

    prefix     everything up to the last visual token: once per picture          [P, T]
    segments   the rest of each prompt, and its answer: they see the prefix and  [P, Q, R]
               themselves, never each other; each begins at the position behind the prefix

So Q questions cost one pass over the visual tokens, and each is computed as if it stood alone.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.accuracy.network import DIALOGUE, Dialogue
from benchmarks.accuracy.tasks import Item
from vlcache_jax.models.llava.config import with_vision
from vlcache_jax.requests.buckets import bucket_for
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.requests.processing import Processor

MARK = "<image>"
NOTHING = -1
"""Target of what is not learned."""

_ROUND = 8  # segments are padded to multiples of this, to have few shapes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """P pictures (or sets of them) with Q questions each.

    Attributes:
        inputs: the prefixes: tokens, visual_index [P, T], tiles; `length` is theirs, int32 [P].
        positions: where each of their rows stands, int32 [P, T].
        counts: for how many rows each of them stands, float32 [P, T]: a blank that is there also
            for those that are left out.
        begin: where the segments begin, int32 [P].
        tokens: of the segments, int32 [P, Q, R].
        targets: the next token where it is part of an answer, else -1, int32 [P, Q, R].
        answers: the rows of a segment from which its answer's tokens follow, int32 [P, Q, A];
            padded with rows from which none does.
        sources: row of the prefix whose patch shows what the next token says, else -1, int32
            [P, Q, R]; known where an answer has one token for each patch.
        glyphs: class of the glyph in each patch of the tiles, -1 for none, int32 [S, patches].
    """

    inputs: ModelInputs
    positions: Any
    counts: Any
    begin: Any
    tokens: Any
    targets: Any
    answers: Any
    sources: Any
    glyphs: Any


def render(item: Item, dialogue: Dialogue = DIALOGUE) -> str:
    """The raw prompt of an item, its earlier turns first, as the chat template writes it."""
    user, assistant, end, between = dialogue
    said = "".join(
        f"{user}{question}{assistant}{answer}{end}{between}" for question, answer in item.turns
    )
    return f"{said}{user}{item.prompt}{assistant}".replace(MARK, f"{MARK}\n")


def messages(item: Item) -> list[dict[str, str]]:
    """An item as a conversation, for the chat template of any model."""
    said = [text for turn in item.turns for text in turn] + [item.prompt]
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def prompt_of(item: Item, processor: Processor) -> str:
    """The raw prompt of an item, as the chat template of a checkpoint writes it."""
    return processor.render(messages(item), len(item.images))


def pack(
    groups: Sequence[Sequence[Item]],
    processor: Processor,
    *,
    blanks: float = 1.0,
    rng: np.random.Generator | None = None,
    dialogue: Dialogue = DIALOGUE,
    round_to: int = _ROUND,
) -> Batch:
    """Make a batch of groups of items that share their pictures and what precedes them.

    Args:
        groups: as many items in each, or fewer: the rest is padding.
        processor: pictures and texts to arrays.
        blanks: share of the visual tokens without a glyph that are there; of newlines all, unless
            it is 0. Those that are left out leave their position empty, and the others count for
            them in each attention: a shorter prefix to learn from, not another one.
        rng: which ones; None for all of them.
        dialogue: how the model's chat is written.
        round_to: segments are padded to multiples of so many rows, answers of twice as many.

    Raises:
        ValueError: the items of a group do not share what is before their questions.
    """
    first = [group[0] for group in groups]
    whole = processor(
        [list(item.images) for item in first],
        [render(item, dialogue) for item in first],
        raw_prompt=True,
    )
    glyphs, places = _glyphs(first, whole.tiles.shape[0], with_vision(processor.config).vision.grid)
    index = np.asarray(whole.visual_index)
    visual = index >= 0
    begin = (visual.shape[1] - visual[:, ::-1].argmax(1)).astype(np.int32)
    here = np.arange(visual.shape[1]) < begin[:, None]
    counts = np.ones(visual.shape, np.float32)
    if rng is not None and blanks < 1:
        drawn = np.append(glyphs.reshape(-1), NOTHING)[np.minimum(index, glyphs.size)] >= 0
        blank = visual & ~drawn & ((index < glyphs.size) | (blanks == 0))
        here &= ~blank | (rng.random(visual.shape) < blanks)
        counts[blank] = 1 / max(blanks, np.finfo(np.float32).tiny)
    rows = here.sum(1).astype(np.int32)
    order = np.argsort(~here, axis=1, kind="stable")[
        :, : bucket_for(rows.max(), processor.buckets.prompt)
    ]
    tokens, index, counts = (
        np.take_along_axis(x, order, 1) for x in (np.asarray(whole.tokens), index, counts)
    )
    index = np.where(np.arange(order.shape[1]) < rows[:, None], index, NOTHING)
    inputs = ModelInputs(tokens, rows, index, whole.tiles)

    segments = _segments(groups, processor, dialogue)

    def rounded(count: int, step: int) -> int:
        return -(-count // step) * step

    longest = rounded(max(len(ids) for row in segments for ids, _ in row), round_to)
    shape = (len(groups), max(map(len, segments)), longest)
    tokens = np.zeros(shape, np.int32)
    # The last row has no next token.
    most = rounded(max(answer for row in segments for _, answer in row), 2 * round_to)
    answers = np.full((*shape[:2], most), longest - 1, np.int32)
    targets, sources = np.full(shape, NOTHING, np.int32), np.full(shape, NOTHING, np.int32)
    for p, row in enumerate(segments):
        row_of = {patch: at for at, patch in enumerate(index[p].tolist()) if patch >= 0}
        for q, (ids, answer) in enumerate(row):
            tokens[p, q, : len(ids)] = ids
            start = len(ids) - answer - 1  # the question's last token predicts the answer's first
            targets[p, q, start : len(ids) - 1] = ids[start + 1 :]
            answers[p, q, :answer] = np.arange(start, len(ids) - 1)
            evidence = groups[p][q].evidence
            if len(evidence) == answer - 1:
                sources[p, q, start : len(ids) - 2] = [
                    row_of.get(int(places[p][picture][row, col]), NOTHING)
                    for picture, row, col in evidence
                ]
    positions = order.astype(np.int32)
    return Batch(inputs, positions, counts, begin, tokens, targets, answers, sources, glyphs)


def _segments(
    groups: Sequence[Sequence[Item]], processor: Processor, dialogue: Dialogue
) -> list[list[tuple[list[int], int]]]:
    """Of each item the token ids behind the last picture, and how many are the answer's."""
    found = []
    for group in groups:
        texts = [render(item, dialogue).rsplit(MARK, 1) for item in group]
        for before, _ in texts:
            if before != texts[0][0]:
                raise ValueError(
                    f"{before!r} is not what the group's first item has before its question"
                )
        # A picture's last mark becomes what ends at a token's end: the rest can be read alone.
        pairs = zip(
            (after for _, after in texts),
            (item.answer + dialogue.end for item in group),
            strict=True,
        )
        ids = processor.tokenizer(
            [text for pair in pairs for text in pair], add_special_tokens=False
        )
        asked, answered = ids["input_ids"][::2], ids["input_ids"][1::2]
        found.append([(q + a, len(a)) for q, a in zip(asked, answered, strict=True)])
    return found


def _glyphs(
    items: Sequence[Item], tiles: int, side: int
) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """The glyph of each patch of the full-resolution tiles, and the patch of each item's cells."""
    found = np.full((tiles, side * side), NOTHING, np.int32)
    places, at = [], 0
    for item in items:
        pages = []
        for cells in item.cells:
            down, across = (cells_along // side for cells_along in cells.shape)
            at += 1  # the first tile is the whole picture, at half the resolution or less
            patches = np.arange(at * side**2, (at + down * across) * side**2)
            parts = patches.reshape(down, across, side, side).swapaxes(1, 2)
            pages.append(parts.reshape(cells.shape))
            found.reshape(-1)[pages[-1]] = cells
            at += down * across
        places.append(pages)
    return found, places
