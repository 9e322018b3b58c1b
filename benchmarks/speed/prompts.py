"""The stages with a prompt in them: prefill, what a method adds to it, and a whole answer."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.models import WINDOW
from benchmarks.roofline import Device, Stage, decode_step, packing, prefill, scoring
from benchmarks.speed.cases import Case, Variant, paper_sparsity
from benchmarks.speed.decoding import random_rows
from benchmarks.speed.limit import in_type
from benchmarks.speed.rows import beside_full, row_of
from vlcache_jax.cache.method import Observation
from vlcache_jax.driver import Run
from vlcache_jax.generate import Generate
from vlcache_jax.models.llava import Params
from vlcache_jax.processing import ModelInputs
from vlcache_jax.programs import Programs
from vlcache_jax.stages import Prefill


def prefill_work(case: Case) -> Stage:
    """Of prefill with the full cache; of the tower nothing is counted."""
    return in_type(prefill(case.config, case.context, case.batch), case.dtype)


def method_work(case: Case, variant: Variant) -> Stage:
    """What the method adds to a prefill, counted in bfloat16: in float32 it must do more."""
    if variant.full:
        return Stage({})
    size, bits = (case.config, case.context, case.batch), case.stored_bits(variant)
    if variant.cache.limit.keeps_all:
        return packing(*size, bits)
    return scoring(*size, _budget(case, variant), bits, window=WINDOW)


def _budget(case: Case, variant: Variant) -> float:
    """Share of the rows that there is room for."""
    return variant.cache.limit.layer_rows(case.context) / case.context


def answer_work(case: Case, variant: Variant) -> Stage:
    """Of a whole answer."""
    budget = 1.0 if variant.cache.limit.keeps_all else _budget(case, variant)
    steps, bits = case.new_tokens - 1, case.stored_bits(variant)
    size = case.config, case.context, case.batch
    step = decode_step(*size, budget, bits, tail=case.new_tokens // 2)
    decoding = {
        f"decode {name}": type(part)(steps * part.bytes, steps * part.operations)
        for name, part in in_type(step, case.dtype).parts.items()
    }
    return Stage({**prefill_work(case).parts, **method_work(case, variant).parts, **decoding})


def prefill_rows(
    case: Case, variants: Sequence[Variant], params: Params, limit: Device, effort: measure.Effort
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
        full = next((found[v] for v in variants if v.full and v.backend == variant.backend), None)
        if variant.full or not isinstance(full, measure.Timing):
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


def build_rows(
    case: Case, variants: Sequence[Variant], params: Params, limit: Device, effort: measure.Effort
) -> list[dict[str, Any]]:
    """Selection, compaction and packing as a program of their own, from random scores and rows."""
    chosen = [variant for variant in variants if not variant.full]
    inputs, programs = jax.device_put(case.inputs()), {}
    for variant in chosen:
        generate = case.generate(variant, 1)
        given = random_prefill(case, generate, params), inputs, generate.settings(case.batch)
        build = jax.jit(generate.stages.build_cache)
        programs[str(variant)] = functools.partial(build, *given)
    found = measure.compare(programs, calls=1, effort=effort)
    rows = []
    for variant in chosen:
        parts = method_work(case, variant).parts
        work = Stage({name: part for name, part in parts.items() if name != "scores"})
        timing = found[str(variant)]
        rows.append(row_of("build", case, variant, timing, work, limit, how="program of its own"))
    return rows


def random_prefill(case: Case, generate: Generate, params: Params) -> Prefill:
    """What a prefill could have left behind: random rows and scores, the paper's sparsities."""
    settings = generate.settings(case.batch)
    shape, _ = jax.eval_shape(generate.stages.prefill, params, case.inputs(), settings)
    k, v = (random_rows(jax.random.key(seed), shape.k.shape, case.dtype) for seed in (1, 2))
    seen = shape.seen
    scores, salience = (
        None if part is None else _uniform(part) for part in (seen.scores, seen.salience)
    )
    measured = seen.measured
    if measured is not None:
        measured = jnp.asarray(paper_sparsity(*measured.shape))
    return Prefill(k, v, Observation(scores, measured, salience), None)


def _uniform(like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    return jax.random.uniform(jax.random.key(4), like.shape, like.dtype)


def answer_rows(
    case: Case, variants: Sequence[Variant], params: Params, limit: Device, effort: measure.Effort
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
    variants: Sequence[Variant],
    new_tokens: int,
    params: Params,
    effort: measure.Effort,
) -> tuple[dict[Variant, measure.Timing | Exception], dict[Variant, dict[str, int]]]:
    """Time answers of so many tokens in turns, by the driver.

    Returns:
        What was found, and "programs", how many of each stage serve three batches of prompts.
    """
    eighth, programs = case.context // 8, Programs()
    batches = [jax.device_put(case.inputs(seed, case.context - seed * eighth)) for seed in range(3)]

    def answer(variant: Variant, inputs: ModelInputs) -> None:
        generate = case.generate(variant, new_tokens)
        settings = generate.settings(case.batch)
        for _ in Run(programs, params, generate.stages, [inputs], settings):
            pass

    launches = {str(each): functools.partial(answer, each, batches[0]) for each in variants}
    timings = measure.compare(launches, calls=1, effort=effort)
    found = {variant: timings[str(variant)] for variant in variants}
    counts: dict[Variant, dict[str, int]] = {variant: {} for variant in variants}
    for variant, timing in found.items():
        if isinstance(timing, measure.Timing):
            with measure.compilations() as seen:
                for inputs in batches[1:]:
                    answer(variant, inputs)
            counts[variant] = {"programs": 1 + len(seen)}
    return found, counts
