"""How the rows of a layer are shared out among the programs that read them side by side.

    pool segment | | | | | | |   tail | |        whole blocks of rows, one section behind the other
    split          0   | 1   | 2        | 3      an equal share of the blocks for each

How many splits there are is static; which blocks a split reads follows from the layer's own length.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp


def trips(rows: Any, block: int) -> Any:
    """Blocks that hold so many rows: numbers, or arrays of them."""
    return (rows + block - 1) // block


def split_count(programs: int, blocks: int, *, per_core: int = 2, least: int = 2) -> int:
    """Splits that fill the 132 cores of a Hopper GPU, as far as there are blocks for them.

    Args:
        programs: those there are without a split.
        blocks: of the largest layer there can be.
        per_core: programs that a core runs at once; as of decoding the shared memory holds two.
        least: blocks that a split has at least.
    """
    return max(1, min(trips(132 * per_core, programs), blocks // least))


def shares(blocks: Sequence[Any], split: Any, splits: int) -> list[tuple[Any, Any]]:
    """A split's share of the blocks of each section: the first one, and the one behind the last.

    Args:
        blocks: how many each section has: numbers, or arrays of them.
        split: which split, from 0 on: a number, or an array that broadcasts to `blocks`.
        splits: how many there are; those that nothing is left for have no block.
    """
    each = trips(sum(blocks), splits)
    begin, found = split * each, []
    for count in blocks:
        found.append((jnp.clip(begin, 0, count), jnp.clip(begin + each, 0, count)))
        begin = begin - count
    return found
