"""Launch parameters of the sampling kernel, as data."""

from dataclasses import dataclass

import jax.numpy as jnp

TENSOR_CORE_OPS = {"sample_tokens": 0}
"""Kernels whose code has just so many tensor-core instructions."""


@dataclass(frozen=True)
class Config:
    """How the kernel is launched.

    Attributes:
        num_warps: warps of one program, which does one row.
    """

    num_warps: int


def candidates(capability: int, dtype: jnp.dtype, width: int) -> tuple[Config, ...]:
    """What may be the best for a kind of GPU, the default first; all compile without a spill.

    Args:
        capability: compute capability in tenths, 80 or 90.
        dtype: of the logits.
        width: V, padded to a power of two.
    """
    return Config(16), Config(8)
