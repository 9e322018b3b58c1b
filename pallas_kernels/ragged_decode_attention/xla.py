"""Online softmax over blocks of each sequence's segment of the pool, and over those of its tail."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import online_softmax
from pallas_kernels.rope import rotate
from pallas_kernels.rows import NewToken, Segment, Tail

BLOCK_ROWS = 256
"""Most rows of one sequence that are read at a time. On a CPU 128 cost 5 to 10 % more where all of
a block's rows are attended to, 512 again as much: their keys and values leave the core's cache."""

BLOCK_NUMBERS = 2**17
"""Most numbers of a block's keys, in all heads: 512 KB in float32. From 256 KB on XLA gives reading
them to two threads of a CPU."""

PARTS = 16
"""Of a block's values, added up while they are read. The sum, which every block reads and writes,
is that much smaller than the block; with 8 parts it costs as much, with 4 more."""


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
