"""How long the slowest program of decode attention is, in blocks of keys that it reads in series.

Layers run one after the other, and each waits for its slowest program. Counted at batch 1, where
there are fewer sequences and heads than a GPU runs programs; nothing is measured. An even split of
a layer's rows gives each of the programs that fill the GPU as many of its blocks as the others.
"""

import functools
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.documents import table
from benchmarks.roofline import TAIL_ROWS
from benchmarks.speed.cases import layer_rows, paper_sparsity
from pallas_kernels.splits import shares, split_count, trips
from pallas_kernels.tuning import candidates
from vlcache_jax.cache.methods import VLCache
from vlcache_jax.models.config import TextConfig

MEASURED = (0.5, 0.97, 0.97, 0.98, 0.99, 0.99, 1.0, 0.99, 0.99, 0.99)
"""Layer sparsities of SmolLM2-135M, every third layer."""

SERIES: Mapping[str, Callable[[int], np.ndarray]] = {
    "SmolLM2": lambda layers: np.interp(
        np.linspace(0, len(MEASURED) - 1, layers), np.arange(len(MEASURED)), MEASURED
    ),
    "paper": lambda layers: paper_sparsity(1, layers)[0],
}
"""The sparsity of each layer, by where it comes from: float [L]."""

CONTEXTS = (2048, 8192, 32768)
BUDGET = 0.1


def serial_blocks(rows: np.ndarray, splits: int, block: int) -> np.ndarray:
    """Blocks of the slowest program of each layer, as the kernel shares them out: int [L].

    Args:
        rows: of each layer, int [L]; beside them there is a full tail.
        splits: programs that share a kv head's rows.
        block: rows of a block.
    """
    sections = trips(rows[:, None], block), trips(TAIL_ROWS, block)
    found = shares(sections, np.arange(splits), splits)
    return np.max(sum(np.asarray(end) - np.asarray(begin) for begin, end in found), axis=1)


@functools.cache
def trip_rows(text: TextConfig) -> list[dict[str, Any]]:
    """A row for each series and context, for a decoder in bfloat16 on a Hopper GPU.

    "slowest" is the program with the most blocks of all layers; "ratio" is the worst layer's share
    of its even split, "step" that of all layers.
    """
    config, *_ = candidates("ragged_decode_attention", 90, jnp.bfloat16, text.head_dim)
    block = config.block_keys
    programs = split_count(text.num_kv_heads, 2**31)  # of a GPU that is full
    found = []
    for (name, series), context in product(SERIES.items(), CONTEXTS):
        rows = np.asarray(layer_rows(VLCache(BUDGET), series(text.num_layers)[None], context))[0]
        splits = split_count(text.num_kv_heads, (context + TAIL_ROWS) // block)
        blocks = serial_blocks(rows, splits, block)
        even = trips(trips(rows, block) + trips(TAIL_ROWS, block), programs)
        found.append(
            {
                "sparsity": name,
                "context": context,
                "largest_layer": int(rows.max()),
                "slowest": int(blocks.max()),
                "ratio": float((blocks / even).max()),
                "step": float(blocks.sum() / even.sum()),
            }
        )
    return found


def trip_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ["serial trips at batch 1, 10 %", "context", "largest layer", "slowest program"]
    head += ["of an even split", "all layers"]
    cells = [
        [
            row["sparsity"],
            f"{row['context']:,}",
            f"{row['largest_layer']:,}",
            str(row["slowest"]),
            f"{row['ratio']:.2f}x",
            f"{row['step']:.2f}x",
        ]
        for row in rows
    ]
    return table(head, cells)
