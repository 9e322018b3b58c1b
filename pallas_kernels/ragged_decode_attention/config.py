"""Block sizes of the decode kernel, as data."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.tuning import measured


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
        return (Config(64, 4, 2), Config(64, 8, 2))
    return (Config(64, 4, 4), Config(128, 4, 2), Config(128, 8, 3), Config(64, 2, 3))


def choose(device: str, capability: int, dtype: jnp.dtype, head_dim: int) -> Config:
    """The measured best for a device, else the first candidate; arguments as in `candidates`."""
    found = measured("ragged_decode_attention", device, dtype, head_dim)
    return Config(**found) if found else candidates(capability, dtype, head_dim)[0]


SPLIT_PROGRAMS = 264
"""Programs that a layer's rows are split for: two for each of Hopper's 132 cores, which is what
their shared memory holds at once."""


def splits(pairs: int, mean_rows: int, block_keys: int) -> int:
    """Parts that a layer's rows are cut into.

    Args:
        pairs: sequences times kv heads: programs without a split.
        mean_rows: rows of a layer, on average.
        block_keys: rows of a block.
    """
    wanted = -(-SPLIT_PROGRAMS // pairs)
    return max(1, min(wanted, mean_rows // (2 * block_keys)))
