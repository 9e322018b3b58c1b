"""The stages with a prompt in them: prefill, what a method adds to it, and a whole answer."""

from collections.abc import Callable, Sequence
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
from vlcache_jax.generate import Generate, Prefill
from vlcache_jax.models.llava import Params

Found = dict[Variant, measure.Timing | Exception]
Program = Callable[..., Any]


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

    The rows "method" (scoring, selection, compaction, packing) are differences of whole programs,
    sample by sample: XLA may run a method's work beside that of the prefill.
    """
    programs = {v: jax.jit(case.generate(v, 1, case.chunk).begin) for v in variants}
    found, count = _timed(case, programs, params, effort)
    rows, added = [], []
    for variant, timing in found.items():
        works = {**prefill_work(case).parts, **method_work(case, variant).parts}
        more = {"programs": count(variant)} if isinstance(timing, measure.Timing) else {}
        rows.append(row_of("prefill", case, variant, timing, Stage(works), limit, **more))
        full = next((found[v] for v in variants if v.full and v.backend == variant.backend), None)
        if variant.full or not isinstance(full, measure.Timing):
            continue
        if isinstance(timing, measure.Timing):
            more = {
                "how": "difference of whole programs, with the method and without",
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
        generate = case.generate(variant, 1, case.chunk)
        prefilled, program = random_prefill(case, generate, params), jax.jit(generate.build_cache)
        programs[str(variant)] = lambda run=program, given=prefilled: run(given, inputs)
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
    shape = jax.eval_shape(generate.prefill, params, case.inputs())
    k, v = (random_rows(jax.random.key(seed), shape.k.shape, case.dtype) for seed in (1, 2))
    seen = shape.seen
    scores, salience = (
        None if part is None else _uniform(part) for part in (seen.scores, seen.salience)
    )
    measured = seen.measured
    if measured is not None:
        measured = jnp.asarray(paper_sparsity(*measured.shape))
    hidden = measure.normal(jax.random.key(3), shape.hidden.shape, case.dtype)
    return Prefill(k, v, hidden, Observation(scores, measured, salience))


def _uniform(like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    return jax.random.uniform(jax.random.key(4), like.shape, like.dtype)


def answer_rows(
    case: Case, variants: Sequence[Variant], params: Params, limit: Device, effort: measure.Effort
) -> list[dict[str, Any]]:
    """From prompt to all tokens, one program."""
    chunk = Generate.chunk  # the default
    programs = {v: jax.jit(case.generate(v, case.new_tokens, chunk)) for v in variants}
    found, count = _timed(case, programs, params, effort)
    rows = []
    for variant, timing in found.items():
        more: dict[str, Any] = {"new_tokens": case.new_tokens}
        if isinstance(timing, measure.Timing):
            more["programs"] = count(variant)
        work = answer_work(case, variant)
        rows.append(row_of("end-to-end", case, variant, timing, work, limit, **more))
    beside_full(rows)
    return rows


def _timed(
    case: Case, programs: dict[Variant, Program], params: Params, effort: measure.Effort
) -> tuple[Found, Callable[[Variant], int]]:
    """Time programs of (params, inputs, rng) in turns.

    Returns:
        What was found, and what counts the programs that serve three batches of prompts.
    """
    eighth = case.context // 8
    batches = [jax.device_put(case.inputs(seed, case.context - seed * eighth)) for seed in range(3)]
    key = jax.random.key(0)

    def count(variant: Variant) -> int:
        with measure.compilations() as seen:
            for inputs in batches[1:]:
                jax.block_until_ready(programs[variant](params, inputs, key))
        return 1 + len(seen)

    launches = {
        str(variant): lambda run=program: run(params, batches[0], key)
        for variant, program in programs.items()
    }
    found = measure.compare(launches, calls=1, effort=effort)
    return {variant: found[str(variant)] for variant in programs}, count
