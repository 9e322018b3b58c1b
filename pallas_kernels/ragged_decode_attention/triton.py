"""Flash-decoding (Dao et al. 2023) over the ragged pool, in Pallas for the Triton backend.

    pool   . . . |  split 0  |  split 1  |  split 2 | . . .      the tail is one split more
           offset                            offset + length

The G query heads of a kv head share one read of its rows. Each split leaves a partial softmax in
float32, and a second kernel merges them. How many splits there are is static; how many rows each
has follows from the length, so one program serves every allocation. Where sequences and heads
alone fill the GPU there is a single split: then one kernel does pool and tail and is all.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tiles
from pallas_kernels.backends import current_device
from pallas_kernels.ragged_decode_attention import config as configs
from pallas_kernels.ragged_decode_attention.config import Config

Carry = tuple[jax.Array, jax.Array, jax.Array]


def _attend(
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


def _nothing(q: jax.Array) -> Carry:
    rows = q.shape[:1]
    empty = jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32)
    return *empty, jnp.zeros(q.shape, jnp.float32)


def _finish(total: jax.Array, mixed: jax.Array) -> jax.Array:
    return mixed / jnp.where(total == 0.0, 1.0, total)[:, None]


def _single_kernel(
    offset_ref: Any,
    length_ref: Any,
    fill_ref: Any,
    q_ref: Any,
    pool_k_ref: Any,
    pool_v_ref: Any,
    tail_k_ref: Any,
    tail_v_ref: Any,
    out_ref: Any,
    **sizes: Any,
) -> None:
    """References of one kv head: q, out [G, H]; pool [capacity, H]; tail [R, H]."""
    batch = pl.program_id(1)
    offset, length, fill = offset_ref[batch], length_ref[batch], fill_ref[batch]
    heads = jnp.arange(tiles.padded(q_ref.shape[0]))
    there = heads < q_ref.shape[0]
    q = tiles.load(q_ref, heads, there)
    carry = _attend(q, pool_k_ref, pool_v_ref, offset, offset + length, _nothing(q), **sizes)
    _, total, mixed = _attend(q, tail_k_ref, tail_v_ref, jnp.zeros_like(fill), fill, carry, **sizes)
    tiles.store(out_ref, heads, there, _finish(total, mixed))


def _split_kernel(
    offset_ref: Any,
    length_ref: Any,
    fill_ref: Any,
    q_ref: Any,
    pool_k_ref: Any,
    pool_v_ref: Any,
    tail_k_ref: Any,
    tail_v_ref: Any,
    maximum_ref: Any,
    total_ref: Any,
    mixed_ref: Any,
    *,
    splits: int,
    block_keys: int,
    scale: float,
) -> None:
    """As above; the partial softmax of split s: maximum, total [s, G], mixed [s, G, H]."""
    split, batch = pl.program_id(0), pl.program_id(2)
    offset, length, fill = offset_ref[batch], length_ref[batch], fill_ref[batch]
    heads = jnp.arange(tiles.padded(q_ref.shape[0]))
    there = heads < q_ref.shape[0]
    q = tiles.load(q_ref, heads, there)

    def write(k_ref: Any, v_ref: Any, begin: jax.Array, end: jax.Array) -> None:
        maximum, total, mixed = _attend(
            q, k_ref, v_ref, begin, end, _nothing(q), scale=scale, block_keys=block_keys
        )
        tiles.store_vector(maximum_ref, heads, there, maximum, lead=(split,))
        tiles.store_vector(total_ref, heads, there, total, lead=(split,))
        tiles.store(mixed_ref, heads, there, mixed, lead=(split,))

    @pl.when(split < splits)
    def _() -> None:
        each = (length + splits - 1) // splits
        begin = jnp.minimum(split * each, length)
        end = jnp.minimum(begin + each, length)
        write(pool_k_ref, pool_v_ref, offset + begin, offset + end)

    @pl.when(split == splits)
    def _() -> None:
        write(tail_k_ref, tail_v_ref, jnp.zeros_like(fill), fill)


def _merge_kernel(
    maximum_ref: Any, total_ref: Any, mixed_ref: Any, out_ref: Any, *, parts: int
) -> None:
    """References of one query head: maximum, total [parts]; mixed [parts, H]; out [1, H]."""
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
    kv_heads, capacity = pool_k.shape[1:3]
    group, tail_rows = heads // kv_heads, tail_k.shape[2]
    if config is None:
        device = current_device()
        config = configs.choose(
            device.kind, device.capability or 90, pool_k.dtype, tiles.padded(head_dim)
        )
    if splits is None:
        splits = configs.splits(batch * kv_heads, mean_rows, config.block_keys)
    arrays = (
        offset, length, fill,
        q.reshape(batch, kv_heads, group, head_dim), pool_k, pool_v, tail_k, tail_v,
    )  # fmt: skip
    whole = pl.BlockSpec((batch,), lambda *_: (0,))

    def of_head(*sides: int) -> pl.BlockSpec:
        """All of one sequence's kv head of an array [B, K, *sides]."""
        return pl.BlockSpec((None, None, *sides), lambda *at: (at[-1], at[-2], *[0] * len(sides)))

    in_specs = [
        whole, whole, whole, of_head(group, head_dim),
        of_head(capacity, head_dim), of_head(capacity, head_dim),
        of_head(tail_rows, head_dim), of_head(tail_rows, head_dim),
    ]  # fmt: skip
    rows = batch * kv_heads * (mean_rows + tail_rows)
    cost = pl.CostEstimate(
        flops=4 * rows * group * head_dim,
        transcendentals=rows * group,
        bytes_accessed=2 * rows * head_dim * pool_k.dtype.itemsize,
    )
    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if splits == 1:
        out = tiles.call(
            _single_kernel,
            "ragged_decode_attention",
            grid=(kv_heads, batch),
            in_specs=in_specs,
            out_specs=of_head(group, head_dim),
            out_shape=jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), q.dtype),
            cost=cost,
            scale=scale,
            block_keys=config.block_keys,
            **launch,
        )(*arrays)
        return out.reshape(batch, heads, head_dim)
    parts = splits + 1
    sizes = ((parts, group), (parts, group), (parts, group, head_dim))
    partial = tiles.call(
        _split_kernel,
        "ragged_decode_attention",
        grid=(parts, kv_heads, batch),
        in_specs=in_specs,
        out_specs=[of_head(*sides) for sides in sizes],
        out_shape=[jax.ShapeDtypeStruct((batch, kv_heads, *sides), jnp.float32) for sides in sizes],
        cost=cost,
        scale=scale,
        block_keys=config.block_keys,
        splits=splits,
        **launch,
    )(*arrays)
    return merge(*partial, dtype=q.dtype)


def merge(maximum: jax.Array, total: jax.Array, mixed: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Merge partial softmaxes in powers of two: [B, K, parts, G (, H)] -> [B, N, H]."""
    batch, kv_heads, parts, group, head_dim = mixed.shape

    def of_query_head(*sides: int | None) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, parts, None, *sides), lambda g, h, b: (b, h, 0, g, *[0] * len(sides))
        )

    out = tiles.call(
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
    return out.reshape(batch, kv_heads * group, head_dim)
