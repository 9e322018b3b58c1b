"""Attention of one new token over a layer-ragged pool and a dense tail."""

import math

import jax

from pallas_kernels.backends import choose
from pallas_kernels.ragged_decode_attention import triton, xla

BACKENDS = {"triton": triton.ragged_decode_attention, "xla": xla.ragged_decode_attention}
APPEND_BACKENDS = {"triton": triton.append_and_attend, "xla": xla.append_and_attend}
"""In the order of preference."""


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
    scale: float | None = None,
    mean_rows: int | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Attention of one token over one layer: its segment of the pool, then its tail.

        pool [B, K, capacity, H]   . . . |<- length[b] ->| . . . .      rows of other layers
                                     offset[b]
        tail [B, K, R, H]          |<- fill[b] ->| . . .                rows of new tokens

    Offsets and lengths are data: one compiled program serves every allocation. Rows outside of
    both segments are never read into a result, whatever they hold.

    Args:
        q: queries of one step [B, N, H].
        pool_k: keys of all layers [B, K, capacity, H]; N a multiple of K.
        pool_v: values, likewise.
        offset: first row of this layer, int32 [B].
        length: rows of this layer, int32 [B]; may be 0.
        tail_k: keys of new tokens [B, K, R, H].
        tail_v: values, likewise.
        fill: rows of the tail in use, int32 [B]; may be 0.
        scale: factor of the logits; 1 / sqrt(H) by default.
        mean_rows: rows that a layer has on average, by which the work is split; the whole pool by
            default. Any length is served, whatever it is.
        backend: "triton", "xla", or None for the best that supports the case on the device.

    Returns:
        [B, N, H] in q's type; softmax and sums are float32. Zero where there is no key at all.

    Raises:
        ValueError: the shapes do not fit each other.
        NotImplementedError: there is no such backend.
    """
    batch, heads, head_dim = q.shape
    check_segments(batch, heads, head_dim, (pool_k, pool_v), (tail_k, tail_v), offset, length, fill)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    mean_rows = pool_k.shape[2] if mean_rows is None else mean_rows
    arrays = (q, pool_k, pool_v, offset, length, tail_k, tail_v, fill)
    return choose(
        "ragged_decode_attention", backend, BACKENDS, *arrays, scale=scale, mean_rows=mean_rows
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
    scale: float | None = None,
    mean_rows: int | None = None,
    together: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a layer does with a new token: RoPE, its row into the tail, attention over all.

    In XLA these are four small programs before the attention, in the kernel none: where a step is
    short, launching them is a good part of it.

    Args:
        qkv: of one step, before RoPE: for each kv head its G query heads, its key and its value,
            [B, K, G + 2, H].
        cos: cosine of RoPE's angles at the token's position, float32 [B, H / 2].
        sin: sine, likewise.
        pool_k: as in `ragged_decode_attention`.
        pool_v: likewise.
        offset: likewise.
        length: likewise.
        tail_k: likewise; donate it to have it written in place.
        tail_v: likewise.
        fill: rows of the tail in use before the token, below R, int32 [B].
        scale: likewise.
        mean_rows: likewise.
        together: all of `fill` are equal, so that XLA can write one row for the whole batch.
        backend: likewise.

    Returns:
        The attention [B, N, H] in qkv's type, and the tails with the token in row `fill`.

    Raises:
        ValueError: the shapes do not fit each other.
        NotImplementedError: there is no such backend.
    """
    batch, kv_heads, rows, head_dim = qkv.shape
    heads = kv_heads * (rows - 2)
    check_segments(batch, heads, head_dim, (pool_k, pool_v), (tail_k, tail_v), offset, length, fill)
    if kv_heads != pool_k.shape[1] or rows < 3 or head_dim % 2:
        raise ValueError(f"{qkv.shape=}, {pool_k.shape=}: expected [B, K, G + 2, H] with an even H")
    if not cos.shape == sin.shape == (batch, head_dim // 2):
        raise ValueError(f"{cos.shape=}, {sin.shape=} must be {(batch, head_dim // 2)}")
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    mean_rows = pool_k.shape[2] if mean_rows is None else mean_rows
    arrays = (qkv, cos, sin, pool_k, pool_v, offset, length, tail_k, tail_v, fill)
    return choose(
        "append_and_attend",
        backend,
        APPEND_BACKENDS,
        *arrays,
        scale=scale,
        mean_rows=mean_rows,
        together=together,
    )


def check_segments(
    batch: int,
    heads: int,
    head_dim: int,
    pools: tuple[jax.Array, jax.Array],
    tails: tuple[jax.Array, jax.Array],
    *rows: jax.Array,
) -> None:
    """Refuse shapes that do not fit each other: of a pool, of the tails, of offsets and lengths.

    Args:
        batch: B.
        heads: N.
        head_dim: H.
        pools: keys and values of full width [B, K, capacity, H].
        tails: keys and values of new tokens [B, K, R, H].
        rows: offset, length and fill [B].

    Raises:
        ValueError: they do not fit.
    """
    for k, v in (pools, tails):
        if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_dim:
            raise ValueError(
                f"{batch=}, {head_dim=}, {k.shape=}, {v.shape=}: expected [B, K, rows, H]"
            )
        if heads % k.shape[1]:
            raise ValueError(f"{heads} query heads must be a multiple of {k.shape[1]} kv heads")
    if any(array.shape != (batch,) for array in rows):
        raise ValueError(f"offset, length and fill {[x.shape for x in rows]} must be {(batch,)}")
