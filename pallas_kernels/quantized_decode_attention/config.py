"""Block sizes of the decode kernel over packed rows, as data."""

from dataclasses import dataclass

import jax.numpy as jnp


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


def splits(programs: int, most_blocks: int, num_warps: int) -> int:
    """Parts that a layer's rows are cut into: what fills the GPU, and two blocks at least.

    Args:
        programs: those there are without a split.
        most_blocks: blocks of the largest layer there can be, of all its sections.
        num_warps: warps of a program.
    """
    wanted = -(-SPLIT_WARPS // (programs * num_warps))
    return max(1, min(wanted, most_blocks // 2))
