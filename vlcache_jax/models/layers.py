"""What the networks share: parameters, products and norms.

A kernel keeps the axes that have a meaning (`[D, K, G + 2, H]`, not `[D, 6144]`), so that heads
can be split over devices by naming an axis; XLA turns each product into one plain GEMM.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels.add_rms_norm import add_rms_norm
from pallas_kernels.add_rms_norm.xla import rms_norm

DType = jnp.dtype | type


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DType) -> nnx.Param:
    """A parameter drawn from N(0, 0.02^2)."""
    return nnx.Param((0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype))


def product(
    equation: str, x: jax.Array, kernel: nnx.Param | jax.Array, out: DType | None = None
) -> jax.Array:
    """Einsum of activations with a kernel, in their type; float32 really is float32.

    Args:
        equation: an einsum equation of two operands.
        x: activations.
        kernel: the parameter, of the same type as `x`.
        out: type of the result; that of `x` by default.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(
        equation, x, kernel[...], precision=precision, preferred_element_type=out or x.dtype
    )


def weighted_rows(table: jax.Array, rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sums of C rows of a table, added up in float32, row by row.

    Args:
        table: [R, D].
        rows: int32 [..., C].
        weights: float32 [..., C].

    Returns:
        [..., D] in the type of the table.
    """
    parts = [
        jnp.take(table, rows[..., c], axis=0) * weights[..., c, None] for c in range(rows.shape[-1])
    ]
    return functools.reduce(jnp.add, parts).astype(table.dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias` over the last axis of x; kernel [in, out], bias [out]."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, dtype: DType, rngs: nnx.Rngs
    ):
        self.kernel = normal(rngs, (inputs, outputs), dtype)
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        y = product("...i,io->...o", x, self.kernel)
        return y if self.bias is None else y + self.bias[...]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float, *, dtype: DType):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> [..., size], in the type of x."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float, *, dtype: DType):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> [..., size], in the type of x."""
        return rms_norm(x, self.scale[...], self.eps)

    def add(
        self, x: jax.Array, delta: jax.Array | None, backend: str | None
    ) -> tuple[jax.Array, jax.Array]:
        """The residual stream x + delta, and its norm; `delta` None stands for 0."""
        if delta is None:
            return x, self(x)
        return add_rms_norm(x, delta, self.scale[...], eps=self.eps, backend=backend)
