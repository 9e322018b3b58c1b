"""How fast the operations on a cache are, beside their floor: bytes and operations at full rate.

Bytes are those really needed (each input read once, each result written once), operations those
that the mask leaves. All at the sizes of LLaVA-1.6-Mistral-7B unless a case says otherwise. The
operations on a prompt are in speed_prompt.py.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.gpu_suite import ceilings
from benchmarks.gpu_suite.checks import NOT_RUN
from benchmarks.gpu_suite.stages import Context
from benchmarks.roofline import Device, Work
from pallas_kernels.ragged_decode_attention import append_and_attend
from pallas_kernels.rows import NewToken, Segment, Tail
from vlcache_jax.cache.compact import compact

DTYPE, ITEM = "bfloat16", 2
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def rows_of(
    context: Context,
    case: str,
    work: Work,
    limit: Device,
    programs: dict[str, Callable[[], Any]],
    calls: int,
    others: Mapping[str, Work] | None = None,
) -> list[dict[str, Any]]:
    """Time several ways of doing the same: a row for each.

    Args:
        context: of the stage.
        case: what is done.
        work: of all programs but `others`.
        limit: what their shares are shares of.
        programs: by their names.
        calls: of the operation in each program.
        others: the work of programs that read something else.
    """
    rows, works = [], dict.fromkeys(programs, work) | dict(others or {})
    for name, found in measure.compare(programs, calls=calls, effort=context.effort).items():
        work = works[name]
        row = {"case": case, "backend": name, "bytes": work.bytes, "ops": work.operations}
        if isinstance(found, NotImplementedError):
            rows.append({**row, "ok": None, "note": f"not available: {found}"})
        elif isinstance(found, Exception):
            why = f"{type(found).__name__}: {found}"[:2000]
            rows.append({**row, "ok": False, "exception": why})
        else:
            rates = {
                "bytes_per_s": work.bytes / found.seconds,
                "ops_per_s": work.operations / found.seconds,
                "floor_s": work.floor(limit),
                "share": work.floor(limit) / found.seconds,
            }
            rows.append({**row, "ok": True, **rates, **found.record()})
    return rows


def result(rows: Sequence[dict[str, Any]], limit: Device, headline: str) -> dict[str, Any]:
    """A stage's result."""
    measured = {"copy_bytes_per_s": limit.bandwidth, "matmul_ops_per_s": limit.flops}
    ok = all(row["ok"] is not False for row in rows)
    not_run = sum(row.get("note") == NOT_RUN for row in rows)
    return {"rows": list(rows), **measured, "ok": ok, "not_run": not_run, "headline": headline}


# Decode attention.


@dataclass(frozen=True)
class DecodeCase:
    """One decode shape.

    Attributes:
        batch: B.
        kv_heads: K; 32 is Vicuna-7B's.
        rows: rows of a layer, the mean over the batch.
        uneven: the longest sequence has three times the rows of the shortest.
        xla: also time the XLA backend.
    """

    batch: int
    kv_heads: int
    rows: int
    uneven: bool = False
    xla: bool = False

    @property
    def lengths(self) -> np.ndarray:
        """Rows of each sequence."""
        spread = np.linspace(0.5, 1.5, self.batch) if self.uneven else np.ones(self.batch)
        return (spread * self.rows).astype(np.int32)

    def __str__(self) -> str:
        words = f"batch {self.batch}, {self.kv_heads} kv heads, {self.rows} rows"
        return words + (", uneven" if self.uneven else "")


DECODE_CASES = (
    DecodeCase(8, 8, 16384, xla=True),
    DecodeCase(4, 32, 8192, xla=True),
    DecodeCase(64, 8, 3276),
    DecodeCase(1, 8, 131072),
    DecodeCase(8, 8, 16384, uneven=True),
    DecodeCase(32, 32, 1024),
    DecodeCase(32, 8, 819),
    DecodeCase(8, 8, 819),
    DecodeCase(1, 8, 819, xla=True),
)
"""The first six read at least 512 MB; the last three are a tenth of 8192 tokens."""


def decode(context: Context) -> dict[str, Any]:
    """The stage of the decode attention."""
    limit = ceilings.quick(context)
    rows: list[dict[str, Any]] = []
    cases = (DecodeCase(2, 8, 40, True, True),) if context.dry else DECODE_CASES
    for done, case in enumerate(cases):
        context.progress(done, len(cases))
        if context.late():
            rows.append({"case": str(case), "ok": None, "note": NOT_RUN})
            continue
        sets, shared, work = decode_sets(context, case)
        backends = ("triton", "xla") if case.xla else ("triton",)
        programs = {name: decode_program(name, case, sets, shared) for name in backends}
        rows += rows_of(context, str(case), work, limit, programs, len(sets))
        del sets, shared, programs
        context.save(rows=rows)
    best = max((row.get("share", 0.0) for row in rows), default=0.0)
    return result(rows, limit, f"at best {best:.0%} of the copy's bandwidth")


def decode_sets(
    context: Context,
    case: DecodeCase,
    head_dim: int = HEAD_DIM,
    dtype: str = DTYPE,
    layers: int | None = None,
) -> tuple[list[Any], tuple[Tail], Work]:
    """New tokens and layers of one pool as input sets, the tail, and the work of one layer.

    As many layers as are larger than the cache, where their number is not given.
    """
    lengths, batch = case.lengths, case.batch
    tail_rows, fill = (8, 5) if context.dry else (128, 64)
    head_dim = 16 if context.dry else head_dim
    row_bytes = 2 * case.kv_heads * head_dim * jnp.dtype(dtype).itemsize  # of K and V
    layers = layers or measure.sets_for(int(lengths.sum()) * row_bytes, dry=context.dry)
    each = int(lengths.max())

    def draw(*shape: int) -> jax.Array:
        return measure.normal(context.key(), shape, dtype)

    k, v = (draw(batch, case.kv_heads, layers * each, head_dim) for _ in range(2))
    tail = [draw(batch, case.kv_heads, tail_rows, head_dim) for _ in range(2)]
    sets = [
        (
            new_token(context, batch, case.kv_heads, head_dim, dtype),
            Segment(k, v, jnp.full((batch,), layer * each, jnp.int32), jnp.asarray(lengths)),
        )
        for layer in range(layers)
    ]
    rows = int(lengths.sum()) + batch * fill
    # The product is read, and as much is written: the result, the new key and value.
    work = Work(rows * row_bytes + 2 * sets[0][0].qkv.nbytes, 4 * rows * HEADS * head_dim)
    return sets, (Tail(*tail, fill=jnp.full((batch,), fill, jnp.int32)),), work


def new_token(context: Context, batch: int, kv_heads: int, head_dim: int, dtype: str) -> NewToken:
    """A random one."""
    qkv = batch, kv_heads, HEADS // kv_heads + 2, head_dim
    angle = measure.normal(context.key(), (batch, head_dim // 2), "float32")
    return NewToken(measure.normal(context.key(), qkv, dtype), jnp.cos(angle), jnp.sin(angle))


def decode_program(
    backend: str, case: DecodeCase, sets: list[Any], shared: tuple[Tail]
) -> Callable[[], Any]:
    """A program of the decode attention over `decode_sets`."""
    most = int(case.lengths.max())
    attend = functools.partial(append_and_attend, most_rows=most, backend=backend)
    return measure.chain(again(attend), sets, shared, carries=True)


def again(operation: Callable[..., tuple[jax.Array, Tail]]) -> Callable[..., tuple[Any, Tail]]:
    """A decode operation that writes the same row of the tail at every call of a program."""

    def call(*arrays: Any, **settings: Any) -> tuple[jax.Array, Tail]:
        out, tail = operation(*arrays, **settings)
        return out, replace(tail, fill=arrays[-1].fill)

    return call


# Compaction.


def compaction(context: Context) -> dict[str, Any]:
    """The stage of `compact`: a tenth of 8192 tokens of 32 layers."""
    limit = ceilings.quick(context)
    layers, kv_heads, length, head_dim = (
        (2, 2, 40, 16) if context.dry else (32, KV_HEADS, 8192, HEAD_DIM)
    )
    capacity = -(-layers * length // 10 // 128) * 128
    rng = np.random.default_rng(context.seed)
    shares = rng.uniform(0.5, 1.5, layers)
    budgets = np.minimum(capacity * shares / shares.sum(), length).astype(np.int32)[None]
    full = [
        measure.normal(context.key(), (1, kv_heads, layers * length, head_dim), DTYPE)
        for _ in range(2)
    ]

    @jax.jit
    def order(key: jax.Array) -> jax.Array:
        drawn = jax.random.uniform(key, (1, layers, kv_heads, length))
        return jnp.argsort(drawn, axis=-1).astype(jnp.int32)

    visual = jnp.zeros((1, layers), jnp.float32)
    sets = [(order(context.key()), jnp.asarray(budgets), visual) for _ in range(2)]

    def call(order: jax.Array, budgets: jax.Array, visual: jax.Array, k: Any, v: Any) -> Any:
        return compact(k, v, order, budgets, visual, capacity)

    moved = 4 * capacity * kv_heads * head_dim * ITEM + 4 * math.prod((capacity, kv_heads))
    rows = rows_of(
        context,
        f"{layers} layers of {length} tokens to {capacity} rows",
        Work(moved),
        limit,
        {"xla": measure.chain(call, sets, full)},
        len(sets),
    )
    share = rows[0].get("share", 0.0)
    return result(rows, limit, f"{share:.0%} of the copy's bandwidth")
