"""Blockwise attention in XLA: blocks of queries, an online softmax over blocks of keys.

Both trip counts come from the true lengths, so that padding costs nothing. A block that would
reach past the end starts earlier instead and masks what was already done, so that any length
works without padding the arrays.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import online_softmax
from pallas_kernels.rows import LayerRows, read_rows

QUERY_BLOCK = KEY_BLOCK = 128
"""Rows of a block: their logits stay in a CPU's cache, and little of what no query sees is worked
out. Of 512 rows of 4 heads of 32 it takes half of the time of 256 x 512, as of the 577 patches of a
vision tower of 16 heads of 64; of 4,096 rows less too."""


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    causal: bool,
    scale: float,
) -> jax.Array:
    """See the package's public function."""
    start = jnp.zeros((1,), jnp.int32)
    return _attend(q, LayerRows.alone(k, v), start, lengths, causal=causal, scale=scale)


def chunk_attention(
    q: jax.Array, layer: LayerRows, start: jax.Array, lengths: jax.Array, *, scale: float
) -> jax.Array:
    """See the package's public function."""
    return _attend(q, layer, start, lengths, causal=True, scale=scale)


def _attend(
    q: jax.Array,
    layer: LayerRows,
    start: jax.Array,
    lengths: jax.Array,
    *,
    causal: bool,
    scale: float,
) -> jax.Array:
    """Attention of the queries [B, Tq, N, H] from position `start` on, int32 [B] or [1]."""
    batch, length, heads, head_dim = q.shape
    kv_heads = layer.k.shape[1]
    group = heads // kv_heads
    rows, columns = min(QUERY_BLOCK, length), min(KEY_BLOCK, layer.rows)
    q = q.reshape(batch, length, kv_heads, group, head_dim)
    # Tied to q: else XLA makes the zeros of all layers of a model at once, before the first one.
    q, zero = lax.optimization_barrier((q, jnp.zeros((), q.dtype)))

    def query_block(index: jax.Array, out: jax.Array) -> jax.Array:
        row_at = jnp.minimum(index * rows, length - rows)
        block = lax.dynamic_slice_in_dim(q, row_at, rows, axis=1)
        block = block.transpose(0, 2, 3, 1, 4)  # [B, K, G, rows, H]
        block = block.reshape(batch, kv_heads, group * rows, head_dim)
        q_position = start[:, None] + row_at + jnp.arange(rows, dtype=jnp.int32)  # [B, rows]
        stop = lengths
        if causal:
            stop = jnp.where(q_position[:, 0] < lengths, q_position[:, -1] + 1, 0)
            stop = jnp.minimum(stop, lengths)

        def key_block(index: jax.Array, partial: online_softmax.Partial) -> online_softmax.Partial:
            first = index * columns
            at = jnp.minimum(first, layer.rows - columns)
            position = at + jnp.arange(columns, dtype=jnp.int32)
            readable = (position >= first) & (position < lengths[:, None])  # [B, S]
            visible = readable[:, None, :]
            if causal:
                visible = visible & (position <= q_position[:, :, None])  # [B, rows, S]
                visible = jnp.tile(visible, (1, group, 1))
            k, v = (read_rows(x, layer.first + at, columns) for x in (layer.k, layer.v))
            part = online_softmax.attend(block, k, v, visible[:, None], readable, scale)
            return online_softmax.merge(partial, part)

        trips = (jnp.max(stop) + columns - 1) // columns
        partial = lax.fori_loop(0, trips, key_block, online_softmax.empty(block))
        mixed = online_softmax.finish(partial).astype(q.dtype)
        mixed = mixed.reshape(batch, kv_heads, group, rows, head_dim).transpose(0, 3, 1, 2, 4)
        return lax.dynamic_update_slice_in_dim(out, mixed, row_at, axis=1)

    trips = (jnp.max(jnp.clip(lengths - start, 0, length)) + rows - 1) // rows
    out = lax.fori_loop(0, trips, query_block, jnp.full_like(q, zero))
    return out.reshape(batch, length, heads, head_dim)
