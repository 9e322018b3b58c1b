"""Answers of many methods to the same items, from one prefill of each.

    evaluation = Evaluation(vlcache_jax.load("demo-small"))
    outcomes = evaluation.run(items, {("mine", "0.1"): Custom(0.1, score=...)})
    outcomes["mine", "0.1"].answers, outcomes[WHOLE].answers

All methods watch one prefill. Methods whose pools have the same shapes, which is to say about the
same budget and quantizer, are put one after the other along the batch axis and decoded together:

    prompts ─► prefill ─┬─► the full cache: answer ─► what it attends to      [B]
               K, V     └─► plan, build: pools of M methods ─► decode         [M * B]

Any `CacheMethod` can be run, so that an experiment is a dictionary of them.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.accuracy.comparison import Comparison
from benchmarks.accuracy.packing import prompt_of
from benchmarks.accuracy.report import FULL
from benchmarks.accuracy.tasks import Item
from vlcache_jax.cache.method import AnyPool, CacheMethod
from vlcache_jax.cache.methods import FullCache
from vlcache_jax.cache.state import round_up
from vlcache_jax.evaluation.comparison import Comparer
from vlcache_jax.models.families import Params
from vlcache_jax.models.llava.anyres import num_tiles
from vlcache_jax.models.llava.config import LlavaConfig, with_vision
from vlcache_jax.requests.buckets import Buckets
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.generate import Generate
from vlcache_jax.vlm import VLM

Cell = tuple[str, str]
"""A label and a budget: ("vl-cache", "0.1")."""

WHOLE: Cell = (FULL, "1.0")
"""The full cache's, which every run has."""

ROW_STEP = 64
"""Prompts are padded to the next multiple of this: to the same rows for nearly every draw."""

TOKEN_STEP = 8
"""An answer may be as long as the next multiple of this above its task's longest right answer."""

STEPS = 4
"""Decode steps between two tests for the end: answers are short."""


@dataclass(frozen=True)
class Outcome:
    """What a method made of the items. L layers; shares are 0 to 1.

    Attributes:
        answers: text of each item.
        tokens: their token ids, the end token left out.
        kept: share of the prompt's tokens kept, float32 [n, L].
        kept_bytes: share of its full cache's bytes, scales and shifts included, likewise.
        kept_visual: share of its visual tokens kept, likewise.
        hit_rate: `vlcache_jax.cache_hit_rate` of the first decoded token, mean over the kv heads,
            float32 [n, L].
        mass_recall: `vlcache_jax.attention_mass_recall` of the same token.
        answer_recall: share of the attention kept that the full cache's whole answer pays to the
            prompt.
    """

    answers: list[str]
    tokens: list[list[int]]
    kept: np.ndarray
    kept_bytes: np.ndarray
    kept_visual: np.ndarray
    hit_rate: np.ndarray
    mass_recall: np.ndarray
    answer_recall: np.ndarray


MEASURES = tuple(field.name for field in fields(Outcome))[2:]
"""The names of its arrays."""


class Evaluation(Comparer):
    """Runs methods on items; keeps its compiled programs from one run to the next.

    Attributes:
        vlm: the model.
        batch: items that are run at a time.
        seconds: spent so far on "host" (pictures and prompts to arrays), "compile", and each of
            the programs.

    Raises:
        ValueError: `batch` is below 1, or the model was loaded with transformed values.
    """

    def __init__(self, vlm: VLM, *, batch: int = 16):
        if batch < 1:
            raise ValueError(f"{batch=} must be at least 1")
        if vlm.transformed:
            raise ValueError("quantizers without the transform need values as they are: load "
                             "the model without it")  # fmt: skip
        super().__init__(vlm)
        self.batch = batch
        self.seconds["host"] = 0.0

    def run(
        self,
        items: Sequence[Item],
        methods: Mapping[Cell, CacheMethod],
        *,
        max_new_tokens: int | None = None,
        advance: Callable[[int], object] | None = None,
    ) -> dict[Cell, Outcome]:
        """Answer every item by every method, greedily.

        Args:
            items: of any tasks, in any order.
            methods: by labels of your own and their budgets. One that keeps everything and does not
                quantize has the full cache's outcome: it is not decoded again.
            max_new_tokens: most tokens of an answer; by default a little more than the longest
                right answer to an item of the same task has.
            advance: called with the number of items done at a time, to show how far it is.

        Returns:
            The outcomes, in the order of the items; `WHOLE` is always among them.

        Raises:
            ValueError: there are no items, `WHOLE` does not keep everything, or a prompt and its
                answer are longer than the model's positions.
        """
        if not items:
            raise ValueError("no items to run")
        if WHOLE in methods and not methods[WHOLE].is_full:
            raise ValueError(f"{WHOLE} is the full cache's, not one of {methods[WHOLE]}")
        limits, vlm = self._limits(items, max_new_tokens), self.vlm
        most = round_up(limits.max(), 16)
        generate = Generate(vlm.config, FullCache(), most, stop_ids=vlm.stop_ids, chunk=STEPS,
                            backend=vlm.backend)  # fmt: skip
        some = {
            cell: method.for_model(vlm.config.text, vlm.tsa_layers)
            for cell, method in methods.items()
            if not method.is_full
        }
        way = Comparison(vlm.config, vlm.backend)
        attend = partial(self.do, way, "attend", vlm.params)
        decode = partial(self._decode, generate)
        found: dict[Cell, dict[int, tuple[list[int], Any]]] = defaultdict(dict)
        for rows, inputs in self.batches(items, int(limits.max())):
            ones = np.ones((self.batch, vlm.config.text.num_layers), np.float32)
            for cell, (tokens, lengths), measures in self.compare(
                way, inputs, some, (limits[rows],), decode, attend
            ):
                measures = measures or dict.fromkeys(MEASURES, ones)
                for at, row in enumerate(rows.tolist()):  # a repeated item comes out the same
                    ids = tokens[at, : lengths[at]].tolist()
                    found[cell][row] = ids, {name: part[at] for name, part in measures.items()}
            if advance:
                advance(len(set(rows.tolist())))
        outcomes = {cell: self._outcome(each) for cell, each in found.items()}
        return {WHOLE: outcomes[WHOLE]} | {
            cell: outcomes[cell if cell in some else WHOLE] for cell in methods
        }

    def _outcome(self, found: dict[int, tuple[list[int], Any]]) -> Outcome:
        tokens, measures = zip(*(found[row] for row in range(len(found))), strict=True)
        arrays = {name: np.stack([each[name] for each in measures]) for name in MEASURES}
        return Outcome([self.vlm.processor.decode(ids) for ids in tokens], list(tokens), **arrays)

    def _limits(self, items: Sequence[Item], most: int | None) -> np.ndarray:
        """Most tokens of each item's answer, int32 [n]."""
        if most is not None:
            if most < 1:
                raise ValueError(f"max_new_tokens={most} must be at least 1")
            return np.full(len(items), most, np.int32)
        longest: dict[str, int] = defaultdict(int)
        for item in items:
            ids = self.vlm.processor.tokenizer(item.answer, add_special_tokens=False)["input_ids"]
            longest[item.task] = max(longest[item.task], len(ids))
        # One more than the longest: a right answer is not cut before it ends.
        return np.array([round_up(longest[item.task] + 1, TOKEN_STEP) for item in items], np.int32)

    def batches(
        self, items: Sequence[Item], new_tokens: int
    ) -> Iterator[tuple[np.ndarray, ModelInputs]]:
        """Batches of equal shapes for all items with as many pictures: (which items, inputs).

        The last one of a kind is filled up by repeating its last item.
        """
        config, kinds = with_vision(self.vlm.config), defaultdict(list)
        for row, item in enumerate(items):
            kinds[_tiles(item, config)].append(row)
        lengths = [prompt_tokens(item, self.vlm) for item in items]
        limit = config.text.max_positions
        if max(lengths) + new_tokens - 1 > limit:
            raise ValueError(
                f"a prompt of {max(lengths)} tokens and {new_tokens} new ones exceed the model's "
                f"{limit} positions: ask for fewer new tokens"
            )
        for tiles, rows in sorted(kinds.items()):
            processor = copy.copy(self.vlm.processor)
            longest = round_up(max(lengths[row] for row in rows), ROW_STEP)
            processor.buckets = Buckets((min(limit, longest),), (tiles * self.batch,))
            rows.sort(key=lambda row: items[row].task)  # answers of like length together
            for at in range(0, len(rows), self.batch):
                some = rows[at : at + self.batch]
                some += some[-1:] * (self.batch - len(some))
                began = time.perf_counter()
                inputs = processor(
                    [list(items[row].images) for row in some],
                    [prompt_of(items[row], processor) for row in some],
                    raw_prompt=True,
                )
                self.seconds["host"] += time.perf_counter() - began
                yield np.array(some), inputs

    def compare(
        self,
        way: Comparison,
        inputs: ModelInputs,
        methods: Mapping[Cell, CacheMethod],
        lanes: tuple[Any, ...],
        decode: Callable[..., Any],
        attend: Callable[..., Any],
    ) -> Iterator[tuple[Cell, Any, Any]]:
        """Run a batch by the full cache and by every method, from one prefill.

        Args:
            way: the stages.
            inputs: the prompts, B of them.
            methods: none is the full cache.
            lanes: further trees of arrays [B, ...] for `decode`.
            decode: of parameters, a pool of some sequences, their first tokens, lengths and lanes,
                gives a tuple of arrays with an axis of sequences first.
            attend: of the full cache, the prompts and what `decode` gave for it, gives what
                `way.build` takes as `told`.

        Yields:
            A cell, `WHOLE` first, what `decode` gave, and the measures, None for the full cache.
        """
        plain, given = self.vlm.params, jax.device_put(inputs)
        watching = tuple(methods.values())
        full, token, seen = self.do(way, "prefill", plain, given, methods=watching)
        lanes = np.asarray(token), inputs.length, *lanes
        said = decode(plain, full, *lanes)
        attended = attend(full, given, said)
        yield WHOLE, said, None
        for pools in self.pools(way, full, given, methods, seen, attended):
            count = len(pools.keys)
            repeated = jax.tree.map(lambda part, n=count: np.concatenate([part] * n), lanes)
            decoded = decode(pools.params, pools.pool, *repeated)
            parts = (np.split(part, count) for part in decoded)
            for index, (cell, *each) in enumerate(zip(pools.keys, *parts, strict=True)):
                yield cell, each, jax.tree.map(lambda x, i=index: np.asarray(x[i]), pools.measures)

    def _decode(
        self,
        generate: Generate,
        params: Params,
        pool: AnyPool,
        token: np.ndarray,
        length: np.ndarray,
        limit: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Answers from the first token on: tokens [B, R] and their lengths, at most `limit` [B]."""
        stages, rows = generate.stages, generate.max_new_tokens
        settings = replace(generate.settings(len(token)), max_new_tokens=limit)
        dtype = params["embed"]["embedding"].dtype
        state = self.do(stages, "start", token, length, settings, dtype=dtype)
        drawn = [token[:, None]]
        while not np.all(state.done):
            state, new = self.do(stages, "decode_chunk", params, pool, state, donate=(2,))
            drawn.append(np.asarray(new))
        tokens = np.concatenate(drawn, axis=1)[:, :rows]
        return np.pad(tokens, ((0, 0), (0, rows - tokens.shape[1]))), np.asarray(state.count)


def prompt_tokens(item: Item, vlm: VLM) -> int:
    """Length of an item's prompt, visual tokens included, without reading its pictures."""
    text = vlm.processor.tokenizer(prompt_of(item, vlm.processor))["input_ids"]
    shown = vlm.processor.patches([image.shape[:2] for image in item.images])
    return len(text) - len(item.images) + sum(len(picture.part) for picture in shown)


def _tiles(item: Item, config: LlavaConfig) -> int:
    """Tiles of an item's pictures, in multiples of the most that one picture can be."""
    most = config.max_tiles
    return most * -(-sum(num_tiles(image.shape[:2], config) for image in item.images) // most)
