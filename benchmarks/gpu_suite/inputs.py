"""What the operations are timed on: input sets that together are larger than the L2 cache."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.gpu_suite.stages import Context
from benchmarks.operations import Draw, layer, packed_rows, prompt
from benchmarks.roofline import Work
from pallas_kernels.packing import join_affine, per_word
from pallas_kernels.rows import Tail

DTYPE = "bfloat16"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


@dataclass(frozen=True)
class Sets:
    """Inputs of the calls of one program.

    Attributes:
        sets: of each call; together larger than the L2 cache.
        work: of one call.
        shared: what all calls are given beside their own.
        carries: a call writes the tail, which the next one is given: the same row each time.
    """

    sets: list[Any]
    work: Work
    shared: tuple[Any, ...] = ()
    carries: bool = False

    def operation(self, function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        """A function with its settings, as `measure.program_of` takes it."""
        if not self.carries:
            return partial(function, **settings)

        def again(*arrays: Any, **more: Any) -> tuple[jax.Array, Tail]:
            out, tail = function(*arrays, **settings, **more)
            return out, replace(tail, fill=arrays[-1].fill)

        return again

    def chain(self, function: Callable[..., Any], **settings: Any) -> Callable[[], Any]:
        """What launches a program of all calls."""
        operation = self.operation(function, **settings)
        return measure.chain(operation, self.sets, self.shared, carries=self.carries)


def drawing(context: Context) -> Draw:
    """Draws on the device, another array at each call."""

    def draw(dtype: str, *sides: int) -> jax.Array:
        if dtype == "uint32":
            return jax.random.bits(context.key(), sides, jnp.uint32)
        return measure.normal(context.key(), sides, dtype)

    return draw


@dataclass(frozen=True)
class CacheCase:
    """One shape of a layer.

    Attributes:
        batch: B.
        kv_heads: K; 32 is Vicuna-7B's.
        rows: rows of full width, the mean over the batch.
        runs: bits and rows of each run of packed rows.
        uneven: the longest sequence has three times the rows of the shortest.
        xla: also time the XLA backend.
    """

    batch: int
    kv_heads: int
    rows: int
    runs: tuple[tuple[int, int], ...] = ()
    uneven: bool = False
    xla: bool = False

    @property
    def lengths(self) -> np.ndarray:
        """Rows of full width of each sequence."""
        spread = np.linspace(0.5, 1.5, self.batch) if self.uneven else np.ones(self.batch)
        return (spread * self.rows).astype(np.int32)

    @property
    def words(self) -> list[int]:
        """Word-rows of each run."""
        return [-(-rows // per_word(bits)) for bits, rows in self.runs]

    @property
    def packed(self) -> int:
        """Packed rows of a sequence."""
        return sum(rows for _, rows in self.runs)

    @property
    def settings(self) -> dict[str, int]:
        """What a decode operation is told of the layer."""
        most = {"most_rows": int(self.lengths.max())}
        return {**most, "most_words": sum(self.words)} if self.runs else most

    def __str__(self) -> str:
        rows = " and ".join(f"{rows} rows of {bits} bits" for bits, rows in self.runs)
        words = f"batch {self.batch}, {self.kv_heads} kv heads, {rows or f'{self.rows} rows'}"
        return words + (", uneven" if self.uneven else "")


DECODE_CASES = (
    CacheCase(8, 8, 16384, xla=True),
    CacheCase(4, 32, 8192, xla=True),
    CacheCase(64, 8, 3276),
    CacheCase(1, 8, 131072),
    CacheCase(8, 8, 16384, uneven=True),
    CacheCase(32, 32, 1024),
    CacheCase(32, 8, 819),
    CacheCase(8, 8, 819),
    CacheCase(1, 8, 819, xla=True),
)
"""The first six read at least 512 MB; the last three are a tenth of 8192 tokens."""

RECENT = 128
"""Rows of full width beside packed ones."""

PACKED_DRY = CacheCase(2, 8, 8, ((8, 8), (4, 40)), xla=True)
PACKED_CASES = (
    CacheCase(8, 8, RECENT, ((2, 16384),), xla=True),
    CacheCase(8, 8, RECENT, ((4, 2048), (2, 14336))),
    CacheCase(8, 8, RECENT, ((4, 16384),)),
    CacheCase(8, 8, RECENT, ((8, 16384),)),
    CacheCase(4, 32, RECENT, ((2, 8192),)),
    CacheCase(64, 8, RECENT, ((2, 3276),)),
    CacheCase(1, 8, RECENT, ((2, 131072),)),
    CacheCase(24, 8, RECENT, ((2, 3276),)),
    CacheCase(8, 8, RECENT, ((2, 819),)),
)
"""The first seven are at least 512 MB in bfloat16; the last two are a tenth."""


def cache_sets(
    context: Context,
    case: CacheCase,
    head_dim: int = HEAD_DIM,
    dtype: str = DTYPE,
    layers: int | None = None,
) -> Sets:
    """Layers of one pool as input sets: as many as are larger than the cache, if not given."""
    draw, batch, kv_heads, lengths = drawing(context), case.batch, case.kv_heads, case.lengths
    tail_rows, fill = (8, 5) if context.dry else (128, 64)
    head_dim = 16 if context.dry else head_dim
    each, used = int(lengths.max()), int(lengths.sum()) + batch * fill
    size = 2 * kv_heads * used * head_dim * jnp.dtype(dtype).itemsize  # of K and V
    size += 8 * kv_heads * batch * (sum(case.words) * head_dim + case.packed)  # words and scales
    layers = layers or measure.sets_for(size, dry=context.dry)
    heads = HEADS, kv_heads
    new, pool, tail = layer(draw, dtype, batch, heads, head_dim, layers * each, tail_rows)

    def numbers(value: int) -> jax.Array:
        return jnp.full((batch,), value, jnp.int32)

    sets: list[Any] = [
        (new, replace(pool, offset=numbers(index * each), length=jnp.asarray(lengths)))
        for index in range(layers)
    ]
    if case.runs:
        bits, rows = (jnp.array(part, jnp.int32) for part in zip(*case.runs, strict=True))
        widths, words = tuple(map(int, bits)), sum(case.words)
        held = packed_rows(draw, batch, kv_heads, head_dim, widths, layers * words)
        shape = held.affine_k.shape
        scales = (
            jax.random.uniform(context.key(), shape, minval=0.1, maxval=0.3) for _ in range(2)
        )
        affine_k, affine_v = (join_affine(scale, -1.5 * scale) for scale in scales)
        rows = jnp.tile(rows, (batch, 1))
        held = replace(held, affine_k=affine_k, affine_v=affine_v, rows=rows)
        begins = jnp.cumsum(jnp.array([0, *case.words[:-1]], jnp.int32))
        sets = [
            (*own, replace(held, first=jnp.tile(index * words + begins, (batch, 1))))
            for index, own in enumerate(sets)
        ]
    # The product is read, and as much is written: the result, the new key and value.
    operations = 4 * (used + batch * case.packed) * HEADS * head_dim
    work = Work(size + 2 * new.qkv.nbytes, operations)
    return Sets(sets, work, (replace(tail, fill=numbers(fill)),), carries=True)


def _heads(context: Context) -> tuple[int, int]:
    return (4, 2) if context.dry else (HEADS, KV_HEADS)


def prefill_sets(
    context: Context, length: int, head_dim: int = HEAD_DIM, dtype: str = DTYPE
) -> Sets:
    """Queries, keys and values of one prompt."""
    heads, head_dim = _heads(context), 16 if context.dry else head_dim
    size = 2 * length * sum(heads) * head_dim * jnp.dtype(dtype).itemsize  # the result too
    count = measure.sets_for(size, dry=context.dry)
    draw = drawing(context)
    sets = [prompt(draw, dtype, 1, length, heads, head_dim) for _ in range(count)]
    return Sets(sets, Work(size, 4 * heads[0] * head_dim * length * length // 2))


def scores_sets(
    context: Context, length: int, window: int, head_dim: int = HEAD_DIM, dtype: str = DTYPE
) -> Sets:
    """Queries of a window, keys, where it begins and the length: one pass over the keys."""
    heads, kv_heads = _heads(context)
    draw, head_dim = drawing(context), 16 if context.dry else head_dim
    read = (window * heads + length * kv_heads) * head_dim * jnp.dtype(dtype).itemsize
    start, lengths = (jnp.array([n], jnp.int32) for n in (length - window, length))
    sets = [
        (
            draw(dtype, 1, window, heads, head_dim),
            draw(dtype, 1, length, kv_heads, head_dim),
            start,
            lengths,
        )
        for _ in range(measure.sets_for(read, dry=context.dry))
    ]
    pairs = window * (length - window) + window * (window + 1) // 2
    return Sets(sets, Work(read + 4 * kv_heads * length, 2 * heads * head_dim * pairs))
