"""Dense float32 attention, for tests only."""

import jax
import jax.numpy as jnp


def prefill_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, causal: bool, scale: float
) -> jax.Array:
    """The whole [B, N, T, T] matrix at once; rows beyond the length are zero."""
    batch, length, heads, head_dim = q.shape
    position = jnp.arange(length, dtype=jnp.int32)
    valid = position < lengths[:, None]  # [B, T]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.where(valid[:, :, None, None], x, 0.0) for x in (k, v))
    q = q.reshape(batch, length, k.shape[2], -1, head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, precision="highest") * scale
    visible = valid[:, None, :] & valid[:, :, None]
    if causal:
        visible &= position[None, :, None] >= position[None, None, :]
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    weights = jnp.where(visible[:, None, None], jax.nn.softmax(logits, axis=-1), 0.0)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, v, precision="highest")
    return mixed.reshape(batch, length, heads, head_dim)
