"""A decode step: one token of every sequence, from a cache of random rows of the right lengths."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import measure
from benchmarks.roofline import Device, Stage, decode_step
from benchmarks.speed.cases import Case, Variants, name_of
from benchmarks.speed.limit import in_type
from benchmarks.speed.rows import beside_full, row_of
from pallas_kernels.packing import join_affine
from vlcache_jax.cache.method import AnyPool, CacheMethod
from vlcache_jax.cache.packed import PackedPool, first_words
from vlcache_jax.cache.state import Pool
from vlcache_jax.models.families import Params
from vlcache_jax.running.stages import DecodeState

CHUNKS = (1, 3)
"""Programs in a row that are timed; a step is the difference of the two, divided by its steps."""


Shape = tuple[int, ...]
"""Of an array of a pool: [B, K, rows, H], or as of scales."""


@functools.partial(jax.jit, static_argnames="shape")
def random_words(seed: int, shape: Shape) -> jax.Array:
    """Random bits, uint32 `shape`: hashes of places, which take no memory but their own."""
    found = jnp.asarray(seed, jnp.uint32)
    for axis in range(len(shape)):
        found = (found ^ lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
        found = found ^ (found >> 15)
    return found


def _uniform(seed: int, shape: Shape) -> jax.Array:
    """Numbers from 0 to 1, float32 `shape`."""
    return random_words(seed, shape).astype(jnp.float32) / 2.0**32


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_rows(seed: int, shape: Shape, dtype: str) -> jax.Array:
    """Numbers of mean 0 and variance 1, [B, K, rows, H]."""
    return (math.sqrt(12) * (_uniform(seed, shape) - 0.5)).astype(dtype)


@functools.partial(jax.jit, static_argnames=("shape", "bits"))
def random_scales(seed: int, shape: Shape, bits: int) -> jax.Array:
    """Scales and shifts with which codes of so many bits are from about -1 to 1, uint32 `shape`."""
    half = 0.5 + _uniform(seed, shape) / 2
    return join_affine(2 * half / (2**bits - 1), -half)


def random_pool(case: Case, variant: CacheMethod) -> AnyPool:
    """A pool of random rows, as many as the method keeps of prompts of the case's length."""
    text = case.config.text
    cache = variant.for_model(text)
    shapes = cache.pool_shapes(text, case.batch, case.context, jnp.dtype(case.dtype))
    dense = shapes.dense if isinstance(shapes, PackedPool) else shapes
    k, v = (random_rows(seed, dense.k.shape, case.dtype) for seed in (1, 2))
    none = jnp.zeros(dense.length.shape, jnp.int32)
    pool = Pool(k, v, none, none, jnp.zeros(none.shape), dense.most)
    if isinstance(shapes, PackedPool):
        bits, runs = min(shapes.quantizer.widths), jnp.zeros(shapes.first.shape, jnp.int32)
        pool = PackedPool(
            pool,
            random_words(3, shapes.words_k.shape),
            random_words(4, shapes.words_v.shape),
            random_scales(5, shapes.affine_k.shape, bits),
            random_scales(6, shapes.affine_v.shape, bits),
            runs,
            runs,
            shapes.quantizer,
            shapes.most_words,
        )
    return divided(pool, case, variant, seed=0)


def divided(pool: AnyPool, case: Case, variant: CacheMethod, seed: int) -> AnyPool:
    """The same pool with as many rows in each layer as prompts of that seed have: numbers alone."""
    rows = jnp.asarray(case.rows_by_width(variant, seed))
    offset = jnp.cumsum(rows[..., 0], axis=1, dtype=jnp.int32) - rows[..., 0]
    if isinstance(pool, Pool):
        return replace(pool, offset=offset, length=rows[..., 0])
    first = first_words(pool.quantizer, rows[..., 1:])
    dense = replace(pool.dense, offset=offset, length=rows[..., 0])
    return replace(pool, dense=dense, first=first, rows=rows[..., 1:])


class Decoding:
    """A cache of random rows, and the program that decodes from it."""

    def __init__(self, case: Case, variant: CacheMethod, params: Params):
        self.case, self.variant, self.params = case, variant, params
        self.generate = case.generate(variant, CHUNKS[-1] * case.chunk + 1)
        stages, settings = self.generate.stages, self.generate.settings(case.batch)
        token = 5 + jnp.arange(case.batch, dtype=jnp.int32) % 50
        length, dtype = jnp.full_like(token, case.context), jnp.dtype(case.dtype)
        # All of the state is made on the device, anew: the program takes it for its own.
        self.start = jax.jit(lambda: stages.start(token, length, settings, dtype))
        self.program = jax.jit(stages.decode_chunk, donate_argnums=2)
        self.pool = random_pool(case, variant)
        self.kept = case.kept(variant, self.pool)

    @property
    def work(self) -> Stage:
        """What one of the steps that are timed must do at least."""
        first, last = (count * self.case.chunk for count in CHUNKS)
        tail = round((first + last + 1) / 2)  # rows on average, the token's own among them
        case, (share, bits, _) = self.case, self.kept.values()
        step = decode_step(case.config, case.context, case.batch, share, bits, tail=tail)
        return in_type(step, case.dtype)

    def run(self, chunks: int, pool: AnyPool | None = None) -> jax.Array:
        """Decode `chunks` programs' steps, and do not wait: the last tokens, int32 [B, steps]."""
        return self._run(chunks, pool)[1]

    def _run(self, chunks: int, pool: AnyPool | None = None) -> tuple[DecodeState, jax.Array]:
        state, tokens = self.program(self.params, pool or self.pool, self.start())
        for _ in range(chunks - 1):
            state, tokens = self.program(self.params, pool or self.pool, state)
        return state, tokens

    def arguments(self) -> tuple[Params, AnyPool, DecodeState]:
        """Of the program's first chunk, which takes the state for its own."""
        return self.params, self.pool, self.start()

    def programs(self) -> int:
        """How many programs serve the caches of three batches of prompts."""
        pools = [divided(self.pool, self.case, self.variant, seed) for seed in (1, 2)]
        jax.block_until_ready(self.run(1))
        with measure.compilations() as seen:
            for pool in pools:
                jax.block_until_ready(self.run(1, pool))
        return 1 + len(seen)

    def step(
        self, short: measure.Timing | Exception, long: measure.Timing | Exception
    ) -> tuple[measure.Timing, dict[str, Any]]:
        """Time of one step, of what the programs of `CHUNKS` took, and what a row says of it.

        Raises:
            Exception: a program did not run, or did not pass `check`.
        """
        for found in (short, long):
            if isinstance(found, Exception):
                raise found
        assert isinstance(short, measure.Timing)
        assert isinstance(long, measure.Timing)
        self.check()
        steps = [count * self.case.chunk for count in CHUNKS]
        return measure.difference(long, short, steps[1] - steps[0]), {
            **self.kept,
            "programs": self.programs(),
            "program_samples": {"steps": steps, "seconds": [short.samples, long.samples]},
        }

    def check(self) -> None:
        """Raise where the steps did not write what they should.

        Raises:
            ArithmeticError: a value of the last layer or the logits are not finite, or a row was
                not written.
        """
        state, tokens = self._run(CHUNKS[-1])
        rows = jnp.stack([state.tail.k[-1], state.tail.v[-1]])
        if not bool(jnp.isfinite(rows).all() & (rows != 0).any(-1).all()):
            raise ArithmeticError("the decoded tokens' keys and values are not finite, or missing")
        if not bool(tokens.any()):  # the first of all NaN
            raise ArithmeticError("every token is 0: the logits are not finite")


def decode_rows(
    case: Case,
    variants: Variants,
    params: Params,
    limit: Device,
    effort: measure.Effort,
) -> list[dict[str, Any]]:
    """A decode step of every variant, all in turns: a row each."""
    made: dict[CacheMethod, Decoding | Exception] = {}
    programs: dict[str, Callable[[], Any]] = {}
    for variant in variants:
        try:
            made[variant] = decoding = Decoding(case, variant, params)
            jax.block_until_ready(decoding.pool)
        except Exception as error:  # mostly: it does not fit into the memory
            made[variant] = error.with_traceback(None)  # which would keep what was allocated
            continue
        for chunks in CHUNKS:
            programs[f"{name_of(variant)}, {chunks}"] = functools.partial(decoding.run, chunks)
    found = measure.compare(programs, calls=1, effort=effort)
    rows = []
    for variant, decoding in made.items():
        step, work, more = decoding, Stage({}), {}
        try:
            if isinstance(decoding, Decoding):
                short, long = (found[f"{name_of(variant)}, {chunks}"] for chunks in CHUNKS)
                step, more = decoding.step(short, long)
                work = decoding.work
        except Exception as error:  # the check's, or the memory's
            step = error
        assert not isinstance(step, Decoding)
        rows.append(row_of("decode", case, variant, step, work, limit, **more))
    beside_full(rows)
    return rows
