"""Integers that order as float32 numbers do, for bisection."""

import jax
import jax.numpy as jnp
from jax import lax

LOWEST = -0x7F800000
"""Key of the lowest finite number: as the least border it leaves -inf out."""


def key_of(x: jax.Array) -> jax.Array:
    """The keys, int32: of -0 that of 0, of NaN the highest, as `jnp.argmax` orders them."""
    key = jnp.where(x == 0, 0, _flip(lax.bitcast_convert_type(x, jnp.int32)))
    return jnp.where(x == x, key, 2**31 - 1)


def value_of(key: jax.Array) -> jax.Array:
    """The number that has a key."""
    return lax.bitcast_convert_type(_flip(key), jnp.float32)


def _flip(bits: jax.Array) -> jax.Array:
    """From the bits of a number to its key, or back."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
