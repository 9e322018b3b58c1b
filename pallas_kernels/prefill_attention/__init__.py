"""Attention of whole sequences with grouped heads, never a T x T matrix."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.backends import choose
from pallas_kernels.prefill_attention import cudnn, triton, xla

BACKENDS = {
    "cudnn": cudnn.prefill_attention,
    "triton": triton.prefill_attention,
    "xla": xla.prefill_attention,
}
"""In the order of preference. That cuDNN comes first follows others' measurements on Hopper, where
Triton's prefill is slower; it has not been measured by this project yet."""


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
    if heads % k.shape[2]:
        raise ValueError(f"{heads} query heads must be a multiple of {k.shape[2]} kv heads")
    if lengths is None:
        lengths = jnp.full((batch,), length, jnp.int32)
    if lengths.shape != (batch,):
        raise ValueError(f"{lengths.shape=} must be {(batch,)}")
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    arrays = q, k, v, lengths
    return choose("prefill_attention", backend, BACKENDS, *arrays, causal=causal, scale=scale)
