"""A run: cases one after the other, and the stages of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmarks import measure
from benchmarks.roofline import Device
from benchmarks.speed.cases import Case, Variant
from benchmarks.speed.decoding import decode_rows
from benchmarks.speed.profile import STAGES as TRACED
from benchmarks.speed.profile import dump_hlo, profile_rows
from benchmarks.speed.prompts import answer_rows, build_rows, prefill_rows
from vlcache_jax.models.llava import Params, init_params

STAGES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "decode": decode_rows,
    "prefill": prefill_rows,
    "build": build_rows,
    "end-to-end": answer_rows,
}


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        cases: by a name of the preset's, or a number.
        variants: ways to keep the cache, the full one among them.
        stages: names of `STAGES`; of those, prefill and decode are traced, both where it is
            neither.
        effort: how thoroughly things are timed.
    """

    cases: dict[Any, Case]
    variants: tuple[Variant, ...]
    stages: tuple[str, ...]
    effort: measure.Effort


def measure_all(
    plan: Plan,
    device: Device,
    *,
    trace: Path | None = None,
    hlo: Path | None = None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run a plan.

    Args:
        plan: what to do.
        device: whose limit the times are compared with.
        trace: folder for traces, of which the result has "profiles".
        hlo: folder for the optimised programs.
        save: called with the result so far, behind every stage.
        step: called behind every stage.

    Returns:
        "rows", and "profiles".
    """
    result: dict[str, Any] = {"rows": [], "profiles": []}
    traced = [stage for stage in TRACED if stage in plan.stages] or TRACED
    for case, params in _with_params(plan.cases.values()):
        for stage in plan.stages:
            run = STAGES[stage]
            result["rows"] += run(case, plan.variants, params, device, plan.effort)
            save(result)
            step()
        if trace is not None:
            result["profiles"] += profile_rows(case, plan.variants, params, trace, traced)
            save(result)
            step()
        if hlo is not None:
            dump_hlo(case, plan.variants, params, hlo, traced)
            step()
    return result


def _with_params(cases: Any) -> Iterator[tuple[Case, Params]]:
    """Each case with random weights, which cases of one model that follow each other share."""
    made, params = None, {}
    for case in cases:
        if (case.model, case.dtype) != made:
            params.clear()
            made = case.model, case.dtype
            params = init_params(case.config, dtype=jnp.dtype(case.dtype))
        yield case, params
