"""Block sizes of the prefill kernel, as data."""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Config:
    """How the kernel is cut and launched.

    Attributes:
        block_q: query rows of one program.
        block_k: keys of one trip of its loop.
        num_warps: warps of one program.
        num_stages: how many trips are loaded ahead.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def candidates(capability: int, dtype: jnp.dtype, head_dim: int) -> tuple[Config, ...]:
    """What may be the best for a kind of GPU, the default first; all compile without a spill.

    Args:
        capability: compute capability in tenths, 80 or 90.
        dtype: of q, k and v.
        head_dim: padded to a power of two.
    """
    hopper = capability >= 90
    if jnp.dtype(dtype).itemsize == 4:  # no tensor cores: registers are the limit
        if head_dim < 128:
            return (Config(32, 64, 8, 2), Config(16, 64, 4, 2))[0 if hopper else 1 :]
        if hopper:
            return (Config(32, 64, 8, 1), Config(16, 64, 8, 2))
        return (Config(32, 32, 8, 2), Config(16, 32, 4, 2))
    if head_dim >= 128:
        if hopper:
            return (Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(64, 64, 4, 3))
        return (Config(128, 32, 8, 3), Config(64, 128, 8, 2), Config(64, 64, 4, 3))
    first = Config(128, 64, 4, 3) if hopper else Config(128, 64, 8, 3)
    return (first, Config(128, 128, 8, 3), Config(64, 64, 4, 3))
