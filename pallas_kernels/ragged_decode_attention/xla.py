"""Online softmax over blocks of the layer's pool segment, then one block for the tail."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import online_softmax
from pallas_kernels.rope import rotate

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


def ragged_decode_attention(
    q: jax.Array,
    pool_k: jax.Array,
    pool_v: jax.Array,
    offset: jax.Array,
    length: jax.Array,
    tail_k: jax.Array,
    tail_v: jax.Array,
    fill: jax.Array,
    *,
    scale: float,
    mean_rows: int,
) -> jax.Array:
    """See the package's public function; [B, N, H] -> [B, N, H]."""
    del mean_rows  # the blocks are those of the longest row
    batch, heads, head_dim = q.shape
    kv_heads = pool_k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    arrays = pool_k, pool_v, offset, length, tail_k, tail_v, fill
    partial = attend_segments(grouped, *arrays, scale=scale)
    return online_softmax.finish(partial).astype(q.dtype).reshape(batch, heads, head_dim)


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
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pool_k: jax.Array,
    pool_v: jax.Array,
    offset: jax.Array,
    length: jax.Array,
    tail_k: jax.Array,
    tail_v: jax.Array,
    fill: jax.Array,
    *,
    scale: float,
    mean_rows: int,
    together: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See the package's public function."""
    batch, _, rows, head_dim = qkv.shape
    cos, sin = cos[:, None, None], sin[:, None, None]
    q = rotate(qkv[:, :, : rows - 2], cos, sin).reshape(batch, -1, head_dim)
    at = fill[0] if together else fill
    tail_k = append(tail_k, rotate(qkv[:, :, rows - 2 : rows - 1], cos, sin), at)
    tail_v = append(tail_v, qkv[:, :, rows - 1 :], at)
    tails = tail_k, tail_v, fill + 1
    out = ragged_decode_attention(
        q, pool_k, pool_v, offset, length, *tails, scale=scale, mean_rows=mean_rows
    )
    return out, tail_k, tail_v


def append(rows: jax.Array, new: jax.Array, fill: jax.Array) -> jax.Array:
    """Write the new token's row of one layer into its tail.

    Args:
        rows: [B, K, R, H].
        new: [B, K, 1, H].
        fill: where to write, int32 [] for the whole batch (one update in place) or [B].
    """
    new = new.astype(rows.dtype)
    if fill.ndim == 0:
        return lax.dynamic_update_slice_in_dim(rows, new, fill, axis=2)
    return jax.vmap(lambda r, n, at: lax.dynamic_update_slice_in_dim(r, n, at, axis=1))(
        rows, new, fill
    )
