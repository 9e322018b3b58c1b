"""How many slots a server has: what the memory holds, or what was asked for."""

import os
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import FullCache, make_method
from vlcache_jax.cache.quantize import Quantizer
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.requests.buckets import bucket_for, default_buckets
from vlcache_jax.results.report import human_bytes, slot_need, slots_that_fit
from vlcache_jax.serving.slots import SlotGroup

MOST_SLOTS = {"cpu": 8}
"""Slots where nothing is said, by platform: on a CPU more of them only wait for each other."""

MOST_SLOTS_ELSEWHERE = 128

LONG_SHARE = 4
"""One of so many slots is for the longest answers."""


@dataclass(frozen=True)
class Sizes:
    """What a server has room for.

    Attributes:
        groups: the slots.
        rows: the prompts' bucket, T.
        memory: bytes that may be used.
        needed: bytes of parameters, slots, prefixes and one prompt's prefill.
        fit_full: sequences of T rows and the shortest answers that fit with the full cache.
        fit_kept: those that fit with the budget and the bits of the slots.
    """

    groups: tuple[SlotGroup, ...]
    rows: int
    memory: int
    needed: int
    fit_full: int
    fit_kept: int


def device_memory(fraction: float) -> int:
    """Bytes that a server may take: of the first device, or of the machine where that is a CPU.

    Raises:
        ValueError: the fraction is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"memory_fraction={fraction} must be above 0 and at most 1")
    stats = jax.devices()[0].memory_stats() or {}
    whole = stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(whole * fraction)


def plan_slots(
    config: ModelConfig,
    dtype: jnp.dtype,
    *,
    memory: int,
    prompt_rows: int,
    budget: str = "0.1",
    quantizer: Quantizer | None = None,
    new_tokens: tuple[int, ...] = (128, 512),
    slots: int | None = None,
    whole: bool = True,
    prefix_bytes: int = 0,
) -> Sizes:
    """Divide a memory into slots.

    Args:
        config: the model.
        dtype: type of parameters and cache.
        memory: bytes that may be used.
        prompt_rows: most tokens of a prompt.
        budget: what a slot keeps of the longest prompt.
        quantizer: how it is quantized.
        new_tokens: most tokens of an answer, for each group of slots.
        slots: how many, beside one that keeps everything; by default as many as fit.
        whole: one slot keeps everything, for the full cache.
        prefix_bytes: what is kept of prompts beside.

    Raises:
        ValueError: not even one slot fits, or not those that were asked for.
    """
    text = config.text
    rows = bucket_for(min(prompt_rows, text.max_positions), default_buckets(config).prompt)
    kept = _slot(config, budget, quantizer)
    lengths = sorted(set(new_tokens))

    def divided(count: int) -> tuple[SlotGroup, ...]:
        long = -(-count // LONG_SHARE) if len(lengths) > 1 else 0
        groups = [SlotGroup(long, length, budget) for length in lengths[1:] if long]
        short = count - len(groups) * long
        groups += [SlotGroup(short, lengths[0], budget)] if short > 0 else []
        return (*groups, *([SlotGroup(1, lengths[-1], 1.0)] if whole else ()))

    @cache  # numbers of slots are tried, of the same few kinds
    def need_of(budget: float | str, new_tokens: int) -> tuple[int, int]:
        own = _slot(config, str(budget), quantizer)
        return slot_need(config, dtype, own, rows=rows, new_tokens=new_tokens)

    def needed(groups: tuple[SlotGroup, ...]) -> int:
        needs = [need_of(group.budget, group.new_tokens) for group in groups]
        slots = sum(group.slots * slot for group, (slot, _) in zip(groups, needs, strict=True))
        return prefix_bytes + slots + needs[0][1]

    if slots is not None:
        groups = divided(slots)
        if (need := needed(groups)) > memory:
            raise ValueError(
                f"{slots} slots need {human_bytes(need)} of {human_bytes(memory)}: ask for fewer, "
                "for a smaller --kv-budget or a shorter --prompt-rows"
            )
    else:
        most = MOST_SLOTS.get(jax.default_backend(), MOST_SLOTS_ELSEWHERE)
        fitting = (n for n in range(most, 0, -1) if needed(divided(n)) <= memory)
        if (count := next(fitting, 0)) == 0:
            raise ValueError(
                f"not one slot fits: {human_bytes(needed(divided(1)))} are needed of "
                f"{human_bytes(memory)}; take a smaller --kv-budget or a shorter --prompt-rows"
            )
        groups = divided(count)
    own = {"rows": rows, "new_tokens": lengths[0]}
    room = memory - prefix_bytes
    fits = (slots_that_fit(config, dtype, each, room, **own) for each in (FullCache(), kept))
    return Sizes(groups, rows, memory, needed(groups), *fits)


def _slot(config: ModelConfig, budget: str, quantizer: Quantizer | None) -> CacheMethod:
    """Any method with what a slot holds."""
    made = make_method("vl-cache", budget, quantizer).for_model(config.text)
    return FullCache(quantize=made.quantize) if made.limit.keeps_all else made
