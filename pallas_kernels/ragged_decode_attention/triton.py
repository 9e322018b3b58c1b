"""Flash-decoding (Dao et al. 2023) over the ragged pool, in Pallas for the Triton backend.

    pool   . . . | | | | | | | . . .   tail | | . .      blocks; a split has an equal share of them
           offset            offset + length

The kernel turns the new token's queries and key by RoPE, writes its row into the tail, and begins
one split's softmax with it. The G query heads of a kv head share one read of its rows. Each split
leaves a partial softmax in float32, and a second kernel merges them; a split that nothing is left
for, of a small layer, leaves only that it has seen nothing. Where sequences and heads alone fill
the GPU there is a single split, which leaves the result itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tiles
from pallas_kernels.rows import NewToken, Segment, Tail
from pallas_kernels.splits import shares, split_count, trips
from pallas_kernels.tuning import DecodeConfig, RowConfig, best

Carry = tuple[jax.Array, jax.Array, jax.Array]

MERGED_AT_ONCE = 32
"""Partial softmaxes that are in registers at a time."""


def attend(
    q: jax.Array,
    refs: Any,
    begin: jax.Array,
    end: jax.Array,
    carry: Carry,
    scale: float,
    block_keys: int,
) -> Carry:
    """Go on with an online softmax over the rows begin..end of refs' k, v [rows, H]."""
    lines = jnp.arange(block_keys, dtype=jnp.int32)

    def add(index: jax.Array, carry: Carry) -> Carry:
        maximum, total, mixed = carry
        rows = begin + index * block_keys + lines
        valid = rows < end
        logits = tiles.dot(q, tiles.load(refs.k, rows, valid), trans_b=True)
        logits = jnp.where(valid[None, :], logits * (scale * tiles.LOG2_E), -jnp.inf)
        # Every block has a row that is there, so the new maximum is a number.
        new = jnp.maximum(maximum, jnp.max(logits, axis=1))
        weights = jnp.exp2(logits - new[:, None])
        decay = jnp.exp2(maximum - new)
        v = tiles.load(refs.v, rows, valid)
        mixed = mixed * decay[:, None] + tiles.dot(weights.astype(v.dtype), v)
        return new, total * decay + jnp.sum(weights, axis=1), mixed

    return lax.fori_loop(0, trips(end - begin, block_keys), add, carry)


def rotated(new: NewToken, heads: jax.Array, there: jax.Array) -> jax.Array:
    """Rows of the new token's product, turned by RoPE: each entry and its partner are loaded.

    Args:
        new: references of one kv head: qkv [G + 2, H], cos, sin [H / 2].
        heads: which rows, int32 [R].
        there: bool [R]; the others are zeros.
    """
    head_dim = new.qkv.shape[1]
    columns = jnp.arange(tiles.padded(head_dim), dtype=jnp.int32)
    inside = columns < head_dim
    first = columns < head_dim // 2
    angle = jnp.where(first, columns, columns - head_dim // 2)
    partner = jnp.where(first, columns + head_dim // 2, angle)
    mask = there[:, None] & inside[None, :]
    x, other = (
        tiles.gather(new.qkv, (heads[:, None], entry[None, :]), mask).astype(jnp.float32)
        for entry in (columns, partner)
    )
    cos, sin = (tiles.gather(ref, (angle,), inside) for ref in (new.cos, new.sin))
    turned = x * cos[None, :] + other * jnp.where(first, -sin, sin)[None, :]
    return turned.astype(new.qkv.dtype)


def append(
    new: NewToken,
    grown: tuple[Any, Any],
    q: jax.Array,
    k: jax.Array,
    fill: jax.Array,
    mine: jax.Array,
    scale: float,
) -> Carry:
    """Write the new token's row, if it is this split's, and begin the softmax with its own key.

    Args:
        new: references of one kv head, qkv [G + 2, H] among them.
        grown: references of the tail's keys and values that are written, [R, H].
        q: the query heads [rows, padded(H)].
        k: the key as the cache holds keys, [1, padded(H)].
        fill: the row of the tail; nothing is written beyond its end.
        mine: the token is this split's; else the softmax begins over no key at all.
        scale: factor of the logits.
    """
    one = jnp.arange(1, dtype=jnp.int32)
    v = tiles.load(new.qkv, new.qkv.shape[0] - 1 + one, one == 0)
    for ref, row in zip(grown, (k, v), strict=True):
        tiles.store(ref, fill + one, (one == 0) & mine & (fill < ref.shape[0]), row)
    logits = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1)
    maximum = jnp.where(mine, logits * (scale * tiles.LOG2_E), -jnp.inf)
    total = jnp.where(mine, jnp.ones(q.shape[:1], jnp.float32), 0.0)
    mixed = jnp.where(mine, v.astype(jnp.float32), 0.0)
    return maximum, total, jnp.broadcast_to(mixed, q.shape)


def _kernel(
    new: NewToken,
    pool: Segment,
    tail: Tail,
    results: tuple[Any, ...],
    grown: tuple[Any, Any],
    *,
    splits: int,
    scale: float,
    block_keys: int,
) -> None:
    """References of one sequence's kv head.

    Args:
        new: qkv [G + 2, H], cos, sin [H / 2].
        pool: k, v [capacity, H]; offset, length [B].
        tail: k, v [R, H]; fill [B].
        results: of a single split out [G, H]; else maximum, total [S, G] and mixed [S, G, H].
        grown: the same memory as the tail's k, v.
        splits: how many programs share the rows.
        scale: factor of the logits.
        block_keys: rows of a block.
    """
    split, batch = pl.program_id(0), pl.program_id(2)
    group, one = new.qkv.shape[0] - 2, jnp.arange(1, dtype=jnp.int32)
    heads = jnp.arange(tiles.padded(group), dtype=jnp.int32)
    there = heads < group
    q = rotated(new, heads, there)
    k = rotated(new, group + one, one == 0)
    offset, length, fill = pool.offset[batch], pool.length[batch], tail.fill[batch]
    # The last split has the fewest blocks.
    carry = append(new, grown, q, k, fill, split == splits - 1, scale)
    sections = (pool, offset, length), (tail, 0, jnp.minimum(fill, tail.k.shape[0]))
    blocks = [trips(rows, block_keys) for _, _, rows in sections]
    for (refs, first, rows), share in zip(sections, shares(blocks, split, splits), strict=True):
        begin, end = (jnp.minimum(block * block_keys, rows) for block in share)
        carry = attend(q, refs, first + begin, first + end, carry, scale, block_keys)
    maximum, total, mixed = carry
    if splits == 1:
        tiles.store(results[0], heads, there, mixed / total[:, None])
        return
    maximum_ref, total_ref, mixed_ref = results
    tiles.scatter(maximum_ref, (split, heads), there, maximum)
    seen = there & (maximum != -jnp.inf)
    tiles.scatter(total_ref, (split, heads), seen, total)
    tiles.store(mixed_ref, heads, seen, mixed, lead=(split,))


def _merge_kernel(
    maximum_ref: Any, total_ref: Any, mixed_ref: Any, out_ref: Any, *, parts: int
) -> None:
    """References of one query head: maximum, total [parts]; mixed [parts, H]; out [H]."""
    every = jnp.arange(tiles.padded(parts), dtype=jnp.int32)
    highest = tiles.gather(maximum_ref, (every,), every < parts)
    highest = jnp.max(jnp.where(every < parts, highest, -jnp.inf), axis=0)
    highest = jnp.where(highest == -jnp.inf, 0.0, highest)
    block = min(MERGED_AT_ONCE, every.size)

    def add(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        split = index * block + jnp.arange(block, dtype=jnp.int32)
        maximum = tiles.gather(maximum_ref, (split,), split < parts)
        maximum = jnp.where(split < parts, maximum, -jnp.inf)
        seen = maximum != -jnp.inf  # else nothing more was written
        weights = jnp.exp2(maximum - highest)
        total = weights * tiles.gather(total_ref, (split,), seen)
        mixed = weights[:, None] * tiles.load(mixed_ref, split, seen)
        return carry[0] + jnp.sum(total, axis=0), carry[1] + jnp.sum(mixed, axis=0)

    columns = jnp.arange(tiles.padded(out_ref.shape[0]), dtype=jnp.int32)
    nothing = jnp.float32(0), jnp.zeros(columns.shape, jnp.float32)
    total, mixed = lax.fori_loop(0, trips(parts, block), add, nothing)
    mixed = mixed / jnp.where(total == 0.0, 1.0, total)
    tiles.scatter(out_ref, (columns,), columns < out_ref.shape[0], mixed)


def append_and_attend(
    new: NewToken,
    pool: Segment,
    tail: Tail,
    *,
    scale: float,
    most_rows: int,
    together: bool = False,
    config: DecodeConfig | None = None,
    splits: int | None = None,
) -> tuple[jax.Array, Tail]:
    """See the package's public function: here it is one kernel, and a merge where rows are split.

    `config` is that of the device by default, and `splits`, the programs that share a kv head's
    rows, what fills it. `together` is not used: a program of its own writes each sequence's row.
    """
    batch, kv_heads, width, head_dim = new.qkv.shape
    launch: DecodeConfig = config or best("ragged_decode_attention", pool.k.dtype, head_dim)
    most = most_rows + tail.k.shape[2]
    splits = splits or split_count(batch * kv_heads, most // launch.block_keys)
    read = batch * kv_heads * most
    return call(
        _kernel,
        "append_and_attend",
        (new, pool, tail),
        splits=splits,
        config=launch,
        cost=pl.CostEstimate(
            flops=4 * read * (width - 2) * head_dim,
            transcendentals=read * (width - 2),
            bytes_accessed=2 * read * head_dim * pool.k.dtype.itemsize,
        ),
        scale=scale,
        block_keys=launch.block_keys,
    )


def call(
    kernel: Any,
    name: str,
    inputs: tuple[Any, ...],
    *,
    splits: int,
    sets: int = 1,
    **settings: Any,
) -> tuple[jax.Array, Tail]:
    """Run a decode kernel, and the merge of its splits if there are several.

    Args:
        kernel: takes the references of `inputs`, then those of its results and of the grown tail.
        name: of the kernel, in programs and traces.
        inputs: the `NewToken` first, the `Tail` last.
        splits: programs that share a kv head's rows.
        sets: programs that share a kv head's query heads.
        settings: further arguments of `tiles.call`; what it does not know is the kernel's.
    """
    new, *_, tail = inputs
    batch, kv_heads, width, head_dim = new.qkv.shape
    group = width - 2
    if splits == 1:
        results = (jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), new.qkv.dtype),)
    else:
        each = batch, kv_heads, splits, group
        shapes = each, each, (*each, head_dim)
        results = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    grown = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (tail.k, tail.v))
    first = len(jax.tree.leaves(inputs)) - len(jax.tree.leaves(tail))
    results, (tail_k, tail_v) = tiles.call(
        kernel,
        name,
        grid=(splits, kv_heads * sets, batch),
        in_specs=specs(inputs, sets),
        out_specs=specs((results, grown), sets),
        out_shape=(results, grown),
        aliases={first: len(results), first + 1: len(results) + 1},
        splits=splits,
        **settings,
    )(*inputs)
    out = results[0] if splits == 1 else merge(*results, dtype=new.qkv.dtype)
    out = out.reshape(batch, kv_heads * group, head_dim)
    return out, Tail(tail_k, tail_v, tail.fill + 1)


def specs(arrays: Any, each: int) -> Any:
    """What one program sees of arrays: of [B, K, ...] all of its sequence's kv head, of floats
    [B, H / 2] its sequence's, of numbers [B, ...] all.

    Args:
        arrays: a tree of them.
        each: programs of a kv head, along the grid's last axis but one; the last are the sequences.
    """

    def spec(x: jax.Array) -> pl.BlockSpec:
        sides = x.shape[2:] if x.ndim > 3 else x.shape[1:]
        zeros = (0,) * len(sides)
        if x.ndim > 3:
            return pl.BlockSpec((None, None, *sides), lambda *at: (at[-1], at[-2] // each, *zeros))
        if jnp.issubdtype(x.dtype, jnp.floating):
            return pl.BlockSpec((None, *sides), lambda *at: (at[-1], *zeros))
        return pl.BlockSpec(x.shape, lambda *_: (0, *zeros))

    return jax.tree.map(spec, arrays)


def merge(maximum: jax.Array, total: jax.Array, mixed: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Merge partial softmaxes in powers of two: [B, K, parts, G (, H)] -> [B, K, G, H].

    Args:
        maximum: largest logit of each part; -inf where it has seen no key: then `total` and `mixed`
            are never read.
        total: sum of its weights.
        mixed: sum of its values by their weights.
        dtype: of the result.
    """
    batch, kv_heads, parts, group, head_dim = mixed.shape

    def of_query_head(*sides: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, parts, None, *sides), lambda g, h, b: (b, h, 0, g, *[0] * len(sides))
        )

    return tiles.call(
        _merge_kernel,
        "merge_splits",
        grid=(group, kv_heads, batch),
        in_specs=[of_query_head(), of_query_head(), of_query_head(head_dim)],
        out_specs=pl.BlockSpec((None, None, None, head_dim), lambda g, h, b: (b, h, g, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), dtype),
        config=RowConfig(4),
        cost=pl.CostEstimate(
            flops=2 * mixed.size, transcendentals=maximum.size, bytes_accessed=4 * mixed.size
        ),
        parts=parts,
    )(maximum, total, mixed)
