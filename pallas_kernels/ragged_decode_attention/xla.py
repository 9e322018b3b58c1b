"""Online softmax over blocks of each sequence's segment of the pool, and over those of its tail."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import online_softmax
from pallas_kernels.rope import rotate

BLOCK_ROWS = 256
"""Most rows of one sequence that are read at a time. On a CPU 128 cost 5 to 10 % more where all of
a block's rows are attended to, 512 again as much: their keys and values leave the core's cache."""

BLOCK_NUMBERS = 2**17
"""Most numbers of a block's keys, in all heads: 512 KB in float32. From 256 KB on XLA gives reading
them to two threads of a CPU."""

PARTS = 16
"""Of a block's values, added up while they are read. The sum, which every block reads and writes,
is that much smaller than the block; with 8 parts it costs as much, with 4 more."""


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
    query = grouped.astype(jnp.float32).swapaxes(2, 3)  # [B, K, H, G]

    def attend(number: jax.Array) -> online_softmax.Partial:
        own = lax.dynamic_index_in_dim(query, number)
        segments = (
            (pool_k, pool_v, offset[number], length[number]),
            (tail_k, tail_v, jnp.int32(0), fill[number]),
        )
        parts = (_attend_rows(own, number, *segment, scale) for segment in segments)
        return online_softmax.merge(*parts)

    return by_sequence(attend, grouped.shape[0])


def by_sequence(
    attend: Callable[[jax.Array], online_softmax.Partial], batch: int
) -> online_softmax.Partial:
    """Attention of all sequences: on a CPU one after the other, elsewhere all of them together.

    Together they are sliced by a gather, which a CPU does number by number, and each takes as long
    as the longest.

    Args:
        attend: gives the attention [1, K, G, H] of the sequence of a number, int32 [].
        batch: sequences, B.
    """
    in_turn, together = functools.partial(lax.map, attend), jax.vmap(attend)
    found = lax.platform_dependent(jnp.arange(batch), cpu=in_turn, default=together)
    return jax.tree.map(lambda x: x[:, 0], found)


def _attend_rows(
    query: jax.Array,
    number: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    first: jax.Array,
    rows: jax.Array,
    scale: float,
) -> online_softmax.Partial:
    """Attention of one sequence's queries over its rows from `first` on.

    Args:
        query: float32 [1, K, H, G].
        number: of the sequence, int32 [].
        keys: of all sequences, [B, K, S, H].
        values: of all sequences, [B, K, S, H].
        first: int32 [].
        rows: how many, int32 [].
        scale: factor of the logits.
    """
    _, kv_heads, total, head_dim = keys.shape
    most = max(PARTS, min(BLOCK_ROWS, BLOCK_NUMBERS // (kv_heads * head_dim)))
    count = min(most, total) // PARTS * PARTS or total
    step = count // PARTS or count

    def block(index: jax.Array, seen: online_softmax.Partial) -> online_softmax.Partial:
        begin = first + index * count
        # A slice past the end would be moved back in silence: move it here, and mask.
        start = jnp.minimum(begin, total - count)
        position = start + jnp.arange(count)
        readable = (position >= begin) & (position < first + rows)
        # Scaled while they are read: the loop of a mere copy LLVM unrolls, if it is as short as 64
        # channels, before it could be vectorised, and half as many bytes are read in a second.
        k = read_rows(keys, number, start, count).astype(jnp.float32) * scale
        weights, kept, seen = online_softmax.weigh(query, k, readable, seen)
        # Products and sums, which XLA fuses with the slices: for a dot it would copy the values.
        mixed = seen.mixed * kept[:, :, None, :, None]  # [1, K, step, G, H]
        for at in range(0, count, step):
            part = slice(at, at + step)
            v = read_rows(values, number, start + at, step).astype(jnp.float32)
            v = jnp.where(readable[part, None], v, 0)
            mixed += weights[..., part].swapaxes(2, 3)[..., None] * v[:, :, :, None]
        return seen._replace(mixed=mixed)

    group = query.shape[3]
    nothing = online_softmax.empty(jnp.zeros((1, kv_heads, group, head_dim)))
    nothing = nothing._replace(mixed=jnp.zeros((1, kv_heads, step, group, head_dim)))
    found = lax.fori_loop(0, (rows + count - 1) // count, block, nothing)
    return found._replace(mixed=jnp.sum(found.mixed, axis=2))


def read_rows(
    array: jax.Array, number: jax.Array, start: jax.Array, count: int, axis: int = 2
) -> jax.Array:
    """One sequence's rows from `start` on: [B, K, S, H] -> [1, K, count, H].

    Args:
        array: of all sequences.
        number: of the sequence, int32 [].
        start: int32 []; `start + count` is at most S.
        count: how many.
        axis: where the rows are.
    """
    kind = array.dtype
    if kind == jnp.bfloat16:
        # XLA on a CPU slices no bfloat16: it would convert the whole array to float32, in front of
        # the loop. It does slice integers; and what is tied to `start` it leaves in the loop.
        array, start = lax.optimization_barrier((array, start))
        array = lax.bitcast_convert_type(array, jnp.uint16)
    first, sizes = [number, 0, 0, 0], [1, *array.shape[1:]]
    first[axis], sizes[axis] = start, count
    found = lax.dynamic_slice(array, first, sizes)
    return lax.bitcast_convert_type(found, kind) if kind == jnp.bfloat16 else found


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
