"""Answers of many methods to the same items, from one prefill of each.

    evaluation = Evaluation(vlcache_jax.load("demo"))
    outcomes = evaluation.run(items, {"vl-cache": VLCache(0.1), "mine": Custom(0.1, score=...)})
    outcomes["mine"].answers, outcomes["full"].answers

All methods watch one prefill. Methods whose pools have the same capacity, which is to say the same
budget and quantiser, are put one after the other along the batch axis and decoded by one program:

    prompts ─► prefill ─┬─► the full cache: answer ─► what it attends to      [B]
               K, V     └─► plan, build: pools of M methods ─► decode         [M * B]

Values that a quantiser wants transformed are so when its pool is built, and decoded by the folded
weights: what a prefill by these would leave behind, but for the rounding.

Any `CacheMethod` can be run, so that an experiment is a dictionary of them.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.accuracy.oracle import Attended, Oracle, attention_of_answer
from benchmarks.accuracy.packing import render
from benchmarks.accuracy.tasks import Item
from pallas_kernels.hadamard import transform
from vlcache_jax.anyres import max_tiles, num_tiles, visual_rows
from vlcache_jax.buckets import Buckets
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import AnyPool, CacheMethod, Observation, Plan
from vlcache_jax.cache.methods import FullCache
from vlcache_jax.cache.score import Layer
from vlcache_jax.cache.state import Pool, empty_tail, round_up
from vlcache_jax.cache.trace import attention_mass_recall, cache_hit_rate
from vlcache_jax.config import LlavaConfig
from vlcache_jax.generate import DecodeState, Generate
from vlcache_jax.models.fold import fold_transform
from vlcache_jax.models.llava import Params, bind
from vlcache_jax.processing import ModelInputs
from vlcache_jax.report import packed_bytes, row_bytes
from vlcache_jax.vlm import VLM, Program

FULL = "full"
"""The label of the full cache, which every run has."""

ROW_STEP = 64
"""Prompts are padded to the next multiple of this: to the same rows for nearly every draw."""

TOKEN_STEP = 8
"""An answer may be as long as the next multiple of this above its task's longest right answer."""


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


class Measures(NamedTuple):
    """The arrays of an `Outcome`, [B, L] each, under the same names."""

    kept: Any
    kept_bytes: Any
    kept_visual: Any
    hit_rate: Any
    mass_recall: Any
    answer_recall: Any


class Answers(NamedTuple):
    """A method's answers to a batch: tokens [B, R], how many are each answer's [B], measures."""

    tokens: np.ndarray
    lengths: np.ndarray
    measures: Measures


class Evaluation:
    """Runs methods on items; keeps its compiled programs from one run to the next.

    Attributes:
        vlm: the model.
        batch: items that are run at a time.
        seconds: spent so far on "host" (pictures and prompts to arrays), "compile", "prefill",
            "answer" (the full cache's), "attend" (what it attends to), "build" (plans, pools and
            hit rates) and "decode" (the methods' answers).

    Raises:
        ValueError: `batch` is below 1, or the model was loaded with transformed values.
    """

    def __init__(self, vlm: VLM, *, batch: int = 16):
        if batch < 1:
            raise ValueError(f"{batch=} must be at least 1")
        if vlm.transformed:
            raise ValueError("quantisers without the transform need values as they are: load "
                             "the model without it")  # fmt: skip
        self.vlm, self.batch = vlm, batch
        parts = ("host", "compile", "prefill", "answer", "attend", "build", "decode")
        self.seconds: dict[str, float] = dict.fromkeys(parts, 0.0)
        self._programs: dict[Any, Program] = {}

    def run(
        self,
        items: Sequence[Item],
        methods: Mapping[str, CacheMethod],
        *,
        max_new_tokens: int | None = None,
        advance: Callable[[int], object] | None = None,
    ) -> dict[str, Outcome]:
        """Answer every item by every method, greedily.

        Args:
            items: of any tasks, in any order.
            methods: by labels of your own. One whose budget is 1 or more has the full cache's
                outcome, if it does not quantise: it keeps everything, so it is not decoded again.
            max_new_tokens: most tokens of an answer; by default a little more than the longest
                right answer to an item of the same task has.
            advance: called with the number of items done at a time, to show how far it is.

        Returns:
            The outcomes, in the order of the items, by label; "full" is always among them.

        Raises:
            ValueError: there are no items, a method labelled "full" does not keep everything, or
                a prompt and its answer are longer than the model's positions.
        """
        if not items:
            raise ValueError("no items to run")
        if FULL in methods and not _is_full(methods[FULL]):
            raise ValueError(f"the label {FULL!r} is the full cache's, not one of {methods[FULL]}")
        limits = self._limits(items, max_new_tokens)
        stages = Stages(
            self.vlm.config, self.vlm.stop_ids, self.vlm.backend, round_up(limits.max(), 16)
        )
        some = {
            label: method.for_model(self.vlm.config.text, self.vlm.tsa_layers)
            for label, method in methods.items()
            if not _is_full(method)
        }
        found: dict[str, dict[int, tuple[list[int], Measures]]] = defaultdict(dict)
        for rows, inputs in self._batches(items, int(limits.max())):
            answers = self._run_batch(stages, some, inputs, limits[rows])
            for label, (tokens, lengths, measures) in answers.items():
                for at, row in enumerate(rows.tolist()):  # a repeated item comes out the same
                    ids = tokens[at, : lengths[at]].tolist()
                    found[label][row] = ids, Measures(*(part[at] for part in measures))
            if advance:
                advance(len(set(rows.tolist())))
        outcomes = {label: self._outcome(each) for label, each in found.items()}
        return {FULL: outcomes[FULL]} | {
            label: outcomes[label if label in some else FULL] for label in methods
        }

    def _outcome(self, found: dict[int, tuple[list[int], Measures]]) -> Outcome:
        tokens, measures = zip(*(found[row] for row in range(len(found))), strict=True)
        arrays = (np.stack(parts) for parts in zip(*measures, strict=True))
        return Outcome([self.vlm.processor.decode(ids) for ids in tokens], list(tokens), *arrays)

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

    def _batches(
        self, items: Sequence[Item], new_tokens: int
    ) -> Iterator[tuple[np.ndarray, ModelInputs]]:
        """Batches of equal shapes for all items with as many pictures: (which items, inputs).

        The last one of a kind is filled up by repeating its last item.
        """
        config, kinds = self.vlm.config, defaultdict(list)
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
                    [render(items[row]) for row in some],
                    raw_prompt=True,
                )
                self.seconds["host"] += time.perf_counter() - began
                yield np.array(some), inputs

    def _run_batch(
        self,
        stages: "Stages",
        methods: dict[str, CacheMethod],
        inputs: ModelInputs,
        limit: np.ndarray,
    ) -> dict[str, Answers]:
        """The answers of each method to a batch, on the host."""
        params, length = {False: self.vlm.params}, inputs.length
        if any(method.transforms for method in methods.values()):
            params[True] = self._folded
        inputs = jax.device_put(inputs)
        watching = tuple(methods.values())
        full, token, seen = self._do("prefill", stages, watching)(params[False], inputs)
        answer = self._do("decode", stages, full=True)
        tokens, lengths = answer(params[False], full, token, length, limit)
        attended = self._do("attend", stages)(params[False], full, inputs, tokens, lengths)
        all_of_it = np.ones(full.length.shape, np.float32)
        measures = Measures(*[all_of_it] * len(Measures._fields))
        answers = {FULL: Answers(np.asarray(tokens), np.asarray(lengths), measures)}

        groups: dict[Any, list[str]] = defaultdict(list)
        saw = dict(zip(methods, seen, strict=True))
        for label, method in methods.items():
            capacity = method.capacity(stages.layers, inputs.tokens.shape[1])
            groups[capacity, method.quantize].append(label)
        for labels in groups.values():
            transforms = methods[labels[0]].transforms
            build = self._do("build", stages, tuple(methods[label] for label in labels))
            pool, measures = build(full, inputs, [saw[label] for label in labels], attended)
            lanes = (np.tile(part, len(labels)) for part in (token, length, limit))
            drawn = self._do("decode", stages)(params[transforms], pool, *lanes)
            tokens, lengths = (np.split(part, len(labels)) for part in jax.device_get(drawn))
            for index, label in enumerate(labels):
                own = Measures(*(np.asarray(part[index]) for part in measures))
                answers[label] = Answers(tokens[index], lengths[index], own)
        return answers

    @cached_property
    def _folded(self) -> Params:
        return fold_transform(self.vlm.params)

    def _do(self, name: str, stages: "Stages", *static: Any, full: bool = False) -> Any:
        """A stage as a function that is compiled when it must be and whose time is counted."""
        key = name, stages, static
        if key not in self._programs:
            self._programs[key] = Program(partial(getattr(stages, name), *static))

        def run(*args: Any) -> Any:
            program, compiling = self._programs[key].ready(*args)
            began = time.perf_counter()
            result = program(*args)
            self.seconds["compile"] += compiling
            self.seconds["answer" if full else name] += time.perf_counter() - began
            return result

        return run


@dataclass(frozen=True)
class Together(CacheMethod):
    """Several methods that watch the same prefill; they plan and build on their own.

    Attributes:
        budget: without meaning, as is `shared_heads`.
        methods: the methods.
    """

    methods: tuple[CacheMethod, ...] = ()

    def __post_init__(self):
        """Nothing to check: the methods are made."""

    def observe(self, layer: Layer) -> Any:
        """What each method saw, in their order."""
        return tuple(method.observe(layer.under(method.limit)) for method in self.methods)


@dataclass(frozen=True)
class Stages:
    """The parts of a batch's way that are compiled, each a pure function of arrays.

    Attributes:
        config: the model.
        stop_ids: tokens that end an answer.
        backend: attention backend.
        rows: most tokens behind a prompt, R.
    """

    config: LlavaConfig
    stop_ids: tuple[int, ...]
    backend: str | None
    rows: int

    @property
    def layers(self) -> int:
        """L."""
        return self.config.text.num_layers

    def _generate(self, cache: CacheMethod) -> Generate:
        return Generate(self.config, cache, self.rows, stop_ids=self.stop_ids, backend=self.backend)

    def _prompt(self, inputs: ModelInputs, method: CacheMethod) -> Prompt:
        return Prompt(inputs.length, inputs.visual_index >= 0, self.layers, method.limit)

    def prefill(
        self, methods: tuple[CacheMethod, ...], params: Params, inputs: ModelInputs
    ) -> tuple[Pool, jax.Array, tuple[Observation, ...]]:
        """The full cache, the first token [B], and what each method saw."""
        generate, full = self._generate(Together(methods=methods)), FullCache()
        prefilled = generate.prefill(params, inputs)
        token = generate.start(params, prefilled, inputs, jax.random.key(0)).token
        prompt = self._prompt(inputs, full)
        pool = full.build(prefilled.k, prefilled.v, full.plan(Observation(), prompt), prompt)
        assert isinstance(pool, Pool)  # nothing is quantised
        # What is stacked are the methods' observations of each layer, in the shape of `observe`.
        return pool, token, cast(Any, prefilled.seen)

    def build(
        self,
        methods: tuple[CacheMethod, ...],
        full: Pool,
        inputs: ModelInputs,
        seen: list[Observation],
        attended: Attended,
    ) -> tuple[AnyPool, Measures]:
        """The pools of M methods as one of M * B sequences; their measures, [M, B, L] each."""
        pools, measures = [], []
        visual = jnp.sum(inputs.visual_index >= 0, axis=-1)
        for method, own in zip(methods, seen, strict=True):
            pool, plan, kept = self.compressed(method, full, inputs, own, attended.mass)
            kept = jnp.broadcast_to(kept, attended.first.shape)
            count = jnp.broadcast_to(plan.budgets[:, :, None], kept.shape[:3])
            pools.append(pool)
            measures.append(
                Measures(
                    pool.length / inputs.length[:, None],
                    pool.counts @ self._row_shares(method, full) / inputs.length[:, None],
                    pool.visual / jnp.maximum(visual, 1)[:, None],
                    jnp.mean(cache_hit_rate(attended.first, kept, count), axis=-1),
                    jnp.mean(attention_mass_recall(attended.first, kept), axis=-1),
                    jnp.mean(attention_mass_recall(attended.mass, kept), axis=-1),
                )
            )
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *measures)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pools), stacked

    def compressed(
        self,
        method: CacheMethod,
        full: Pool,
        inputs: ModelInputs,
        seen: Observation,
        mass: jax.Array,
    ) -> tuple[AnyPool, Plan, jax.Array]:
        """A method's pool, its plan, and which tokens that keeps, bool [B, L, K or 1, T].

        Args:
            method: the method.
            full: the full cache.
            inputs: the prompts.
            seen: what the method saw of them.
            mass: attention of what follows the prompts, which an oracle is told.
        """
        prompt = self._prompt(inputs, method)
        if isinstance(method, Oracle):
            seen = method.told(seen, mass)
        plan = method.plan(seen, prompt)
        v = transform(full.v) if method.transforms else full.v
        return method.build(full.k, v, plan, prompt), plan, plan.kept(prompt)

    def _row_shares(self, method: CacheMethod, full: Pool) -> jax.Array:
        """Bytes of a row of each width, with its scales, as shares of one of full width."""
        text, quantizer = self.config.text, method.quantize
        whole, shares = row_bytes(text, full.k.dtype), [1.0]
        if quantizer is not None:
            unit = quantizer.key_group or 1  # rows of full groups
            for width in np.eye(len(quantizer.widths), dtype=int):
                size = sum(packed_bytes(text, quantizer, unit * width[None]))
                shares.append(size / (unit * whole))
        return jnp.array(shares, jnp.float32)

    def attend(
        self,
        params: Params,
        full: Pool,
        inputs: ModelInputs,
        tokens: jax.Array,
        lengths: jax.Array,
    ) -> Attended:
        """What the full cache's answers, [B, R] and how long they are, attend to."""
        model = bind(self.config)(params)
        return attention_of_answer(
            model, self.config.text, full, inputs, tokens, lengths, self.backend
        )

    def decode(
        self,
        params: Params,
        pool: AnyPool,
        token: jax.Array,
        position: jax.Array,
        limit: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Answers from the first token on: tokens [B, R] and their lengths, at most `limit` [B]."""
        generate = self._generate(FullCache())
        ended = jnp.any(token[:, None] == jnp.array(self.stop_ids, jnp.int32), axis=-1)
        count = jnp.where(ended, 0, 1)
        dtype = params["embed"]["embedding"].dtype
        tail = empty_tail(self.config.text, token.shape[0], self.rows, dtype)
        state = DecodeState(
            tail, token, position, count, ended | (count >= limit), jax.random.key(0)
        )
        tokens = jnp.zeros((token.shape[0], self.rows), jnp.int32).at[:, 0].set(token)
        segments = pool.segments()

        def unfinished(carry: tuple[jax.Array, DecodeState, jax.Array]) -> jax.Array:
            index, state, _ = carry
            return (index < self.rows) & ~jnp.all(state.done)

        def step(
            carry: tuple[jax.Array, DecodeState, jax.Array],
        ) -> tuple[jax.Array, DecodeState, jax.Array]:
            index, state, tokens = carry
            state = generate.decode_step(params, pool, state, segments)[0]
            state = replace(state, done=state.done | (state.count >= limit))
            column = state.token[:, None]
            return index + 1, state, lax.dynamic_update_slice_in_dim(tokens, column, index, axis=1)

        _, state, tokens = lax.while_loop(unfinished, step, (jnp.int32(1), state, tokens))
        return tokens, state.count


def _is_full(method: CacheMethod) -> bool:
    """Whether a method keeps everything as it is."""
    return method.limit.keeps_all and method.quantize is None


def prompt_tokens(item: Item, vlm: VLM) -> int:
    """Length of an item's prompt, visual tokens included, without reading its pictures."""
    text = vlm.processor.tokenizer(render(item))["input_ids"]
    visual = sum(visual_rows(image.shape[:2], vlm.config).size for image in item.images)
    return len(text) - len(item.images) + visual


def _tiles(item: Item, config: LlavaConfig) -> int:
    """Tiles of an item's pictures, in multiples of the most that one picture can be."""
    most = max_tiles(config)
    return most * -(-sum(num_tiles(image.shape[:2], config) for image in item.images) // most)
