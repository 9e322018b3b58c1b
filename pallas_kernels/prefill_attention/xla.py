"""Blockwise attention in XLA: blocks of queries, an online softmax over blocks of keys.

Both trip counts come from the true lengths, so that padding costs nothing. A block that would
reach past the end starts earlier instead and masks what was already done, so that any length
works without padding the arrays.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import online_softmax

QUERY_BLOCK = 256
KEY_BLOCK = 512


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
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    rows, columns = min(QUERY_BLOCK, length), min(KEY_BLOCK, length)
    longest = jnp.max(lengths)
    q = q.reshape(batch, length, kv_heads, group, head_dim)
    # Tied to q: else XLA makes the zeros of all layers of a model at once, before the first one.
    q, zero = lax.optimization_barrier((q, jnp.zeros((), q.dtype)))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]

    def query_block(index: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(index * rows, length - rows)
        block = lax.dynamic_slice_in_dim(q, start, rows, axis=1)
        block = block.transpose(0, 2, 3, 1, 4)  # [B, K, G, rows, H]
        block = block.reshape(batch, kv_heads, group * rows, head_dim)
        q_position = start + jnp.arange(rows, dtype=jnp.int32)
        stop = jnp.minimum(start + rows, longest) if causal else longest

        def key_block(index: jax.Array, partial: online_softmax.Partial) -> online_softmax.Partial:
            first = index * columns
            at = jnp.minimum(first, length - columns)
            position = at + jnp.arange(columns, dtype=jnp.int32)
            readable = (position >= first) & (position < lengths[:, None])  # [B, S]
            visible = readable[:, None, None, :]
            if causal:
                seen = position <= q_position[:, None]  # [rows, S]
                visible = visible & jnp.tile(seen, (group, 1))
            part = online_softmax.attend(
                block,
                lax.dynamic_slice_in_dim(k, at, columns, axis=2),
                lax.dynamic_slice_in_dim(v, at, columns, axis=2),
                visible,
                readable,
                scale,
            )
            return online_softmax.merge(partial, part)

        trips = (stop + columns - 1) // columns
        partial = lax.fori_loop(0, trips, key_block, online_softmax.empty(block))
        mixed = online_softmax.finish(partial).astype(q.dtype)
        mixed = mixed.reshape(batch, kv_heads, group, rows, head_dim).transpose(0, 3, 1, 2, 4)
        return lax.dynamic_update_slice_in_dim(out, mixed, start, axis=1)

    trips = (longest + rows - 1) // rows
    out = lax.fori_loop(0, trips, query_block, jnp.full_like(q, zero))
    return out.reshape(batch, length, heads, head_dim)
