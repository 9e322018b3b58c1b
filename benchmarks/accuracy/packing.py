"""Items as arrays to train on: many questions behind one shared picture.

    prefix     everything up to the last visual token: once per picture          [P, T]
    segments   the rest of each prompt, and its answer: they see the prefix and  [P, Q, R]
               themselves, never each other; each begins at the position behind the prefix

So Q questions cost one pass over the visual tokens, and each is computed as if it stood alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.accuracy.network import PATCH, TILE
from benchmarks.accuracy.tasks import Item
from vlcache_jax.processing import ModelInputs, Processor

MARK = "<image>"
END = "</s>"
NOTHING = -1
"""Target of what is not learned."""

_SIDE = TILE // PATCH
_ROUND = 32  # segments are padded to multiples of this, to have few shapes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """P pictures (or sets of them) with Q questions each.

    Attributes:
        inputs: the prefixes: tokens, visual_index [P, T], tiles; `length` is theirs, int32 [P].
        tokens: of the segments, int32 [P, Q, R].
        targets: the next token where it is part of an answer, else -1, int32 [P, Q, R].
        glyphs: class of the glyph in each patch of the tiles, -1 for none, int32 [S, patches].
    """

    inputs: ModelInputs
    tokens: Any
    targets: Any
    glyphs: Any


def render(item: Item) -> str:
    """The raw prompt of an item, its earlier turns first, as the chat template writes it."""
    text = ""
    for question, answer in item.turns:
        text += f"[INST] {_marked(question)} [/INST]{answer}{END}"
    return f"{text}[INST] {_marked(item.prompt)} [/INST]"


def _marked(text: str) -> str:
    return text.replace(MARK, f"{MARK}\n")


def sharing(items: Sequence[Item]) -> list[Item]:
    """Those of a picture's items that can be a group: one, where the question comes first."""
    return [item for item in items if _before(item) == _before(items[0])]


def _before(item: Item) -> str:
    return render(item).rsplit(MARK, 1)[0]


def pack(groups: Sequence[Sequence[Item]], processor: Processor) -> Batch:
    """Make a batch of groups of items that share their pictures and what precedes them.

    Args:
        groups: as many items in each, or fewer: the rest is padding.
        processor: pictures and texts to arrays.

    Raises:
        ValueError: the items of a group do not share what is before their questions.
    """
    first = [group[0] for group in groups]
    whole = processor(
        [list(item.images) for item in first], [render(item) for item in first], raw_prompt=True
    )
    visual = np.asarray(whole.visual_index) >= 0
    length = (visual.shape[1] - visual[:, ::-1].argmax(1)).astype(np.int32)
    inputs = ModelInputs(whole.tokens, length, whole.visual_index, whole.tiles)
    rows = [[_segment(item, group[0], processor) for item in group] for group in groups]
    longest = max(len(tokens) for row in rows for tokens, _ in row)
    shape = (len(groups), max(map(len, rows)), -(-longest // _ROUND) * _ROUND)
    tokens, targets = np.zeros(shape, np.int32), np.full(shape, NOTHING, np.int32)
    for p, row in enumerate(rows):
        for q, (ids, answer) in enumerate(row):
            tokens[p, q, : len(ids)] = ids
            begin = len(ids) - answer - 1  # the question's last token predicts the answer's first
            targets[p, q, begin : len(ids) - 1] = ids[begin + 1 :]
    return Batch(inputs, tokens, targets, _glyphs(first, inputs.tiles.shape[0]))


def _segment(item: Item, first: Item, processor: Processor) -> tuple[list[int], int]:
    """Token ids behind the last picture, and how many of them are the answer's."""
    before, after = render(item).rsplit(MARK, 1)
    if before != _before(first):
        raise ValueError(f"{before!r} is not what the group's first item has before its question")
    # What a picture's last mark becomes ends at a token's end: so the rest can be read alone.
    question, answer = (
        processor.tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (after, item.answer + END)
    )
    return question + answer, len(answer)


def _glyphs(items: Sequence[Item], tiles: int) -> np.ndarray:
    """What the auxiliary loss is taught: the glyph of each patch of the full-resolution tiles."""
    found = np.full((tiles, _SIDE * _SIDE), NOTHING, np.int32)
    at = 0
    for item in items:
        for cells in item.cells:
            down, across = (side // _SIDE for side in cells.shape)
            parts = cells.reshape(down, _SIDE, across, _SIDE).swapaxes(1, 2)
            at += 1  # the first tile is the whole picture, at half the resolution or less
            found[at : at + down * across] = parts.reshape(down * across, -1)
            at += down * across
    return found
