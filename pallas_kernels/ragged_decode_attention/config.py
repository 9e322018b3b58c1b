"""Block sizes of the decode kernel, as data."""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Config:
    """How the kernel is cut and launched.

    Attributes:
        block_keys: cached rows of one trip of its loop.
        num_warps: warps of one program.
        num_stages: how many trips are loaded ahead.
    """

    block_keys: int
    num_warps: int
    num_stages: int


def candidates(capability: int, dtype: jnp.dtype, head_dim: int) -> tuple[Config, ...]:
    """What may be the best for a kind of GPU, the default first; all compile without a spill.

    Args:
        capability: compute capability in tenths, 80 or 90.
        dtype: of the cache.
        head_dim: padded to a power of two.
    """
    if jnp.dtype(dtype).itemsize == 4:
        return (Config(32, 8, 2), Config(16, 4, 2))
    return (Config(64, 4, 4), Config(128, 4, 2), Config(64, 2, 3))


SPLIT_PROGRAMS = 264
"""Programs that a layer's rows are split for: two for each of Hopper's 132 cores, which is what
their shared memory holds at once."""


def splits(pairs: int, most_rows: int, block_keys: int) -> int:
    """Parts that a layer's rows are cut into: what fills the GPU, and two blocks at least.

    Args:
        pairs: sequences times kv heads: programs without a split.
        most_rows: rows of the largest layer there can be, its tail among them.
        block_keys: rows of a block.
    """
    wanted = -(-SPLIT_PROGRAMS // pairs)
    return max(1, min(wanted, most_rows // (2 * block_keys)))
