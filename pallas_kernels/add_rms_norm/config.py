"""Launch parameters of the norm's kernel, as data."""

from dataclasses import dataclass

import jax.numpy as jnp


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
        dtype: of the rows.
        width: D, padded to a power of two.
    """
    return (Config(8), Config(16), Config(4)) if width <= 4096 else (Config(16),)
