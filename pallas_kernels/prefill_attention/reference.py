"""Dense float32 attention, for tests only."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.rows import LayerRows


def prefill_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, causal: bool, scale: float
) -> jax.Array:
    """The whole [B, N, T, T] matrix at once; rows beyond the length are zero."""
    return _attend(q, k, v, jnp.zeros_like(lengths), lengths, causal=causal, scale=scale)


def chunk_attention(
    q: jax.Array, layer: LayerRows, start: jax.Array, lengths: jax.Array, *, scale: float
) -> jax.Array:
    """The same over a copy of the layer, [B, N, Tq, T]."""
    k, v = (
        lax.dynamic_slice_in_dim(x, layer.first, layer.rows, axis=2).swapaxes(1, 2)
        for x in (layer.k, layer.v)
    )
    return _attend(q, k, v, start, lengths, causal=True, scale=scale)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
    *,
    causal: bool,
    scale: float,
) -> jax.Array:
    batch, length, heads, head_dim = q.shape
    place = jnp.arange(k.shape[1], dtype=jnp.int32)
    readable = place < lengths[:, None]  # [B, T]
    position = start[:, None] + jnp.arange(length, dtype=jnp.int32)  # [B, Tq]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.where(readable[:, :, None, None], x, 0.0) for x in (k, v))
    q = q.reshape(batch, length, k.shape[2], -1, head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, precision="highest") * scale
    visible = readable[:, None, :] & (position < lengths[:, None])[:, :, None]
    if causal:
        visible &= place <= position[:, :, None]
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    weights = jnp.where(visible[:, None, None], jax.nn.softmax(logits, axis=-1), 0.0)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, v, precision="highest")
    return mixed.reshape(batch, length, heads, head_dim)
