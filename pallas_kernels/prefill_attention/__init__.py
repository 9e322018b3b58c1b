"""Attention of whole sequences, or of chunks of them, with grouped heads; never a T x T matrix."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.backends import choose
from pallas_kernels.prefill_attention import cudnn, triton, xla
from pallas_kernels.rows import LayerRows, check_heads

BACKENDS = {
    "cudnn": cudnn.prefill_attention,
    "triton": triton.prefill_attention,
    "xla": xla.prefill_attention,
}
"""In the order of preference. That cuDNN comes first follows others' measurements on Hopper, where
Triton's prefill is slower; it has not been measured by this project yet."""

CHUNK_BACKENDS = {"triton": triton.chunk_attention, "xla": xla.chunk_attention}
"""Of `chunk_attention`; cuDNN's attention has no rows that begin in the middle of a buffer."""


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> jax.Array:
    """softmax(q k^T * scale) v for sequences padded at the right.

    Keys at or beyond a row's length are never read into a result, whatever they hold (NaN
    included). Query rows beyond the length have no meaning; they are finite where q is.

    Args:
        q: queries [B, T, N, H].
        k: keys [B, T, K, H], N a multiple of K; query head n reads kv head n // (N // K).
        v: values [B, T, K, H].
        lengths: true length of each row, int32 [B]; T for every row by default.
        causal: position i sees the keys 0..i only.
        scale: factor of the logits; 1 / sqrt(H) by default.
        backend: "triton", "cudnn" (bfloat16 and float16), "xla", or None for the best that supports
            the case on the device.

    Returns:
        [B, T, N, H] in q's type; softmax and sums are float32.

    Raises:
        ValueError: the shapes do not fit each other.
        NotImplementedError: there is no such backend, or it does not support the case.
    """
    batch, length, heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[:2] != (batch, length) or k.shape[3] != head_dim:
        raise ValueError(f"{q.shape=}, {k.shape=}, {v.shape=}: expected [B, T, heads, H] each")
    check_heads(heads, k.shape[2])
    if lengths is None:
        lengths = jnp.full((batch,), length, jnp.int32)
    if lengths.shape != (batch,):
        raise ValueError(f"{lengths.shape=} must be {(batch,)}")
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    arrays = q, k, v, lengths
    return choose("prefill_attention", backend, BACKENDS, *arrays, causal=causal, scale=scale)


def chunk_attention(
    q: jax.Array,
    layer: LayerRows,
    start: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Causal attention of rows that begin inside of a sequence, over keys where a prefill put them.

        keys     0 . . . . . . . . . start . . . . . . lengths . . layer.rows
        queries                      row 0 . . . Tq    rows at or beyond the length: no meaning

    Row i stands at position start[b] + i and sees the keys 0..start[b] + i of the layer that are
    below the length; its own are among them, so they are written before. The layer is read in
    place. As in `prefill_attention`, nothing beyond a length is read into a result, and rows
    without a meaning are finite where q is.

    Args:
        q: queries [B, Tq, N, H].
        layer: the layer's rows, k and v [B, K, C, H], N a multiple of K.
        start: position of each sequence's first query row, int32 [B]; may be 0.
        lengths: rows of each sequence that are in the layer, int32 [B]; at most `layer.rows`.
        scale: factor of the logits; 1 / sqrt(H) by default.
        backend: "triton", "xla", or None for the best that supports the case on the device.

    Returns:
        [B, Tq, N, H] in q's type; softmax and sums are float32.

    Raises:
        ValueError: the shapes do not fit each other.
        NotImplementedError: there is no such backend, or it does not support the case.
    """
    layer.check(q.shape)
    if not start.shape == lengths.shape == q.shape[:1]:
        raise ValueError(f"{start.shape=}, {lengths.shape=} must be {q.shape[:1]}")
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    arrays = q, layer, start, lengths
    return choose("chunk_attention", backend, CHUNK_BACKENDS, *arrays, scale=scale)
