"""Block sizes of the decode kernel over packed rows, as data."""

from dataclasses import dataclass

import jax.numpy as jnp

TENSOR_CORE_OPS = {"merge_splits": 0}
"""Kernels whose code has just so many tensor-core instructions; all others have some."""


@dataclass(frozen=True)
class Config:
    """How the kernel is cut and launched.

    Attributes:
        block_words: word-rows of one trip of its loop over packed rows.
        block_keys: rows of full width of one trip.
        num_warps: warps of one program.
        num_stages: how many trips are loaded ahead.
    """

    block_words: int
    block_keys: int
    num_warps: int
    num_stages: int


def candidates(capability: int, dtype: jnp.dtype, head_dim: int) -> tuple[Config, ...]:
    """What may be the best for a kind of GPU, the default first; all compile without a spill.

    Args:
        capability: compute capability in tenths, 80 or 90.
        dtype: of the rows of full width.
        head_dim: padded to a power of two.
    """
    return (Config(32, 32, 2, 2), Config(32, 32, 2, 3))


SPLIT_WARPS = 1056
"""Warps that a layer's rows are split for: eight for each of Hopper's 132 cores, which is what
their registers hold at once."""


def splits(programs: int, mean_words: int, config: Config) -> int:
    """Parts that a layer's packed rows are cut into.

    Args:
        programs: those there are without a split.
        mean_words: word-rows of a layer, on average.
        config: the block sizes.
    """
    wanted = -(-SPLIT_WARPS // (programs * config.num_warps))
    return max(1, min(wanted, mean_words // (2 * config.block_words)))
