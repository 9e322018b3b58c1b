"""Attention of one new token over a layer-ragged pool and a dense tail."""

import math

import jax

from pallas_kernels.backends import choose
from pallas_kernels.ragged_decode_attention import triton, xla

BACKENDS = {"triton": triton.ragged_decode_attention, "xla": xla.ragged_decode_attention}
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
    for k, v in ((pool_k, pool_v), (tail_k, tail_v)):
        if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_dim:
            raise ValueError(f"{q.shape=}, {k.shape=}, {v.shape=}: expected [B, K, rows, H]")
        if heads % k.shape[1]:
            raise ValueError(f"{heads} query heads must be a multiple of {k.shape[1]} kv heads")
    if not offset.shape == length.shape == fill.shape == (batch,):
        raise ValueError(f"{offset.shape=}, {length.shape=}, {fill.shape=} must be {(batch,)}")
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    mean_rows = pool_k.shape[2] if mean_rows is None else mean_rows
    arrays = (q, pool_k, pool_v, offset, length, tail_k, tail_v, fill)
    return choose(
        "ragged_decode_attention", backend, BACKENDS, *arrays, scale=scale, mean_rows=mean_rows
    )
