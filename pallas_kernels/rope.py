"""Rotary position embedding (RoFormer, section 3.2.2): the pairs (i, i + H / 2) are turned."""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn each pair of the last axis by its angle.

    Args:
        x: [..., H].
        cos: cosine of the angles, float32 [..., H / 2].
        sin: sine, likewise.

    Returns:
        [..., H] in x's type; the arithmetic is float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
