"""Where the bytes go: the cache of one answer, and the memory a model needs."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vlcache_jax.cache.methods import FullCache
from vlcache_jax.config import LlavaConfig, TextConfig
from vlcache_jax.models.llava import abstract_params


@dataclass(frozen=True)
class CacheReport:
    """The cache of one sequence, in bytes (K and V together).

    Attributes:
        method: name of the method.
        budget: share of the cache that was asked for.
        full_bytes: what all of the prompt's true length would take.
        kept_bytes: what the kept prompt tokens take.
        kept_share: kept_bytes / full_bytes.
        allocated_bytes: the pool as allocated, with its padding.
        tail_bytes: the tail for new tokens, as allocated.
    """

    method: str
    budget: float
    full_bytes: int
    kept_bytes: int
    kept_share: float
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
    cache: FullCache,
    dtype: jnp.dtype,
    *,
    prompt_tokens: int,
    kept_rows: int,
    prompt_rows: int,
    tail_rows: int,
) -> CacheReport:
    """The report of one sequence of a batch.

    Args:
        config: the decoder.
        cache: the method and its settings.
        dtype: type of the cache.
        prompt_tokens: true length of the prompt, m.
        kept_rows: sum of the layers' kept lengths.
        prompt_rows: the prompt's bucket, T.
        tail_rows: rows of the tail, R.
    """
    full = prompt_tokens * token_bytes(config, dtype)
    kept = kept_rows * row_bytes(config, dtype)
    return CacheReport(
        method=cache.name,
        budget=cache.budget,
        full_bytes=full,
        kept_bytes=kept,
        kept_share=kept / full,
        allocated_bytes=cache.capacity(config.num_layers, prompt_rows) * row_bytes(config, dtype),
        tail_bytes=tail_rows * token_bytes(config, dtype),
    )


@dataclass(frozen=True)
class MemoryNeed:
    """Device memory for a model, a context and a batch, in bytes.

    Attributes:
        parameters: the parameters.
        pool: the pool of the whole batch with the full cache.
        tail: the tail of the whole batch.
        activations: the largest activations of a prefill, an estimate: the residual stream, the
            gate and up products, and the logits of one position.
        total: their sum.
    """

    parameters: int
    pool: int
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
    config: LlavaConfig, dtype: jnp.dtype, *, rows: int, batch: int, new_tokens: int
) -> MemoryNeed:
    """Device memory needed with the full cache.

    Args:
        config: the model.
        dtype: type of parameters and cache.
        rows: prompt rows, padded to their bucket.
        batch: sequences.
        new_tokens: rows of the tail.
    """
    text, size = config.text, jnp.dtype(dtype).itemsize
    parameters = count_parameters(config)["total"] * size
    pool = batch * FullCache().capacity(text.num_layers, rows) * row_bytes(text, dtype)
    tail = batch * new_tokens * token_bytes(text, dtype)
    width = 2 * text.hidden_size + 3 * text.intermediate_size
    activations = batch * (rows * width * size + text.vocab_size * 4)
    total = parameters + pool + tail + activations
    return MemoryNeed(parameters, pool, tail, activations, total)


def human_bytes(count: float) -> str:
    """A byte count for people, in units of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
