"""Plain jax.numpy, which XLA fuses as it can."""

import jax
import jax.numpy as jnp
from jax import lax


def add_rms_norm(
    x: jax.Array, delta: jax.Array, scale: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """See the package's public function."""
    x = x + delta
    return x, rms_norm(x, scale, eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """The norm alone: [..., D] in the type of x."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)
