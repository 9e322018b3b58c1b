"""Block sizes of the window kernels, as data."""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Config:
    """How the kernels are cut and launched.

    Attributes:
        block_rows: window rows of one product.
        block_keys: keys of one product.
        num_warps: warps of one program.
        num_stages: how many trips of a loop are loaded ahead.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int


def candidates(capability: int, dtype: jnp.dtype, head_dim: int) -> tuple[Config, ...]:
    """What may be the best for a kind of GPU, the default first; all compile without a spill.

    Args:
        capability: compute capability in tenths, 80 or 90.
        dtype: of q and k.
        head_dim: padded to a power of two.
    """
    if jnp.dtype(dtype).itemsize == 4:  # no tensor cores: registers are the limit
        return (Config(32, 32, 4, 2), Config(16, 32, 4, 2))
    return (Config(64, 64, 4, 3), Config(64, 128, 4, 2), Config(32, 128, 4, 3))


SPLIT_PROGRAMS = 528
"""Programs that the keys are split for in the pass over the rows: four for each of Hopper's 132
cores. A window has few rows, and one program for each block of them would leave most cores idle."""


def splits(programs: int, keys: int, block_keys: int) -> int:
    """Parts that the keys are cut into, where there would be so many programs without."""
    wanted = -(-SPLIT_PROGRAMS // programs)
    return max(1, min(wanted, keys // (4 * block_keys)))
