"""The kernels that read a cache against their dense references, and long prompts.

At long prompts, and in pools of more than 2^31 elements, a 32-bit index fails first.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import device, measure
from benchmarks.gpu_suite import checks
from benchmarks.gpu_suite.checks import BOUNDS, Errors, Group, host, variants
from benchmarks.gpu_suite.correctness import (
    FAR,
    KV_HEADS,
    Shape,
    label,
    prefill_group,
    scores_group,
    shapes,
)
from benchmarks.gpu_suite.stages import Context
from benchmarks.measure import reason
from benchmarks.operations import layer, packed_rows
from pallas_kernels import hadamard
from pallas_kernels import ragged_decode_attention as decode_op
from pallas_kernels.packing import per_word
from pallas_kernels.quantized_decode_attention import reference as packed_reference
from pallas_kernels.ragged_decode_attention import reference as decode_reference
from pallas_kernels.rows import NewToken, PackedRows, Segment, Tail

TAIL = 40

RUNS = ((8,), (2,), (4, 2))
"""Widths of the runs: all of them where all configurations run, else the last ones; of a dry run
the first, whose kernel is the smallest."""

NEEDED_BYTES = 24 * 10**9
"""Device memory from which on the large pools are tried: two of 4.3 GB, and what makes them."""


def decode(context: Context) -> dict[str, Any]:
    """The stage of the decode attention, with the new token and the merge of its splits."""
    rng = np.random.default_rng(context.seed)
    return checks.run(context, [_decode_group(rng, *shape) for shape in shapes(context)])


def packed(context: Context) -> dict[str, Any]:
    """The stage of the decode attention over packed rows, with the new token."""
    rng = np.random.default_rng(context.seed)
    groups = []
    for shape, every in shapes(context):
        if shape[0] != "float32":  # is left to XLA
            runs = RUNS[:1] if context.dry else RUNS if every else RUNS[-1:]
            groups += [_decode_group(rng, shape, every, bits) for bits in runs]
    return checks.run(context, groups)


def long(context: Context) -> dict[str, Any]:
    """The stage of long prompts and large pools: one at a time, each has the memory to itself."""
    rng = np.random.default_rng(context.seed)
    makers: list[functools.partial[Group]] = []
    lengths = (64,) if context.dry else (32768, 131072)
    for length in lengths:
        shape = "bfloat16", 16 if context.dry else 128, 1, length
        makers += [functools.partial(make, rng, shape, False)
                   for make in (_decode_group, prefill_group)]  # fmt: skip
        windows = (50, length) if length == lengths[0] else (50,)
        makers += [functools.partial(scores_group, rng, shape, False, rows) for rows in windows]
    makers[1:1] = [
        functools.partial(_large_pool_group, context, kv_heads)
        for kv_heads in ((8,) if context.dry else (8, 1))
    ]
    rows: list[dict[str, Any]] = []
    for make in makers:
        row = {"kernel": make.func.__name__, "case": str(make.args[1:])}
        try:
            rows = checks.run(context, [make()], rows)["rows"]
        except NotImplementedError as error:
            rows.append({**row, "ok": None, "note": str(error)})
        except Exception as error:  # inputs that could not be made, say
            rows.append({**row, "ok": False, "exception": reason(error)})
    return checks.summary(rows)


def _layer(rng: np.random.Generator, shape: Shape) -> tuple[NewToken, Segment, Tail]:
    """A new token, a layer's rows and its tail, NaN where nothing stands.

    The end of the pool, all of the pool, an empty layer, one token, nothing at all; the last tail
    has no room left.
    """
    dtype, head_dim, group, rows = shape
    offset: Any = np.array([rows // 3, 0, rows // 2, rows // 2, 0, 0], np.int32)
    length: Any = np.array([rows - rows // 3, rows, 0, 1, 0, 1], np.int32)
    fill: Any = np.array([TAIL - 1, 0, 1, TAIL // 2, 0, TAIL], np.int32)
    if rows > FAR:
        offset, length, fill = offset[:2], length[:2], fill[:2]
    heads = KV_HEADS * group, KV_HEADS
    draw = functools.partial(host, rng)
    new, pool, tail = layer(draw, dtype, len(fill), heads, head_dim, rows, TAIL)
    for b in range(len(fill)):
        for x in map(np.asarray, (pool.k, pool.v)):
            x[b, :, : offset[b]] = x[b, :, offset[b] + length[b] :] = np.nan
        for x in map(np.asarray, (tail.k, tail.v)):
            x[b, :, fill[b] :] = np.nan
    return new, replace(pool, offset=offset, length=length), replace(tail, fill=fill)


def _appended(new: NewToken, tail: Tail, *, transforms: bool) -> tuple[np.ndarray, Tail]:
    """The queries [B, N, H] of a new token, and the tail with it in it, where there is room.

    Queries and key are turned by RoPE, and then transformed where the cache is.
    """
    qkv = np.asarray(new.qkv)
    first, second = np.split(qkv[..., :-1, :].astype(np.float32), 2, axis=-1)
    cos, sin = (np.asarray(x)[:, None, None] for x in (new.cos, new.sin))
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(qkv.dtype)  # [B, K, G + 1, H]
    if transforms:
        size = qkv.shape[-1]
        mixed = turned.astype(np.float32) @ hadamard.signs(size).astype(np.float32)
        turned = (mixed * hadamard.factor(size)).astype(qkv.dtype)
    tail_k, tail_v, fill = (np.array(x) for x in (tail.k, tail.v, tail.fill))
    for b in np.flatnonzero(fill < TAIL):
        tail_k[b, :, fill[b]], tail_v[b, :, fill[b]] = turned[b, :, -1], qkv[b, :, -1]
    rows: Any = tail_k, tail_v, fill + 1
    return turned[:, :, :-1].reshape(len(turned), -1, turned.shape[-1]), Tail(*rows)


def _judge_appended(dtype: str, fill: Any) -> Callable[[list[np.ndarray], Any], Errors]:
    """Compares the attention, and the rows of the tails; what was NaN behind them must still be.

    The attention of a token that found no room has no meaning, but is finite.
    """
    room = fill < TAIL

    def judge(results: list[np.ndarray], expected: tuple[np.ndarray, ...]) -> Errors:
        error = checks.relative_error(results[0][room], expected[0][room])
        errors = {"out": (error + checks.not_finite(results[0]), BOUNDS[dtype])}
        for name, ours, other in zip(("tail k", "tail v"), results[1:3], expected[1:], strict=True):
            used = np.broadcast_to((np.arange(TAIL) <= fill[:, None])[:, None], ours.shape[:3])
            touched = 0.0 if np.isnan(ours[~used].astype(np.float32)).all() else 1.0
            error = checks.relative_error(ours[used], other[used])
            errors[name] = error + touched, BOUNDS[dtype]
        return errors

    return judge


def _ways(
    operation: str, shape: Shape, every: bool, splits: int, **most: int
) -> dict[str, Callable[..., Any]]:
    """A decode kernel in its configurations, and with other numbers of splits."""
    found = {}
    for count in (splits, None, 1):
        prefix = f"splits {count or 'default'}, "
        full = every and count == splits
        options: dict[str, Any] = {"every": full, "prefix": prefix, "splits": count, **most}
        found |= variants(operation, *shape[:2], **options)
    return found


def _runs(rng: np.random.Generator, shape: Shape, bits: tuple[int, ...]) -> PackedRows:
    """Packed rows whose scales are NaN where no row is.

    The last run of the pool's first sequence ends where the pool does; some runs are empty.
    """
    _, head_dim, _, length = shape
    counts = np.array([length, 0, 1, length // 2 + 1, 0, 1], np.int32)
    rows: Any = np.stack([np.roll(counts, -run) for run in reversed(range(len(bits)))], axis=1)
    most = [-(-length // per_word(width)) for width in bits]
    total, lanes = sum(most) + 3, per_word(min(bits))
    first: Any = np.array([total - sum(most[run:]) for run in range(len(bits))], np.int32)
    there = np.zeros((len(counts), total * lanes), bool)
    for b, run in np.ndindex(rows.shape):
        row, each = np.arange(int(rows[b, run])), per_word(bits[run])
        there[b, (first[run] + row // each) * lanes + row % each] = True

    def half(low: float, high: float) -> np.ndarray:
        x = rng.uniform(low, high, (len(counts), KV_HEADS, 1, total * lanes))
        x = np.where(there[:, None, None], x, np.nan).astype(jnp.bfloat16)
        return x.view(np.uint16).astype(np.uint32)

    affine: Any = [half(0.05, 0.3) | half(-1.0, 0.5) << 16 for _ in range(2)]
    draw = functools.partial(host, rng)
    found = packed_rows(draw, len(counts), KV_HEADS, head_dim, bits, total)
    first = np.broadcast_to(first, rows.shape).copy()
    return replace(found, affine_k=affine[0], affine_v=affine[1], first=first, rows=rows)


def _decode_group(
    rng: np.random.Generator, shape: Shape, every: bool, bits: tuple[int, ...] = ()
) -> Group:
    """A layer's rows, and with `bits` runs of packed ones beside them."""
    dtype, head_dim, _, rows = shape
    new, dense, tail = _layer(rng, shape)
    runs, words, most = [], label(shape), {"most_rows": rows}
    operation, name, splits = "ragged_decode_attention", "append_and_attend", 4
    reference: Callable[..., Any] = decode_reference.ragged_decode_attention
    if bits:
        runs, words = (
            [_runs(rng, shape, bits)],
            f"{words}, runs of {' and '.join(map(str, bits))} bits",
        )
        most["most_words"] = -(-rows // per_word(min(bits)))
        operation, name, splits = "quantized_decode_attention", f"quantized_{name}", 3
        reference = packed_reference.quantized_decode_attention

    def expected() -> tuple[Any, ...]:
        q, grown = _appended(new, tail, transforms=bool(bits))
        mixed = reference(q, dense, *runs, grown, scale=head_dim**-0.5)
        return mixed, grown.k, grown.v

    ways = _ways(operation, shape, every, splits, **most)
    inputs, judge = (new, dense, *runs, tail), _judge_appended(dtype, tail.fill)
    return Group(name, words, inputs, ways, expected, judge)


def _large_pool_group(context: Context, kv_heads: int) -> Group:
    """The last layer of a pool of 2^31 + 2^20 elements, on the device; all other layers are NaN.

    Raises:
        NotImplementedError: the device's memory is too small.
    """
    limit = device.memory_limit()
    if limit is not None and limit < NEEDED_BYTES:
        raise NotImplementedError(
            f"not available: {limit / 1e9:.0f} GB of memory are less than the 24 GB it needs"
        )
    dtype, head_dim = "bfloat16", 128
    capacity = (512 if context.dry else 2**24 + 2**13) // kv_heads
    length = 50 if context.dry else 3000

    def draw(dtype: str, *shape: int) -> jax.Array:
        return measure.normal(context.key(), shape, dtype)

    @jax.jit
    def place(rows: jax.Array) -> jax.Array:
        pool = jnp.full((1, kv_heads, capacity, head_dim), jnp.nan, dtype)
        return lax.dynamic_update_slice_in_dim(pool, rows, capacity - length, axis=2)

    new, rows, tail = layer(draw, dtype, 1, (4 * kv_heads, kv_heads), head_dim, length, 32)
    numbers = (jnp.array([n], jnp.int32) for n in (0, capacity - length, length, 9))
    first, offset, true, fill = numbers
    tail = replace(tail, fill=fill)
    sliced = Segment(rows.k, rows.v, offset=first, length=true)
    pool = Segment(place(rows.k), place(rows.v), offset=offset, length=true)

    def judge(results: list[np.ndarray], expected: np.ndarray) -> Errors:
        error = checks.relative_error(results[0], expected)
        return {"out": (error + checks.not_finite(results[0]), BOUNDS[dtype])}

    def expected() -> np.ndarray:
        settings = {"scale": head_dim**-0.5, "most_rows": length, "together": False}
        reference = decode_op.xla.append_and_attend
        return checks.in_float32(reference, new, sliced, tail, **settings)[0]

    shape = dtype, head_dim, 4, length
    ways = _ways("ragged_decode_attention", shape, False, 4, most_rows=length)
    words = f"{dtype}, {4 * kv_heads}/{kv_heads} heads of {head_dim}, pool of "
    words += f"{kv_heads * capacity * head_dim} elements"
    return Group("append_and_attend", words, (new, pool, tail), ways, expected, judge)
