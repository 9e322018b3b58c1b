"""Online softmax over blocks of each sequence's segment of the pool, and over those of its tail."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import online_softmax
from pallas_kernels.backends import current_device
from pallas_kernels.rope import rotate
from pallas_kernels.rows import NewToken, Segment, Tail, read_rows

LARGE = 2**20
"""Numbers of the keys of a large block, in all kv heads: 4 MB in float32, worth starting threads.
With half or twice as many decoding costs up to a fifth more."""

SMALL = 2**16 - 1
"""Most numbers of the keys of a small block: below the 256 KB from which XLA has two threads of a
CPU read it, although starting one takes longer (40 us) than reading it (20 us)."""

MOST_ROWS = 512, 64
"""Rows of a small block at most, where heads are few and narrow: while as many are left, and of the
rest, most of which is masked: 128 cost a twentieth more from a tenth of 1,024 rows of 2 x 32."""

NARROW = 256
"""Rows from which a small block is read as it lies: reordering them would take longer than it saves
where heads are narrow, and saves a tenth where they are 8 x 64."""

MOST_WIDTH = 128
"""Numbers of a row, in all kv heads, up to which a CPU attends for all sequences of a batch at
once: what each one starts costs more than what the shorter ones read in vain. Of 8 with a tenth of
some 400 rows each, and 2 heads of 32, it takes a quarter of the time; from 4 x 64 on it saves
nothing."""

BATCH_ROWS = 64, 256
"""Least and most rows of a block of all sequences: a 32nd of the pool's between."""

TAIL_ROWS = 128
"""Rows of a block of all tails: those of a short answer at once, which needs no loop of blocks."""

PARTS = 16
"""Of a block, read side by side: a core reads several streams faster than one."""


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
    batch, kv_heads, _, head_dim = grouped.shape
    narrow = batch > 1 and kv_heads * head_dim <= MOST_WIDTH
    if narrow and current_device().platform == "cpu":
        # A finite maximum: a sequence may have no row of a block that others have rows of.
        seen = online_softmax.empty(grouped)
        seen = seen._replace(maximum=jnp.full_like(seen.maximum, jnp.finfo(jnp.float32).min))
        least, most = BATCH_ROWS
        count = min(max(least, pool_k.shape[2] // 32), most)
        seen = _attend_batch(seen, query * scale, pool_k, pool_v, offset, length, count)
        return _attend_batch(seen, query * scale, tail_k, tail_v, jnp.int32(0), fill, TAIL_ROWS)

    def attend(number: jax.Array) -> online_softmax.Partial:
        own = lax.dynamic_index_in_dim(query, number)
        seen = online_softmax.empty(lax.dynamic_index_in_dim(grouped, number))
        segment = pool_k, pool_v, offset[number], length[number]
        for rows in (segment, (tail_k, tail_v, jnp.int32(0), fill[number])):
            seen = _attend_rows(seen, own, number, *rows, scale)
        return seen

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
    numbers, on_cpu = jnp.arange(batch, dtype=jnp.int32), current_device().platform == "cpu"
    found = lax.map(attend, numbers) if on_cpu else jax.vmap(attend)(numbers)
    return jax.tree.map(lambda x: x[:, 0], found)


def _attend_batch(
    seen: online_softmax.Partial,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    first: jax.Array,
    rows: jax.Array,
    count: int,
) -> online_softmax.Partial:
    """Attention of all sequences' queries over more of their rows, as many blocks as the longest.

    Args:
        seen: attention over other rows, its maximum finite.
        query: float32 [B, K, H, G], scaled.
        keys: [B, K, S, H].
        values: [B, K, S, H].
        first: the first row of each, int32 [B]; or of all, [], whose blocks are slices, no gathers.
        rows: how many each has, int32 [B].
        count: rows of a block.
    """
    total = keys.shape[2]
    count, order = min(count, total), np.arange(min(count, total), dtype=np.int32)
    rows = jnp.minimum(rows, total - first)  # a full tail goes on counting

    def block(index: jax.Array, seen: online_softmax.Partial) -> online_softmax.Partial:
        begin = first + index * count
        # A slice past the end would be moved back in silence: move it here, and mask.
        start = jnp.minimum(begin, total - count)
        row = start[..., None] + order
        readable = (row >= begin[..., None]) & (row < (first + rows)[:, None])  # [B, S]
        k, v = (read_rows(array, start, count).astype(jnp.float32) for array in (keys, values))
        return online_softmax.add(query, k, v, readable, seen)

    return lax.fori_loop(0, (jnp.max(rows) + count - 1) // count, block, seen)


def _attend_rows(
    seen: online_softmax.Partial,
    query: jax.Array,
    number: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    first: jax.Array,
    rows: jax.Array,
    scale: float,
) -> online_softmax.Partial:
    """Attention of one sequence's queries over more of its rows.

    Large blocks, each read by several threads of a CPU, then small ones by one.

    Args:
        seen: attention over other rows.
        query: float32 [1, K, H, G].
        number: of the sequence, int32 [].
        keys: of all sequences, [B, K, S, H].
        values: of all sequences, [B, K, S, H].
        first: the first row, int32 [].
        rows: how many, int32 [].
        scale: factor of the logits.
    """
    _, kv_heads, total, head_dim = keys.shape
    rows = jnp.minimum(rows, total - first)  # a full tail goes on counting
    group, stop, width = query.shape[3], first + rows, kv_heads * head_dim * PARTS
    large, small = (max(numbers // width, 1) * PARTS for numbers in (LARGE, SMALL))

    def read(array: jax.Array, start: jax.Array, count: int) -> jax.Array:
        return read_rows(array, start, count, number=number).astype(jnp.float32)

    def side_by_side(block: jax.Array, parts: int) -> jax.Array:
        split = block.reshape(1, kv_heads, parts, -1, head_dim)
        return split.swapaxes(2, 3).reshape(block.shape)

    def large_block(index: jax.Array, seen: online_softmax.Partial) -> online_softmax.Partial:
        start, step = first + index * large, large // PARTS
        # Scaled while they are read: a mere copy is not vectorised, see `online_softmax.add`.
        k = side_by_side(read(keys, start, large) * scale, PARTS)
        weights, kept, seen = online_softmax.weigh(query, k, jnp.ones(large, bool), seen)
        weights = weights.reshape(1, kv_heads, group, step, PARTS).swapaxes(2, 3)
        # Products and sums, which XLA fuses with the slices: for a dot it would copy the values.
        mixed = seen.mixed * kept[:, :, None, :, None]  # [1, K, step, G, H]
        for part in range(PARTS):
            v = read(values, start + part * step, step)
            mixed += weights[..., part, None] * v[:, :, :, None]
        return seen._replace(mixed=mixed)

    def large_blocks(seen: online_softmax.Partial) -> online_softmax.Partial:
        shape = 1, kv_heads, large // PARTS - 1, group, head_dim
        others = jnp.zeros(shape, jnp.float32)
        mixed = jnp.concatenate([seen.mixed[:, :, None], others], axis=2)
        seen = lax.fori_loop(0, rows // large, large_block, seen._replace(mixed=mixed))
        return seen._replace(mixed=jnp.sum(seen.mixed, axis=2))

    done = jnp.int32(0)
    if large <= total:
        seen = lax.cond(rows >= large, large_blocks, lambda seen: seen, seen)
        done = rows // large * large

    def small_blocks(
        seen: online_softmax.Partial, done: jax.Array, count: int, trips: jax.Array
    ) -> online_softmax.Partial:
        parts = PARTS if count % PARTS == 0 and count < NARROW else 1
        order = np.arange(count, dtype=np.int32).reshape(parts, -1).T.reshape(-1)

        def small_block(index: jax.Array, seen: online_softmax.Partial) -> online_softmax.Partial:
            begin = first + done + index * count
            # A slice past the end would be moved back in silence: move it here, and mask.
            start = jnp.minimum(begin, total - count)
            readable = (start + order >= begin) & (start + order < stop)
            k, v = (read(x, start, count) for x in (keys, values))
            if parts == 1:
                return online_softmax.add(query * scale, k, v, readable, seen)
            k, v = side_by_side(k, parts) * scale, side_by_side(v, parts)
            return online_softmax.add(query, k, v, readable, seen)

        return lax.fori_loop(0, trips, small_block, seen)

    most, rest = (min(small, most) for most in MOST_ROWS)
    if rest < most <= total:
        seen = small_blocks(seen, done, most, (rows - done) // most)
        done += (rows - done) // most * most
    rest = min(rest, total // PARTS * PARTS or total)
    return small_blocks(seen, done, rest, (rows - done + rest - 1) // rest)


def append_and_attend(
    new: NewToken, pool: Segment, tail: Tail, *, scale: float, most_rows: int, together: bool
) -> tuple[jax.Array, Tail]:
    """See the package's public function; `most_rows` is not used."""
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
            return rows.at[jnp.arange(at.size, dtype=jnp.int32), :, at].set(
                new[:, :, 0], mode="drop"
            )
        # An update past the end would be moved back in silence, onto a row that is in use.
        last = lax.dynamic_slice_in_dim(rows, at[0], 1, axis=2)
        new = jnp.where(at[0] < rows.shape[2], new, last)
        return lax.dynamic_update_slice_in_dim(rows, new, at[0], axis=2)

    return Tail(put(tail.k, k), put(tail.v, v), tail.fill + 1)
