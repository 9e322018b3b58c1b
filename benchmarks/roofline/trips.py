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
from benchmarks.speed.cases import paper_sparsity
from pallas_kernels.splits import shares, split_count, trips
from pallas_kernels.tuning import candidates
from vlcache_jax.cache.allocate import allocate
from vlcache_jax.cache.budget import Prompt
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


def layer_rows(sparsity: np.ndarray, context: int, budget: float = BUDGET) -> np.ndarray:
    """Rows of each layer as VL-Cache divides a budget by the layers' sparsities, int [L].

    Args:
        sparsity: of each layer, float [L].
        context: tokens of the prompt.
        budget: share of the whole cache.
    """
    method, m = VLCache(budget), jnp.array([context], jnp.int32)
    prompt = Prompt(m, jnp.zeros((1, context), bool), len(sparsity), method.limit.data)
    sizes = method.rules()[1].sizes(prompt, jnp.asarray(sparsity[None], jnp.float32))
    return np.asarray(allocate(sizes, prompt.budget, m))[0]


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


def serial_blocks_by_the_mean(rows: np.ndarray, programs: int, block: int) -> np.ndarray:
    """The same of as many splits as the mean layer needs, with the tail in a part of its own."""
    splits = max(1, min(programs, int(rows.mean()) // (2 * block)))
    own, tail = trips(trips(rows, splits), block), trips(TAIL_ROWS, block)
    return own + tail if splits == 1 else np.maximum(own, tail)


@functools.cache
def trip_rows(text: TextConfig) -> list[dict[str, Any]]:
    """A row for each series and context, for a decoder in bfloat16 on a Hopper GPU.

    "slowest" is the program with the most blocks of all layers, now and "before", with splits by
    the mean; "ratio" is the worst layer's share of its even split, "step" that of all layers.
    """
    config, *_ = candidates("ragged_decode_attention", 90, jnp.bfloat16, text.head_dim)
    block = config.block_keys
    programs = split_count(text.num_kv_heads, 2**31)  # of a GPU that is full
    found = []
    for (name, series), context in product(SERIES.items(), CONTEXTS):
        rows = layer_rows(series(text.num_layers), context)
        splits = split_count(text.num_kv_heads, (context + TAIL_ROWS) // block)
        after = serial_blocks(rows, splits, block)
        before = serial_blocks_by_the_mean(rows, programs, block)
        even = trips(trips(rows, block) + trips(TAIL_ROWS, block), programs)
        row = {"sparsity": name, "context": context, "largest_layer": int(rows.max())}
        for label, blocks in (("", after), ("_before", before)):
            row[f"slowest{label}"] = int(blocks.max())
            row[f"ratio{label}"] = float((blocks / even).max())
            row[f"step{label}"] = float(blocks.sum() / even.sum())
        found.append(row)
    return found


def trip_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, with splits by the mean layer and as they are."""
    head = ["serial trips at batch 1, 10 %", "context", "largest layer", "slowest program"]
    head += ["of an even split", "all layers"]
    cells = [
        [
            row["sparsity"],
            f"{row['context']:,}",
            f"{row['largest_layer']:,}",
            f"{row['slowest_before']} -> {row['slowest']}",
            f"{row['ratio_before']:.2f}x -> {row['ratio']:.2f}x",
            f"{row['step_before']:.2f}x -> {row['step']:.2f}x",
        ]
        for row in rows
    ]
    return table(head, cells)
