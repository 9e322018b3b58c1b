"""The stages with a prompt in them: prefill, what a method adds to it, and a whole answer."""

import functools
from typing import Any

import jax

from benchmarks import measure
from benchmarks.models import WINDOW
from benchmarks.roofline import Device, Stage, decode_step, packing, prefill, scoring
from benchmarks.speed.cases import Case, Variants, name_of
from benchmarks.speed.limit import in_type
from benchmarks.speed.rows import beside_full, row_of
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.models.families import Params
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.driver import Run
from vlcache_jax.running.programs import Programs


def prefill_work(case: Case) -> Stage:
    """Of prefill with the full cache; of the tower nothing is counted."""
    return in_type(prefill(case.config, case.context, case.batch), case.dtype)


def method_work(case: Case, variant: CacheMethod) -> Stage:
    """What the method adds to a prefill, counted in bfloat16: in float32 it must do more."""
    if variant.is_full:
        return Stage({})
    size, bits = (case.config, case.context, case.batch), case.stored_bits(variant)
    if variant.limit.keeps_all:
        return packing(*size, bits)
    return scoring(*size, _budget(case, variant), bits, window=WINDOW)


def _budget(case: Case, variant: CacheMethod) -> float:
    """Share of the rows that there is room for."""
    return variant.limit.layer_rows(case.context) / case.context


def answer_work(case: Case, variant: CacheMethod) -> Stage:
    """Of a whole answer."""
    budget = 1.0 if variant.limit.keeps_all else _budget(case, variant)
    steps, kept = case.new_tokens - 1, (budget, case.stored_bits(variant))
    step = decode_step(case.config, case.context, case.batch, *kept, tail=case.new_tokens // 2)
    decoding = {
        f"decode {name}": type(part)(steps * part.bytes, steps * part.operations)
        for name, part in in_type(step, case.dtype).parts.items()
    }
    return Stage({**prefill_work(case).parts, **method_work(case, variant).parts, **decoding})


def prefill_rows(
    case: Case,
    variants: Variants,
    params: Params,
    limit: Device,
    effort: measure.Effort,
) -> list[dict[str, Any]]:
    """Prefill up to the first token, and what each method adds to that of the full cache.

    The rows "method" (scoring, selection, compaction, packing) are differences of whole prefills,
    sample by sample: XLA may run a method's work beside that of the prefill.
    """
    found, programs = _timed(case, variants, 1, params, effort)
    rows, added = [], []
    for variant, timing in found.items():
        works, more = {**prefill_work(case).parts, **method_work(case, variant).parts}, {}
        own = row_of("prefill", case, variant, timing, Stage(works), limit, **programs[variant])
        rows.append(own)
        full = next((found[v] for v in variants if v.is_full), None)
        if variant.is_full or not isinstance(full, measure.Timing):
            continue
        if isinstance(timing, measure.Timing):
            more = {
                "how": "difference of whole prefills, with the method and without",
                "share_of_prefill": timing.seconds / full.seconds - 1,
            }
            timing = measure.difference(timing, full)
        work = method_work(case, variant)
        added.append(row_of("method", case, variant, timing, work, limit, **more))
    beside_full(rows)
    return rows + added


def answer_rows(
    case: Case,
    variants: Variants,
    params: Params,
    limit: Device,
    effort: measure.Effort,
) -> list[dict[str, Any]]:
    """From prompt to all tokens."""
    found, programs = _timed(case, variants, case.new_tokens, params, effort)
    rows = [
        row_of("end-to-end", case, variant, timing, answer_work(case, variant), limit,
               new_tokens=case.new_tokens, **programs[variant])
        for variant, timing in found.items()
    ]  # fmt: skip
    beside_full(rows)
    return rows


def _timed(
    case: Case,
    variants: Variants,
    new_tokens: int,
    params: Params,
    effort: measure.Effort,
) -> tuple[dict[CacheMethod, measure.Timing | Exception], dict[CacheMethod, dict[str, int]]]:
    """Time answers of so many tokens in turns, by the driver.

    Returns:
        What was found, and "programs", how many of each stage serve three batches of prompts.
    """
    eighth, programs = case.context // 8, Programs()
    batches = [jax.device_put(case.inputs(seed, case.context - seed * eighth)) for seed in range(3)]

    def answer(variant: CacheMethod, inputs: ModelInputs) -> None:
        generate = case.generate(variant, new_tokens)
        settings = generate.settings(case.batch)
        for _ in Run(programs, params, generate.stages, [inputs], settings):
            pass

    launches = {name_of(each): functools.partial(answer, each, batches[0]) for each in variants}
    timings = measure.compare(launches, calls=1, effort=effort)
    found = {variant: timings[name_of(variant)] for variant in variants}
    counts: dict[CacheMethod, dict[str, int]] = {variant: {} for variant in variants}
    for variant, timing in found.items():
        if isinstance(timing, measure.Timing):
            with measure.compilations() as seen:
                for inputs in batches[1:]:
                    answer(variant, inputs)
            counts[variant] = {"programs": 1 + len(seen)}
    return found, counts
