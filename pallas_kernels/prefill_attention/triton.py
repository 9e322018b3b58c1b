"""FlashAttention-2 forward (Dao 2023) in Pallas for the Triton backend.

One program makes a block of query rows of one head. Keys and values are read at kv-head size, block
by block, with a running maximum and sum. Two loops: the first over the blocks that every row sees
whole, without a mask; the second over the rest, the causal diagonal and the last block.

    keys      0 . . . . . . . . . . . . . length
    rows      |  whole blocks  | diagonal |

A chunk's rows begin at a position of their own, and its keys in the middle of a buffer: two numbers
are added, which are none for whole prompts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tiles
from pallas_kernels.rows import LayerRows
from pallas_kernels.tuning import PrefillConfig, best


def _kernel(
    lengths_ref: Any,
    start_ref: Any,
    first_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    *,
    causal: bool,
    scale: float,
    block_q: int,
    block_k: int,
    blocks: int,
) -> None:
    """References of one head: q, out [Tq, H]; k, v [T, H]; lengths [B].

    Of a chunk also start [B], and first [1], the row of k and v that is key 0; else both are None.
    """
    batch = pl.program_id(2)
    # The last rows have the most keys to read: they start first.
    row_at = (blocks - 1 - pl.program_id(0)) * block_q
    length = there = lengths_ref[batch]
    start = first = 0
    if start_ref is not None:
        start, first = start_ref[batch], first_ref[0]
        there = jnp.minimum(length - start, q_ref.shape[0])
    rows = row_at + jnp.arange(block_q, dtype=jnp.int32)
    q = tiles.load(q_ref, rows, rows < there)  # [block_q, Hp]
    columns = jnp.arange(block_k, dtype=jnp.int32)

    def attend(index: jax.Array, carry: Any, whole: bool) -> Any:
        maximum, total, mixed = carry
        keys = index * block_k + columns
        valid = None if whole else keys < length
        logits = tiles.dot(q, tiles.load(k_ref, first + keys, valid), trans_b=True)
        logits = logits * (scale * tiles.LOG2_E)
        if valid is not None:
            visible = valid[None, :]
            if causal:
                visible = visible & (keys[None, :] <= start + rows[:, None])
            logits = jnp.where(visible, logits, -jnp.inf)
        new = jnp.maximum(maximum, jnp.max(logits, axis=1))
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        weights = jnp.exp2(logits - shift[:, None])
        decay = jnp.exp2(maximum - shift)
        v = tiles.load(v_ref, first + keys, valid)
        mixed = mixed * decay[:, None] + tiles.dot(weights.astype(v.dtype), v)
        return new, total * decay + jnp.sum(weights, axis=1), mixed

    # Rows beyond the length see nothing at all.
    stop = start + jnp.minimum(row_at + block_q, there) if causal else length
    stop = jnp.where(row_at < there, stop, 0)
    whole = jnp.minimum(start + row_at, stop) // block_k if causal else stop // block_k
    carry = (
        jnp.full((block_q,), -jnp.inf, jnp.float32),
        jnp.zeros((block_q,), jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    carry = lax.fori_loop(0, whole, lambda i, c: attend(i, c, True), carry)
    trips = (stop + block_k - 1) // block_k
    _, total, mixed = lax.fori_loop(whole, trips, lambda i, c: attend(i, c, False), carry)
    divisor = jnp.where(total == 0.0, 1.0, total)
    tiles.store(out_ref, rows, rows < out_ref.shape[0], mixed / divisor[:, None])


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    causal: bool,
    scale: float,
    config: PrefillConfig | None = None,
) -> jax.Array:
    """See the package's public function; `config` is that of the device by default."""
    spec = tiles.of_kv_head(k, q.shape[2] // k.shape[2])
    numbers, settings = (lengths, None, None), {"causal": causal, "scale": scale, "config": config}
    return _attend(numbers, q, k, v, spec, k.shape[1], **settings)


def chunk_attention(
    q: jax.Array,
    layer: LayerRows,
    start: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    config: PrefillConfig | None = None,
) -> jax.Array:
    """See the package's public function; `config` is that of the device by default."""
    spec = tiles.of_kv_head(layer, q.shape[2] // layer.k.shape[1])
    numbers, settings = (lengths, start, layer.first[None]), {"scale": scale, "config": config}
    return _attend(numbers, q, layer.k, layer.v, spec, layer.rows, causal=True, **settings)


def _attend(
    numbers: tuple[jax.Array | None, ...],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    of_kv_head: pl.BlockSpec,
    keys: int,
    *,
    causal: bool,
    scale: float,
    config: PrefillConfig | None,
) -> jax.Array:
    """Call the kernel.

    Args:
        numbers: lengths [B]; start [B] and first [1], or None.
        q: queries [B, Tq, N, H].
        k: keys of all sequences.
        v: values of all sequences.
        of_kv_head: what a program sees of them.
        keys: most that a sequence can have.
        causal: see the package's public function.
        scale: factor of the logits.
        config: that of the device where it is None.
    """
    batch, length, heads, head_dim = q.shape
    launch: PrefillConfig = config or best("prefill_attention", q.dtype, head_dim)
    block_q = min(launch.block_q, tiles.padded(length))
    block_k = min(launch.block_k, tiles.padded(keys))
    blocks = pl.cdiv(length, block_q)
    of_head = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n, 0))
    whole = [None if x is None else pl.BlockSpec(x.shape, lambda *_: (0,)) for x in numbers]
    pairs = batch * heads * length * keys // (2 if causal else 1)
    return tiles.call(
        _kernel,
        "prefill_attention",
        grid=(blocks, heads, batch),
        in_specs=[*whole, of_head, of_kv_head, of_kv_head],
        out_specs=of_head,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        config=launch,
        cost=pl.CostEstimate(
            flops=4 * pairs * head_dim,
            transcendentals=pairs,
            bytes_accessed=2 * (q.size + k.size) * q.dtype.itemsize,
        ),
        causal=causal,
        scale=scale,
        block_q=block_q,
        block_k=block_k,
        blocks=blocks,
    )(*numbers, q, k, v)
