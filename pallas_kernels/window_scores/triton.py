"""Window statistics in Pallas for the Triton backend: two kernels, no T x T matrix.

rows      maximum and sum of each window row's softmax. The keys are split over programs, since
          a window has few rows; the parts are merged afterwards, which is a small array.
columns   one pass over the keys: each program has a block of keys and goes over the rows that
          see it, so a column's sum (and its maximum) stays in registers and is written once. No
          atomics: every run gives the same bits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tiles
from pallas_kernels.rows import LayerRows
from pallas_kernels.splits import split_count, trips
from pallas_kernels.tuning import WindowConfig, best


class OwnRows(NamedTuple):
    """Window rows that stand at positions of their own.

    Attributes:
        position: of each row, ascending, int32 [B, W].
        before: rows in front of each block of keys, and behind them the rows that are there, int32
            [B, key blocks + 1].
    """

    position: Any
    before: Any


def _start(start_ref: Any, batch: Any) -> Any:
    """Where a sequence's window begins, or the references of `OwnRows`."""
    return start_ref if isinstance(start_ref, OwnRows) else start_ref[batch]


def _positions(start: Any, batch: Any, rows: jax.Array, inside: jax.Array) -> jax.Array:
    """Where rows stand: one after the other from the start on, or each where it says."""
    if isinstance(start, OwnRows):
        return tiles.gather(start.position, (batch, rows), inside)
    return start + rows


def _rows_kernel(
    start_ref: Any,
    lengths_ref: Any,
    first_ref: Any,
    q_ref: Any,
    k_ref: Any,
    maximum_ref: Any,
    total_ref: Any,
    *,
    scale: float,
    block_rows: int,
    block_keys: int,
    splits: int,
) -> None:
    """References of one query head: q [W, H]; k [T, H]; maximum, total [splits, W].

    Of a layer in a buffer also `first` [1], the row of k that is key 0; else it is None.
    """
    block, split, batch = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    start, length = _start(start_ref, batch), lengths_ref[batch]
    first = 0 if first_ref is None else first_ref[0]
    rows = block * block_rows + jnp.arange(block_rows, dtype=jnp.int32)
    inside = rows < q_ref.shape[0]
    position = _positions(start, batch, rows, inside)
    real = inside & (position < length)
    q = tiles.load(q_ref, rows, real)
    columns = jnp.arange(block_keys, dtype=jnp.int32)

    def add(index: jax.Array, carry: Any) -> Any:
        maximum, total = carry
        keys = index * block_keys + columns
        valid = keys < length
        logits = tiles.dot(q, tiles.load(k_ref, first + keys, valid), trans_b=True) * scale
        seen = real[:, None] & (keys[None, :] <= position[:, None])
        logits = jnp.where(seen, logits, -jnp.inf)
        new = jnp.maximum(maximum, jnp.max(logits, axis=1))
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        weights = jnp.exp(logits - shift[:, None])
        return new, total * jnp.exp(maximum - shift) + jnp.sum(weights, axis=1)

    if isinstance(start, OwnRows):
        last = jnp.max(jnp.where(real, position, -1)) + 1
    else:
        last = jnp.minimum(start + (block + 1) * block_rows, length)
        last = jnp.where(start + block * block_rows < length, last, 0)
    blocks = trips(last, block_keys)
    each = trips(blocks, splits)
    begin = split * each
    nothing = (
        jnp.full((block_rows,), -jnp.inf, jnp.float32),
        jnp.zeros((block_rows,), jnp.float32),
    )
    maximum, total = lax.fori_loop(begin, jnp.minimum(begin + each, blocks), add, nothing)
    tiles.scatter(maximum_ref, (split, rows), inside, maximum)
    tiles.scatter(total_ref, (split, rows), inside, total)


def _columns_kernel(
    start_ref: Any,
    lengths_ref: Any,
    first_ref: Any,
    q_ref: Any,
    k_ref: Any,
    maximum_ref: Any,
    share_ref: Any,
    scores_ref: Any,
    zeroed_ref: Any,
    maxima_ref: Any,
    *,
    scale: float,
    threshold: float | None,
    block_rows: int,
    block_keys: int,
) -> None:
    """References of one kv head: q [W, G, H]; k [T, H]; maximum, share [G, W]; scores [T].

    `zeroed` is [G, key blocks]: what this block of keys adds to each query head's count; `maxima`
    is [T]. Either is None where it is not asked for. `first` is as in `_rows_kernel`.
    """
    block, batch = pl.program_id(0), pl.program_id(2)
    start, length = _start(start_ref, batch), lengths_ref[batch]
    first = 0 if first_ref is None else first_ref[0]
    window, group, _ = q_ref.shape
    keys = block * block_keys + jnp.arange(block_keys, dtype=jnp.int32)
    k = tiles.load(k_ref, first + keys, keys < length)
    lines = jnp.arange(block_rows, dtype=jnp.int32)
    # Rows before the block's first key do not see it.
    if isinstance(start, OwnRows):
        blocks = start.before.shape[1] - 1
        first_row, stop_row = start.before[batch, block], start.before[batch, blocks]
    else:
        first_row = jnp.maximum(block * block_keys - start, 0)
        stop_row = jnp.minimum(length - start, window)

    def query_head(head: jax.Array, sums: Any) -> Any:
        def add(index: jax.Array, carry: Any) -> Any:
            scores, zeroed, largest = carry
            rows = index * block_rows + lines
            real = rows < stop_row
            q = tiles.load(q_ref, rows, real, middle=(head,))
            logits = tiles.dot(q, k, trans_b=True) * scale
            maximum = tiles.gather(maximum_ref, (head, rows), real)
            share = tiles.gather(share_ref, (head, rows), real)
            seen = real[:, None] & (keys[None, :] <= _positions(start, batch, rows, real)[:, None])
            logits = jnp.where(seen, logits - maximum[:, None], -jnp.inf)
            weights = jnp.exp(logits)  # 1 at the row's maximum
            entries = weights * share[:, None]
            scores += jnp.sum(entries, axis=0)
            if largest is not None:
                largest = jnp.maximum(largest, jnp.max(entries, axis=0))
            if threshold is not None:
                small = seen & (weights < threshold)
                small = jnp.sum(small.astype(jnp.int32), axis=1, dtype=jnp.int32)
                zeroed += jnp.sum(small, axis=0, dtype=jnp.int32)
            return scores, zeroed, largest

        scores, maxima = sums
        bounds = first_row // block_rows, trips(stop_row, block_rows)
        carry = scores, jnp.int32(0), none
        scores, zeroed, largest = lax.fori_loop(*bounds, add, carry)
        if zeroed_ref is not None:
            zeroed_ref[head, block] = zeroed
        return scores, None if largest is None else maxima + largest

    nothing = jnp.zeros((block_keys,), jnp.float32)
    none = None if maxima_ref is None else nothing
    scores, maxima = lax.fori_loop(0, group, query_head, (nothing, none))
    inside = keys < scores_ref.shape[0]
    tiles.scatter(scores_ref, (keys,), inside, scores)
    if maxima_ref is not None:
        tiles.scatter(maxima_ref, (keys,), inside, maxima)


def window_scores(
    q: jax.Array,
    k: jax.Array | LayerRows,
    start: jax.Array,
    lengths: jax.Array,
    *,
    threshold: float | None,
    scale: float,
    weights: jax.Array | None = None,
    maxima: bool = False,
    config: WindowConfig | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """See the package's public function, of which it gives the scores, `zeroed` and `maxima`.

    `config` is that of the device by default.
    """
    batch, window, heads, head_dim = q.shape
    if isinstance(k, LayerRows):
        array, keys, kv_heads, first = k.k, k.rows, k.k.shape[1], k.first[None]
    else:
        array, (keys, kv_heads), first = k, k.shape[1:3], None
    group, pairs = heads // kv_heads, batch * heads * window * keys
    launch: WindowConfig = config or best("window_scores", q.dtype, head_dim)
    block_rows = min(launch.block_rows, tiles.padded(window))
    block_keys = min(launch.block_keys, tiles.padded(keys))
    call = functools.partial(
        tiles.call,
        config=launch,
        cost=pl.CostEstimate(
            flops=2 * pairs * head_dim,
            transcendentals=pairs,
            bytes_accessed=(q.size + array.size) * q.dtype.itemsize,
        ),
        scale=scale,
        block_rows=block_rows,
        block_keys=block_keys,
    )
    whole = pl.BlockSpec((batch,), lambda *_: (0,))
    of_first = None if first is None else pl.BlockSpec((1,), lambda *_: (0,))
    of_start: Any = whole
    rows_at: Any = start
    if start.ndim == 2:
        edges = jnp.arange(pl.cdiv(keys, block_keys), dtype=jnp.int32) * block_keys
        edges = jnp.append(jnp.broadcast_to(edges, (batch, edges.size)), lengths[:, None], axis=1)
        before = jnp.sum(start[:, :, None] < edges[:, None, :], axis=1, dtype=jnp.int32)
        rows_at = OwnRows(start, before)
        of_start = OwnRows(*(pl.BlockSpec(each.shape, lambda *_: (0, 0)) for each in rows_at))

    blocks = pl.cdiv(window, block_rows)
    splits = split_count(blocks * heads * batch, keys // block_keys, per_core=4, least=4)
    of_head = pl.BlockSpec((None, None, splits, window), lambda i, s, n, b: (b, n, 0, 0))
    maximum, total = call(
        _rows_kernel,
        "window_rows",
        grid=(blocks, splits, heads, batch),
        in_specs=[
            of_start,
            whole,
            of_first,
            pl.BlockSpec((None, window, None, head_dim), lambda i, s, n, b: (b, 0, n, 0)),
            tiles.of_kv_head(k, group),
        ],
        out_specs=[of_head] * 2,
        out_shape=[jax.ShapeDtypeStruct((batch, heads, splits, window), jnp.float32)] * 2,
        splits=splits,
    )(rows_at, lengths, first, q, array)
    # An entry is exp(logit - maximum) times the row's share, 1 / sum.
    highest = jnp.max(maximum, axis=2)
    highest = jnp.where(highest == -jnp.inf, 0.0, highest)
    total = jnp.sum(total * jnp.exp(maximum - highest[:, :, None]), axis=2)
    share = 1.0 / jnp.where(total == 0.0, 1.0, total)
    share = share.reshape(batch, kv_heads, group, window)
    if weights is not None:
        share *= weights[:, :, None, :]

    blocks, counted = pl.cdiv(keys, block_keys), threshold is not None
    columns = jax.ShapeDtypeStruct((batch, kv_heads, keys), jnp.float32)
    counts = jax.ShapeDtypeStruct((batch, kv_heads, group, blocks), jnp.int32)
    of_keys = pl.BlockSpec((None, None, keys), lambda j, h, b: (b, h, 0))
    of_blocks = pl.BlockSpec((None, None, group, blocks), lambda j, h, b: (b, h, 0, 0))
    by_head = pl.BlockSpec((None, None, group, window), lambda j, h, b: (b, h, 0, 0))
    scores, zeroed, largest = call(
        _columns_kernel,
        "window_columns",
        grid=(blocks, kv_heads, batch),
        in_specs=[
            of_start,
            whole,
            of_first,
            pl.BlockSpec((None, window, None, group, head_dim), lambda j, h, b: (b, 0, h, 0, 0)),
            tiles.of_kv_head(k),
            by_head,
            by_head,
        ],
        out_specs=[of_keys, of_blocks if counted else None, of_keys if maxima else None],
        out_shape=[columns, counts if counted else None, columns if maxima else None],
        threshold=threshold,
    )(
        rows_at,
        lengths,
        first,
        q.reshape(batch, window, kv_heads, group, head_dim),
        array,
        highest.reshape(batch, kv_heads, group, window),
        share,
    )
    if counted:
        zeroed = jnp.sum(zeroed, axis=-1, dtype=jnp.int32).reshape(batch, heads)
    return scores, zeroed, largest
