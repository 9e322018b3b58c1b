"""Online softmax over blocks of the layer's pool segment, then one block for the tail."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import online_softmax
from pallas_kernels.rope import rotate
from pallas_kernels.rows import NewToken, Segment, Tail

BLOCK_BYTES = 2**21
"""Keys and values that are read at a time, of all sequences: what stays in a core's cache, where a
larger block is written to memory and read again."""

BLOCK_ROWS = 64, 512
"""Fewest and most rows of a block."""


def block_rows(pool_k: jax.Array) -> int:
    """Rows of a block of keys [B, K, rows, H] and their values."""
    batch, kv_heads, _, head_dim = pool_k.shape
    fewest, most = BLOCK_ROWS
    rows = BLOCK_BYTES // (2 * batch * kv_heads * head_dim * pool_k.dtype.itemsize)
    return max(fewest, min(most, rows // fewest * fewest))


def attend_segments(
    grouped: jax.Array,
    pool_k: jax.Array,
    pool_v: jax.Array,
    offset: jax.Array,
    length: jax.Array,
    tail_k: jax.Array,
    tail_v: jax.Array,
    fill: jax.Array,
    *,
    scale: float,
) -> online_softmax.Partial:
    """Attention of the queries [B, K, G, H] over the layer's segment of the pool and its tail."""
    capacity = pool_k.shape[2]
    columns = min(block_rows(pool_k), capacity)

    def key_block(index: jax.Array, partial: online_softmax.Partial) -> online_softmax.Partial:
        first = offset + index * columns
        # A slice past the end would be moved back in silence: move it here, and mask.
        start = jnp.minimum(first, capacity - columns)
        position = start[:, None] + jnp.arange(columns)
        readable = (position >= first[:, None]) & (position < (offset + length)[:, None])
        k, v = (read_rows(pool, start, columns) for pool in (pool_k, pool_v))
        visible = readable[:, None, None, :]
        part = online_softmax.attend(grouped, k, v, visible, readable, scale)
        return online_softmax.merge(partial, part)

    used = jnp.arange(tail_k.shape[2]) < fill[:, None]
    partial = online_softmax.attend(grouped, tail_k, tail_v, used[:, None, None, :], used, scale)
    trips = (jnp.max(length) + columns - 1) // columns
    return lax.fori_loop(0, trips, key_block, partial)


def read_rows(pool: jax.Array, start: jax.Array, rows: int, axis: int = 1) -> jax.Array:
    """Each sequence's own rows from its own start: [B, K, S, H] -> [B, K, rows, H].

    Args:
        pool: all rows.
        start: int32 [B].
        rows: how many.
        axis: where the rows are in one sequence's array.
    """
    return jax.vmap(lambda part, at: lax.dynamic_slice_in_dim(part, at, rows, axis=axis))(
        pool, start
    )


def append_and_attend(
    new: NewToken, pool: Segment, tail: Tail, *, scale: float, most_rows: int, together: bool
) -> tuple[jax.Array, Tail]:
    """RoPE of a new token, its row into the tail, and its attention.

    Args:
        new: the token's product, qkv [B, K, G + 2, H], and its angles, cos and sin [B, H / 2].
        pool: the layer's rows, k and v [B, K, capacity, H] with offset and length int32 [B].
        tail: the tokens before, k and v [B, K, R, H] with fill int32 [B].
        scale: factor of the logits.
        most_rows: not used: the blocks are those of the longest row.
        together: all of `fill` are equal.

    Returns:
        The attention [B, K * G, H] in qkv's type, and the tail with the token.
    """
    del most_rows
    turned = rotate(new.qkv[:, :, :-1], new.cos[:, None, None], new.sin[:, None, None])
    tail = append(tail, turned[:, :, -1:], new.qkv[:, :, -1:], together)
    segments = pool.k, pool.v, pool.offset, pool.length, tail.k, tail.v, tail.fill
    partial = attend_segments(turned[:, :, :-1], *segments, scale=scale)
    return finish(partial, new), tail


def finish(partial: online_softmax.Partial, new: NewToken) -> jax.Array:
    """The attention of a new token's heads [B, K * G, H] in its type."""
    out = online_softmax.finish(partial).astype(new.qkv.dtype)
    return out.reshape(out.shape[0], -1, out.shape[3])


def append(tail: Tail, k: jax.Array, v: jax.Array, together: bool) -> Tail:
    """Write the new token's row of one layer into its tail, where there is room for it.

    Args:
        tail: k and v [B, K, R, H].
        k: the new key, [B, K, 1, H].
        v: the new value, [B, K, 1, H].
        together: all of `tail.fill` are equal: one update in place.
    """

    def put(rows: jax.Array, new: jax.Array) -> jax.Array:
        new, at = new.astype(rows.dtype), tail.fill
        if not together:
            return rows.at[jnp.arange(at.size), :, at].set(new[:, :, 0], mode="drop")
        # An update past the end would be moved back in silence, onto a row that is in use.
        last = lax.dynamic_slice_in_dim(rows, at[0], 1, axis=2)
        new = jnp.where(at[0] < rows.shape[2], new, last)
        return lax.dynamic_update_slice_in_dim(rows, new, at[0], axis=2)

    return Tail(put(tail.k, k), put(tail.v, v), tail.fill + 1)
