"""The Walsh-Hadamard transform along the head dim: it spreads a channel's outliers over all.

It is orthonormal, so the product of two transformed vectors is that of the vectors. Of a head dim
that is no power of two it is block-diagonal: blocks of the largest power of two that divides it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def block(size: int) -> int:
    """The largest power of two that divides a head dim: the size of the transform."""
    return size & -size


def signs(size: int) -> np.ndarray:
    """The transform without its factor, in Sylvester's order: 1, -1 and, outside the blocks, 0,
    int8 [H, H].
    """
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < block(size):
        matrix = np.kron(np.array([[1, 1], [1, -1]], np.int8), matrix)
    return np.kron(np.eye(size // block(size), dtype=np.int8), matrix)


def factor(size: int) -> float:
    """What the signs are multiplied by to be orthonormal."""
    return 1 / math.sqrt(block(size))


def transform(x: jax.Array) -> jax.Array:
    """Transform the last axis; the transform is its own inverse.

    Args:
        x: [..., H].

    Returns:
        [..., H] in x's type; the products of the entries are exact and their sum is float32.
    """
    size = x.shape[-1]
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    turned = jnp.matmul(
        x,
        jnp.asarray(signs(size), x.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return (turned * factor(size)).astype(x.dtype)


def butterflies(x: jax.Array, size: int) -> jax.Array:
    """The transform by sums and differences, as kernels do it: log2(block) steps, no matrix.

    Args:
        x: rows of float32 [R, columns]; behind the head dim there may be columns of zeros.
        size: the head dim.
    """
    rows = x.reshape(-1, block(size))
    half = rows.shape[1] // 2
    for _ in range(half.bit_length()):  # each step takes the first bit of the column to the end
        left, right = lax.split(rows, [half, half], axis=1)
        rows = jnp.stack([left + right, left - right], axis=-1).reshape(rows.shape)
    return rows.reshape(x.shape) * factor(size)
