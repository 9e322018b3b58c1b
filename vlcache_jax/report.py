"""Where the bytes go: the cache of one answer, and the memory a model needs."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.methods import CacheMethod, FullCache
from vlcache_jax.config import LlavaConfig, TextConfig
from vlcache_jax.models.llava import abstract_params


@dataclass(frozen=True)
class CacheReport:
    """The cache of one sequence, in bytes (K and V together).

    Attributes:
        method: name of the method.
        budget_requested: what was asked for, as it was given: "0.1", "256tok".
        budget: the share of the cache that this is for the prompt, at most 1.
        full_bytes: what all of the prompt's true length would take.
        kept_bytes: what the kept prompt tokens take.
        kept_share: kept_bytes / full_bytes.
        compression_ratio: the share removed, 1 - kept_share (kvpress counts so).
        layer_budgets: tokens kept by each layer, for every kv head.
        kept_visual: visual tokens among them, the mean over layers and kv heads.
        kept_text: text tokens among them, likewise.
        allocated_bytes: the pool as allocated, with its padding.
        tail_bytes: the tail for new tokens, as allocated.
    """

    method: str
    budget_requested: str
    budget: float
    full_bytes: int
    kept_bytes: int
    kept_share: float
    compression_ratio: float
    layer_budgets: list[int]
    kept_visual: float
    kept_text: float
    allocated_bytes: int
    tail_bytes: int


def row_bytes(config: TextConfig, dtype: jnp.dtype) -> int:
    """Bytes of one token's key and value in one layer."""
    return 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def token_bytes(config: TextConfig, dtype: jnp.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return config.num_layers * row_bytes(config, dtype)


def cache_report(
    config: TextConfig,
    cache: CacheMethod,
    dtype: jnp.dtype,
    *,
    prompt_tokens: int,
    kept: np.ndarray,
    kept_visual: np.ndarray,
    prompt_rows: int,
    tail_rows: int,
) -> CacheReport:
    """The report of one sequence of a batch.

    Args:
        config: the decoder.
        cache: the method and its settings.
        dtype: type of the cache.
        prompt_tokens: true length of the prompt, m.
        kept: tokens kept by each layer, int [L].
        kept_visual: visual tokens among them, the mean over the kv heads, float [L].
        prompt_rows: the prompt's bucket, T.
        tail_rows: rows of the tail, R.
    """
    full = prompt_tokens * token_bytes(config, dtype)
    kept_bytes = int(kept.sum()) * row_bytes(config, dtype)
    asked, visual = cache.limit, float(kept_visual.mean())
    share = asked.share if asked.tokens is None else asked.tokens / prompt_tokens
    return CacheReport(
        method=cache.name,
        budget_requested=str(asked),
        budget=min(1.0, share or 1.0),
        full_bytes=full,
        kept_bytes=kept_bytes,
        kept_share=kept_bytes / full,
        compression_ratio=1 - kept_bytes / full,
        layer_budgets=[int(rows) for rows in kept],
        kept_visual=visual,
        kept_text=float(kept.mean()) - visual,
        allocated_bytes=cache.capacity(config.num_layers, prompt_rows) * row_bytes(config, dtype),
        tail_bytes=tail_rows * token_bytes(config, dtype),
    )


@dataclass(frozen=True)
class MemoryNeed:
    """Device memory for a model, a context and a batch, in bytes.

    Attributes:
        parameters: the parameters.
        pool: the pool of the whole batch.
        prefill: K and V of the whole prompts, which live until they are compacted; 0 with the full
            cache, whose pool they are. Less where a batch is prefilled a few sequences at a time.
        tail: the tail of the whole batch.
        activations: the largest activations of a prefill, an estimate: the residual stream, the
            gate and up products, and the logits of one position.
        total: their sum.
    """

    parameters: int
    pool: int
    prefill: int
    tail: int
    activations: int
    total: int


def count_parameters(config: LlavaConfig) -> dict[str, int]:
    """Numbers of parameters: of each part of the model, and "total"."""
    parts = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for name, tree in abstract_params(config).items()
    }
    return {**parts, "total": sum(parts.values())}


def memory_need(
    config: LlavaConfig,
    dtype: jnp.dtype,
    cache: CacheMethod,
    *,
    rows: int,
    batch: int,
    new_tokens: int,
) -> MemoryNeed:
    """Device memory needed to decode with a method.

    Args:
        config: the model.
        dtype: type of parameters and cache.
        cache: the method.
        rows: prompt rows, padded to their bucket.
        batch: sequences.
        new_tokens: rows of the tail.
    """
    text, size = config.text, jnp.dtype(dtype).itemsize
    parameters = count_parameters(config)["total"] * size
    row = batch * row_bytes(text, dtype)
    pool = cache.capacity(text.num_layers, rows) * row
    full = FullCache().capacity(text.num_layers, rows) * row
    prefill = 0 if cache.limit.keeps_all else full
    tail = batch * new_tokens * token_bytes(text, dtype)
    width = 2 * text.hidden_size + 3 * text.intermediate_size
    activations = batch * (rows * width * size + text.vocab_size * 4)
    total = parameters + pool + prefill + tail + activations
    return MemoryNeed(parameters, pool, prefill, tail, activations, total)


def human_bytes(count: float) -> str:
    """A byte count for people, in units of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
