"""Where the bytes go: the cache of one answer, and the memory a model needs."""

import math
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.quantize import Quantizer, groups
from vlcache_jax.cache.quantizers import QUANTIZERS
from vlcache_jax.cache.state import whole_capacity
from vlcache_jax.models.config import ModelConfig, TextConfig
from vlcache_jax.models.families import abstract_params
from vlcache_jax.running.generate import Generate


@dataclass(frozen=True)
class CacheReport:
    """The cache of one sequence, in bytes (K and V together).

    Attributes:
        method: name of the method.
        label: with that of the quantizer behind it: "vl-cache+akvq".
        kv_bits: the quantizer as the command line calls it, None where nothing is quantized.
        budget_requested: what was asked for, as it was given: "0.1", "256tok".
        budget: the share of the cache that this is for the prompt, at most 1.
        full_bytes: what all of the prompt's true length would take, not quantized.
        kept_bytes: what the kept prompt tokens take: payload, scales and dense rows.
        kept_share: kept_bytes / full_bytes.
        compression_ratio: the share removed, 1 - kept_share (kvpress counts so).
        payload_bytes: the codes of quantized tokens; 0 where nothing is quantized.
        scale_bytes: their scales and shifts; 0 where nothing is quantized.
        dense_bytes: the kept tokens of full width.
        effective_bits: 8 * kept_bytes / numbers in the kept tokens' keys and values.
        layer_budgets: tokens kept by each layer, for every kv head.
        kept_visual: visual tokens among them, and those of a context, the mean over layers and kv
            heads.
        kept_text: all other tokens among them, likewise.
        allocated_bytes: the pool as allocated, with its padding, and with the rows of a quantized
            one that are free for new tokens.
        tail_bytes: the tail for new tokens, as allocated.
    """

    method: str
    label: str
    kv_bits: str | None
    budget_requested: str
    budget: float
    full_bytes: int
    kept_bytes: int
    kept_share: float
    compression_ratio: float
    payload_bytes: int
    scale_bytes: int
    dense_bytes: int
    effective_bits: float
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


def kv_bits(quantizer: Quantizer | None) -> str | None:
    """What `--kv-bits` calls a quantizer; its class's name where it has other settings."""
    if quantizer is None:
        return None
    named = (name for name, known in QUANTIZERS.items() if known == quantizer)
    return next(named, quantizer.name)


def packed_bytes(
    config: TextConfig, quantizer: Quantizer | None, rows: np.ndarray
) -> tuple[int, int]:
    """Bytes of quantized rows: of their codes, and of their scales and shifts.

    What a run's last word and the widest rows leave unused is padding: it is not counted.

    Args:
        config: the decoder.
        quantizer: how they are quantized, for this decoder; None where there are none.
        rows: rows of each layer and width, int [L, widths].
    """
    if quantizer is None:
        return 0, 0
    heads, size = config.num_kv_heads, config.head_dim
    bits = 2 * heads * size * int(np.sum(rows * np.array(quantizer.widths)))
    by_token = int(rows.sum()) * groups(size, quantizer.group)
    if quantizer.key_group is None:
        pairs = 2 * by_token
    else:
        pairs = by_token + int(np.sum(-(-rows // quantizer.key_group))) * size
    return -(-bits // 8), 4 * heads * pairs  # two bfloat16 each


def kept_bytes(
    config: TextConfig, quantizer: Quantizer | None, rows: np.ndarray, dtype: jnp.dtype
) -> int:
    """Bytes of rows: those of full width, codes, scales and shifts; no padding.

    Args:
        config: the decoder.
        quantizer: how they are quantized; None where all have full width.
        rows: of full width and of each width of the quantizer, int [..., 1 + widths].
        dtype: of those of full width.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    packed = packed_bytes(config, quantizer, flat[:, 1:])
    return int(flat[:, 0].sum()) * row_bytes(config, dtype) + sum(packed)


@lru_cache
def pool_bytes(
    config: TextConfig,
    cache: CacheMethod,
    dtype: jnp.dtype,
    *,
    batch: int,
    prompt_rows: int,
    new_rows: int = 0,
) -> int:
    """Bytes of a pool as it is allocated: rows, words and scales, all with their padding.

    Args:
        config: the decoder.
        cache: the method.
        dtype: type of the cache.
        batch: sequences.
        prompt_rows: the prompts' bucket, T.
        new_rows: rows of a layer that are left free for new tokens (`Stages.reserved_rows`).
    """
    pool = cache.for_model(config).pool_shapes(config, batch, prompt_rows, dtype, new_rows)
    # The others are a few numbers for each layer, which say where these lie.
    large = [leaf for leaf in jax.tree.leaves(pool) if leaf.ndim == 4]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in large)


def cache_report(
    config: TextConfig,
    cache: CacheMethod,
    dtype: jnp.dtype,
    *,
    prompt_tokens: int,
    counts: np.ndarray,
    kept_visual: np.ndarray,
    prompt_rows: int,
    tail_rows: int,
    reserved_rows: int = 0,
) -> CacheReport:
    """The report of one sequence of a batch.

    Args:
        config: the decoder.
        cache: the method and its settings, for this decoder (`CacheMethod.for_model`).
        dtype: type of the cache.
        prompt_tokens: true length of the prompt, m.
        counts: tokens kept by each layer: those of full width, then those of each width of the
            quantizer, int [L, 1 + widths].
        kept_visual: visual tokens among them, and those of a context, the mean over the kv heads,
            float [L].
        prompt_rows: the prompt's bucket, T.
        tail_rows: rows of the tail, R.
        reserved_rows: rows of a layer that are left free for new tokens.
    """
    kept, row = counts.sum(axis=-1), row_bytes(config, dtype)
    full = prompt_tokens * token_bytes(config, dtype)
    dense = int(counts[:, 0].sum()) * row
    payload, scales = packed_bytes(config, cache.quantize, counts[:, 1:])
    kept_bytes = payload + scales + dense
    numbers = int(kept.sum()) * row // jnp.dtype(dtype).itemsize
    asked, visual = cache.limit, float(kept_visual.mean())
    share = asked.share if asked.tokens is None else asked.tokens / prompt_tokens
    return CacheReport(
        method=cache.name,
        label=cache.label,
        kv_bits=kv_bits(cache.quantize),
        budget_requested=str(asked),
        budget=min(1.0, share or 1.0),
        full_bytes=full,
        kept_bytes=kept_bytes,
        kept_share=kept_bytes / full,
        compression_ratio=1 - kept_bytes / full,
        payload_bytes=payload,
        scale_bytes=scales,
        dense_bytes=dense,
        effective_bits=8 * kept_bytes / numbers,
        layer_budgets=kept.tolist(),
        kept_visual=visual,
        kept_text=float(kept.mean()) - visual,
        allocated_bytes=pool_bytes(
            config,
            cache.in_bucket(prompt_rows),  # one of few: they are remembered
            dtype,
            batch=1,
            prompt_rows=prompt_rows,
            new_rows=reserved_rows,
        ),
        tail_bytes=tail_rows * token_bytes(config, dtype),
    )


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Numbers of parameters: of each part of the model, and "total"."""
    parts = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for name, tree in abstract_params(config).items()
    }
    return {**parts, "total": sum(parts.values())}


def memory_need(
    config: ModelConfig,
    dtype: jnp.dtype,
    cache: CacheMethod,
    *,
    rows: int,
    batch: int,
    new_tokens: int,
) -> dict[str, int]:
    """Device memory needed to decode with a method, in bytes.

    Args:
        config: the model.
        dtype: type of parameters and cache.
        cache: the method.
        rows: prompt rows, padded to their bucket.
        batch: sequences.
        new_tokens: most tokens of an answer.

    Returns:
        "parameters", once: a method with the transform is reckoned with a model that is loaded for
        it (`load(transform=True)`); the whole batch's "pool" and "tail"; "prefill", K and V of the
        whole prompts until they are compacted or quantized (0 with the full cache, whose pool they
        are; less where a batch is prefilled a few sequences at a time); "activations", an estimate
        of the largest of a prefill: the residual stream, the gate and up products, and the logits
        of one position; "total", the sum.
    """
    text, size = config.text, jnp.dtype(dtype).itemsize
    stages = Generate(config, cache, new_tokens).stages
    full = batch * whole_capacity(text.num_layers, rows) * row_bytes(text, dtype)
    width = 2 * text.hidden_size + 3 * text.intermediate_size
    parts = {
        "parameters": count_parameters(config)["total"] * size,
        "pool": pool_bytes(
            text, cache, dtype, batch=batch, prompt_rows=rows, new_rows=stages.reserved_rows
        ),
        "prefill": 0 if cache.is_full else full,
        "tail": batch * stages.tail_rows * token_bytes(text, dtype),
        "activations": batch * (rows * width * size + text.vocab_size * 4),
    }
    return {**parts, "total": sum(parts.values())}


def slot_need(
    config: ModelConfig, dtype: jnp.dtype, cache: CacheMethod, *, rows: int, new_tokens: int
) -> tuple[int, int]:
    """Bytes of a slot, and those beside all slots: the parameters and the prefill of one prompt.

    The arguments are those of `slots_that_fit`.
    """
    need = memory_need(config, dtype, cache, rows=rows, batch=1, new_tokens=new_tokens)
    prompt = whole_capacity(config.text.num_layers, rows) * row_bytes(config.text, dtype)
    return need["pool"] + need["tail"], need["parameters"] + need["activations"] + prompt


def slots_that_fit(
    config: ModelConfig,
    dtype: jnp.dtype,
    cache: CacheMethod,
    memory: int,
    *,
    rows: int,
    new_tokens: int,
) -> int:
    """How many slots there is room for, beside the parameters and the prefill of one prompt.

    Args:
        config: the model.
        dtype: type of parameters and cache.
        cache: what a slot is made for.
        memory: bytes in all.
        rows: the prompts' bucket, T.
        new_tokens: most tokens of an answer.
    """
    slot, fixed = slot_need(config, dtype, cache, rows=rows, new_tokens=new_tokens)
    return max(0, (memory - fixed) // slot)


def human_bytes(count: float) -> str:
    """A byte count for people, in units of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
