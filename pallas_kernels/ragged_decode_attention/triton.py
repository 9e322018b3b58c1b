"""Flash-decoding (Dao et al. 2023) over the ragged pool, in Pallas for the Triton backend.

    pool   . . . |  split 0  |  split 1  |  split 2 | . . .      the tail is one split more
           offset                            offset + length

The G query heads of a kv head share one read of its rows. Each split leaves a partial softmax in
float32, and a second kernel merges them. How many splits there are is static; how many rows each
has follows from the length, so one program serves every allocation. Where sequences and heads
alone fill the GPU there is a single split: then one kernel does pool and tail and is all.

`append_and_attend` is the same with the new token still in the layer's product: the kernel turns
its query and key by RoPE, begins the tail's softmax with it, and writes its row into the tail.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tiles
from pallas_kernels.ragged_decode_attention import config as configs
from pallas_kernels.ragged_decode_attention.config import Config
from pallas_kernels.tuning import best

Carry = tuple[jax.Array, jax.Array, jax.Array]


class _Refs(NamedTuple):
    """References of one kv head of a sequence, in the order of the kernels' arguments.

    The last four are there if the new token is appended; `new_k` and `new_v` are the same memory as
    `tail_k` and `tail_v`.
    """

    offset: Any  # [B]
    length: Any  # [B]
    fill: Any  # [B]
    q: Any  # [G, H], or the product of the new token [G + 2, H]
    pool_k: Any  # [capacity, H]
    pool_v: Any
    tail_k: Any  # [R, H]
    tail_v: Any
    cos: Any = None  # [H / 2]
    sin: Any = None
    new_k: Any = None  # [R, H]
    new_v: Any = None


def attend(
    q: jax.Array,
    k_ref: Any,
    v_ref: Any,
    begin: jax.Array,
    end: jax.Array,
    carry: Carry,
    *,
    scale: float,
    block_keys: int,
) -> Carry:
    """Go on with an online softmax over the rows begin..end of k, v [rows, H]."""
    lines = jnp.arange(block_keys)

    def add(index: jax.Array, carry: Carry) -> Carry:
        maximum, total, mixed = carry
        rows = begin + index * block_keys + lines
        valid = rows < end
        logits = tiles.dot(q, tiles.load(k_ref, rows, valid), trans_b=True)
        logits = jnp.where(valid[None, :], logits * (scale * tiles.LOG2_E), -jnp.inf)
        # Every block has a row that is there, so the new maximum is a number.
        new = jnp.maximum(maximum, jnp.max(logits, axis=1))
        weights = jnp.exp2(logits - new[:, None])
        decay = jnp.exp2(maximum - new)
        v = tiles.load(v_ref, rows, valid)
        mixed = mixed * decay[:, None] + tiles.dot(weights.astype(v.dtype), v)
        return new, total * decay + jnp.sum(weights, axis=1), mixed

    trips = (end - begin + block_keys - 1) // block_keys
    return lax.fori_loop(0, trips, add, carry)


def nothing(q: jax.Array) -> Carry:
    """The softmax over no key at all."""
    rows = q.shape[:1]
    empty = jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32)
    return *empty, jnp.zeros(q.shape, jnp.float32)


def _query(refs: _Refs, group: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The query heads as a tile [padded(G), padded(H)], their numbers, and which are there."""
    heads = jnp.arange(tiles.padded(group))
    there = heads < group
    q = tiles.load(refs.q, heads, there) if refs.cos is None else rotated(refs, heads, there)
    return q, heads, there


def _own_softmax(refs: _Refs, q: jax.Array, fill: jax.Array, group: int, scale: float) -> Carry:
    """What the tail's softmax begins with: the new token's own key, if there is one."""
    if refs.cos is None:
        return nothing(q)
    one = jnp.arange(1)
    k = rotated(refs, group + one, one == 0)
    return new_token(refs, q, k, fill, group, scale)


def rotated(refs: Any, heads: jax.Array, there: jax.Array) -> jax.Array:
    """Rows of the new token's product, turned by RoPE: each entry and its partner are loaded.

    Args:
        refs: with q [rows, H], cos, sin [H / 2].
        heads: which rows, int32 [R].
        there: bool [R]; the others are zeros.
    """
    head_dim = refs.q.shape[1]
    columns = jnp.arange(tiles.padded(head_dim))
    inside = columns < head_dim
    first = columns < head_dim // 2
    angle = jnp.where(first, columns, columns - head_dim // 2)
    partner = jnp.where(first, columns + head_dim // 2, angle)
    mask = there[:, None] & inside[None, :]
    x, other = (
        tiles.gather(refs.q, (heads[:, None], entry[None, :]), mask).astype(jnp.float32)
        for entry in (columns, partner)
    )
    cos, sin = (tiles.load_vector(ref, angle, inside) for ref in (refs.cos, refs.sin))
    turned = x * cos[None, :] + other * jnp.where(first, -sin, sin)[None, :]
    return turned.astype(refs.q.dtype)


def new_token(
    refs: Any, q: jax.Array, k: jax.Array, fill: jax.Array, group: int, scale: float
) -> Carry:
    """The softmax over the new token's own key alone, whose row is written into the tail.

    Args:
        refs: with q [G + 2, H], new_k, new_v [R, H].
        q: its query heads [padded(G), padded(H)].
        k: its key as the cache holds keys, [1, padded(H)].
        fill: the row of the tail.
        group: G.
        scale: factor of the logits.
    """
    head_dim = refs.q.shape[1]
    columns = jnp.arange(q.shape[1])
    inside = columns < head_dim
    one = jnp.arange(1)
    v = tiles.load(refs.q, group + 1 + one, one == 0)
    for ref, row in ((refs.new_k, k), (refs.new_v, v)):
        tiles.store(ref, fill + one, one == 0, row)
    logits = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1)
    mixed = jnp.where(inside[None, :], v.astype(jnp.float32), 0.0)
    ones = jnp.ones(q.shape[:1], jnp.float32)
    return logits * (scale * tiles.LOG2_E), ones, jnp.broadcast_to(mixed, q.shape)


def _single_kernel(*arguments: Any, group: int, appends: bool, scale: float, block_keys: int):
    """All of a kv head: `_Refs` with, after its inputs, out [G, H]."""
    *refs, out_ref = sort(arguments, appends, outputs=1)
    refs = _Refs(*refs)
    batch = pl.program_id(1)
    offset, length, fill = refs.offset[batch], refs.length[batch], refs.fill[batch]
    sizes = {"scale": scale, "block_keys": block_keys}
    q, heads, there = _query(refs, group)
    carry = _own_softmax(refs, q, fill, group, scale)
    carry = attend(q, refs.pool_k, refs.pool_v, offset, offset + length, carry, **sizes)
    none = jnp.zeros_like(fill)
    _, total, mixed = attend(q, refs.tail_k, refs.tail_v, none, fill, carry, **sizes)
    tiles.store(out_ref, heads, there, mixed / jnp.where(total == 0.0, 1.0, total)[:, None])


def _split_kernel(
    *arguments: Any, group: int, appends: bool, scale: float, block_keys: int, splits: int
):
    """One split: as above, with the partial softmaxes maximum, total [S, G] and mixed [S, G, H]."""
    *refs, maximum_ref, total_ref, mixed_ref = sort(arguments, appends, outputs=3)
    refs = _Refs(*refs)
    split, batch = pl.program_id(0), pl.program_id(2)
    offset, length, fill = refs.offset[batch], refs.length[batch], refs.fill[batch]
    sizes = {"scale": scale, "block_keys": block_keys}
    q, heads, there = _query(refs, group)

    def write(carry: Carry) -> None:
        maximum, total, mixed = carry
        tiles.store_vector(maximum_ref, heads, there, maximum, lead=(split,))
        tiles.store_vector(total_ref, heads, there, total, lead=(split,))
        tiles.store(mixed_ref, heads, there, mixed, lead=(split,))

    @pl.when(split < splits)
    def _() -> None:
        each = (length + splits - 1) // splits
        begin = offset + jnp.minimum(split * each, length)
        end = jnp.minimum(begin + each, offset + length)
        write(attend(q, refs.pool_k, refs.pool_v, begin, end, nothing(q), **sizes))

    @pl.when(split == splits)
    def _() -> None:
        carry = _own_softmax(refs, q, fill, group, scale)
        none = jnp.zeros_like(fill)
        write(attend(q, refs.tail_k, refs.tail_v, none, fill, carry, **sizes))


def sort(arguments: tuple[Any, ...], appends: bool, outputs: int) -> tuple[Any, ...]:
    """A kernel's inputs, then the tails that are written, if one is, then its own outputs.

    The tails are a kernel's last outputs.
    """
    if not appends:
        return arguments
    inputs, own, tails = arguments[: -outputs - 2], arguments[-outputs - 2 : -2], arguments[-2:]
    return (*inputs, *tails, *own)


def _merge_kernel(
    maximum_ref: Any, total_ref: Any, mixed_ref: Any, out_ref: Any, *, parts: int
) -> None:
    """References of one query head: maximum, total [parts]; mixed [parts, H]; out [H]."""
    split = jnp.arange(tiles.padded(parts))
    there = split < parts
    maximum = tiles.load_vector(maximum_ref, split, there)
    maximum = jnp.where(there, maximum, -jnp.inf)
    highest = jnp.max(maximum, axis=0)
    weights = jnp.exp2(maximum - jnp.where(highest == -jnp.inf, 0.0, highest))
    total = jnp.sum(weights * tiles.load_vector(total_ref, split, there), axis=0)
    mixed = jnp.sum(weights[:, None] * tiles.load(mixed_ref, split, there), axis=0)
    mixed = mixed / jnp.where(total == 0.0, 1.0, total)
    columns = jnp.arange(mixed.shape[0])
    tiles.store_vector(out_ref, columns, columns < out_ref.shape[0], mixed)


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
    config: Config | None = None,
    splits: int | None = None,
) -> jax.Array:
    """See the package's public function.

    Args:
        q: as there.
        pool_k: as there.
        pool_v: as there.
        offset: as there.
        length: as there.
        tail_k: as there.
        tail_v: as there.
        fill: as there.
        scale: as there.
        mean_rows: as there.
        config: block sizes; those of the device by default.
        splits: parts that a layer's rows are cut into; by the device's size by default.
    """
    batch, heads, head_dim = q.shape
    kv_heads = pool_k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    inputs = offset, length, fill, grouped, pool_k, pool_v, tail_k, tail_v
    (out,) = _run(inputs, scale, mean_rows, config, splits)
    return out


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
    together: bool = False,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See the package's public function; `config` and `splits` as above."""
    del together  # each sequence's row is written by a program of its own
    inputs = offset, length, fill, qkv, pool_k, pool_v, tail_k, tail_v, cos, sin
    out, tail_k, tail_v = _run(inputs, scale, mean_rows, config, splits)
    return out, tail_k, tail_v


def _run(
    inputs: tuple[jax.Array, ...],
    scale: float,
    mean_rows: int,
    config: Config | None,
    splits: int | None,
) -> tuple[jax.Array, ...]:
    """Attention [B, N, H] and, if the new token is appended, the tails that it was written into."""
    given = _Refs(*inputs)
    batch, kv_heads, rows, head_dim = given.q.shape
    appends = given.cos is not None
    group = rows - 2 if appends else rows
    if config is None:
        size = tiles.padded(head_dim)
        config = best("ragged_decode_attention", configs.candidates, given.pool_k.dtype, size)
    if splits is None:
        splits = configs.splits(batch * kv_heads, mean_rows, config.block_keys)

    whole = pl.BlockSpec((batch,), lambda *_: (0,))
    in_specs = [whole] * 3 + [of_head(array) for array in inputs[3:8]]
    if appends:
        in_specs += [pl.BlockSpec((None, head_dim // 2), lambda *at: (at[-1], 0))] * 2
    if splits == 1:
        kernel, grid, static = _single_kernel, (kv_heads, batch), {}
        shapes = [jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), given.q.dtype)]
    else:
        kernel, grid, static = _split_kernel, (splits + 1, kv_heads, batch), {"splits": splits}
        each = (batch, kv_heads, splits + 1, group)
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (each, each, (*each, head_dim))]
    own = len(shapes)
    if appends:
        shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (given.tail_k, given.tail_v)]
    read = batch * kv_heads * (mean_rows + given.tail_k.shape[2])
    results = tiles.call(
        kernel,
        "append_and_attend" if appends else "ragged_decode_attention",
        grid=grid,
        in_specs=in_specs,
        out_specs=[of_head(shape) for shape in shapes],
        out_shape=shapes,
        aliases={6: own, 7: own + 1} if appends else {},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        cost=pl.CostEstimate(
            flops=4 * read * group * head_dim,
            transcendentals=read * group,
            bytes_accessed=2 * read * head_dim * given.pool_k.dtype.itemsize,
        ),
        group=group,
        appends=appends,
        scale=scale,
        block_keys=config.block_keys,
        **static,
    )(*inputs)
    out = results[0] if splits == 1 else merge(*results[:own], dtype=given.q.dtype)
    return out.reshape(batch, kv_heads * group, head_dim), *results[own:]


def of_head(array: jax.Array | jax.ShapeDtypeStruct, each: int = 1) -> pl.BlockSpec:
    """All of one sequence's kv head of an array [B, K, ...].

    Args:
        array: whose.
        each: programs of a kv head, along the grid's last axis but one.
    """
    sides = array.shape[2:]
    return pl.BlockSpec(
        (None, None, *sides), lambda *at: (at[-1], at[-2] // each, *[0] * len(sides))
    )


def merge(maximum: jax.Array, total: jax.Array, mixed: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Merge partial softmaxes in powers of two: [B, K, parts, G (, H)] -> [B, K, G, H]."""
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
        num_warps=4,
        num_stages=1,
        cost=pl.CostEstimate(
            flops=2 * mixed.size, transcendentals=maximum.size, bytes_accessed=4 * mixed.size
        ),
        parts=parts,
    )(maximum, total, mixed)
