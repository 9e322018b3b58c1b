"""Blocks of window rows; for each, one pass over the keys for the softmax's maximum and sum, and
one that adds up the columns. Both trip counts come from the true lengths.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.rows import LayerRows, read_rows

ROW_BLOCK = 128
KEY_BLOCK = 512

Sums = tuple[jax.Array, jax.Array | None, jax.Array | None]


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
) -> Sums:
    """See the package's public function, of which it gives the scores, `zeroed` and `maxima`."""
    batch, window, heads, head_dim = q.shape
    layer = k if isinstance(k, LayerRows) else LayerRows.alone(k, k)
    keys, kv_heads = layer.rows, layer.k.shape[1]
    group = heads // kv_heads
    rows, columns = min(ROW_BLOCK, window), min(KEY_BLOCK, keys)
    q = q.reshape(batch, window, kv_heads, group, head_dim)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def row_block(index: jax.Array, sums: Sums) -> Sums:
        first_row = index * rows
        # A block that would reach past the end starts earlier and skips what was already done.
        row_at = jnp.minimum(first_row, window - rows)
        block = lax.dynamic_slice_in_dim(q, row_at, rows, axis=1)
        row = row_at + jnp.arange(rows, dtype=jnp.int32)
        if start.ndim == 2:
            position = lax.dynamic_slice_in_dim(start, row_at, rows, axis=1)  # [B, rows]
        else:
            position = start[:, None] + row
        real = (row >= first_row) & (position < lengths[:, None])
        stop = jnp.max(jnp.where(real, position, -1)) + 1
        trips = (stop + columns - 1) // columns

        def logits_of(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            """Logits and visibility [B, K, G, rows, S] of a block of keys, and where it begins."""
            at = jnp.minimum(index * columns, keys - columns)
            key = at + jnp.arange(columns, dtype=jnp.int32)
            logits = jnp.einsum(
                "brkgh,bksh->bkgrs",
                block,
                read_rows(layer.k, layer.first + at, columns),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            seen = real[:, :, None] & (key <= position[:, :, None]) & (key >= index * columns)
            seen = jnp.broadcast_to(seen[:, None, None], logits.shape)
            return jnp.where(seen, logits * scale, -jnp.inf), seen, at

        def softmax_pass(
            index: jax.Array, carry: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            highest, total = carry
            logits, _, _ = logits_of(index)
            new = jnp.maximum(highest, jnp.max(logits, axis=-1))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            added = jnp.sum(jnp.exp(logits - shift[..., None]), axis=-1)
            return new, total * jnp.exp(highest - shift) + added

        shape = (batch, kv_heads, group, rows)
        nothing = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
        highest, total = lax.fori_loop(0, trips, softmax_pass, nothing)
        highest = jnp.where(highest == -jnp.inf, 0.0, highest)[..., None]
        total = jnp.where(total == 0.0, 1.0, total)[..., None]
        if weights is not None:
            counts = lax.dynamic_slice_in_dim(weights, row_at, rows, axis=2)
            total = total / counts[:, :, None, :, None]  # a row that counts nothing is divided away

        def column_pass(index: jax.Array, sums: Sums) -> Sums:
            scores, zeroed, largest = sums
            logits, seen, at = logits_of(index)
            weights = jnp.exp(logits - highest)  # 1 at the row's maximum
            old = lax.dynamic_slice_in_dim(scores, at, columns, axis=2)
            entries = weights / total
            new = old + jnp.sum(entries, axis=(2, 3))
            scores = lax.dynamic_update_slice_in_dim(scores, new, at, axis=2)
            if zeroed is not None and threshold is not None:
                small = seen & (weights < threshold)
                zeroed += jnp.sum(small, axis=(3, 4), dtype=jnp.int32)
            if largest is not None:
                old = lax.dynamic_slice_in_dim(largest, at, columns, axis=3)
                new = jnp.maximum(old, jnp.max(entries, axis=3))
                largest = lax.dynamic_update_slice_in_dim(largest, new, at, axis=3)
            return scores, zeroed, largest

        return lax.fori_loop(0, trips, column_pass, sums)

    counts = None if threshold is None else jnp.zeros((batch, kv_heads, group), jnp.int32)
    # Of each query head: a sum of maxima is no maximum of sums.
    largest = jnp.zeros((batch, kv_heads, group, keys), jnp.float32) if maxima else None
    sums = jnp.zeros((batch, kv_heads, keys), jnp.float32), counts, largest
    if start.ndim == 2:
        true_rows = jnp.max(jnp.sum(start < lengths[:, None], axis=1, dtype=jnp.int32))
    else:
        true_rows = jnp.max(jnp.minimum(lengths - start, window))
    trips = (true_rows + rows - 1) // rows
    scores, zeroed, largest = lax.fori_loop(0, trips, row_block, sums)
    zeroed = None if zeroed is None else zeroed.reshape(batch, heads)
    return scores, zeroed, None if largest is None else jnp.sum(largest, axis=2)
