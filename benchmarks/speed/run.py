"""A run: cases one after the other, and the stages of each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmarks import measure
from benchmarks.roofline import Device
from benchmarks.speed.cases import Case, Variants
from benchmarks.speed.decoding import decode_rows
from benchmarks.speed.profile import STAGES as TRACED
from benchmarks.speed.profile import dump_hlo, profile_rows
from benchmarks.speed.prompts import answer_rows, prefill_rows
from vlcache_jax.models.families import Params, init_params

STAGES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "decode": decode_rows,
    "prefill": prefill_rows,
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
    variants: Variants
    stages: tuple[str, ...]
    effort: measure.Effort


def measure_all(
    plan: Plan,
    device: Device,
    *,
    trace: Path | None = None,
    hlo: Path | None = None,
    step: Callable[[dict[str, Any]], None] = lambda result: None,
    late: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run a plan.

    Args:
        plan: what to do.
        device: whose limit the times are compared with.
        trace: folder for traces, of which the result has "profiles".
        hlo: folder for the optimised programs.
        step: called with the result so far, behind every stage.
        late: whether there is no time left for another case.

    Returns:
        "rows", "profiles", and how many cases were "not_run".
    """
    result: dict[str, Any] = {"rows": [], "profiles": [], "not_run": 0}
    traced = [stage for stage in TRACED if stage in plan.stages] or TRACED
    made: tuple[str, str] | None = None
    params: Params = {}
    for case in plan.cases.values():
        if late():
            result["not_run"] += 1
            continue
        if (case.model, case.dtype) != made:  # random weights, of one model at a time
            params.clear()
            made = case.model, case.dtype
            params = init_params(case.config, dtype=jnp.dtype(case.dtype))
        for stage in plan.stages:
            run = STAGES[stage]
            result["rows"] += run(case, plan.variants, params, device, plan.effort)
            step(result)
        if trace is not None:
            result["profiles"] += profile_rows(case, plan.variants, params, trace, traced)
            step(result)
        if hlo is not None:
            dump_hlo(case, plan.variants, params, hlo, traced)
            step(result)
    return result
