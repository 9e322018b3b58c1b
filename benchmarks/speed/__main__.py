"""The command: see the package."""

from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import command, measure
from benchmarks import device as devices
from benchmarks.environment import environment, write_result
from benchmarks.speed import limit, presets
from benchmarks.speed.cases import Case, models
from benchmarks.speed.options import Budgets, Dtype, KvBits, Methods, dtype_of, variants_of
from benchmarks.speed.run import STAGES, Plan, measure_all
from benchmarks.speed_sections import speed_part

CPU_EFFORT = measure.Effort(warm_ups=2, repeats=7)
"""Of the CPU's preset, whose samples are seconds long."""


def main(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="demo-small (the default), small-mha, small-gqa, llava-...; several times."
        ),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=64, help="Tokens of a prompt; 1024 by default; several times."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences, 1 by default; several times.")
    ] = None,
    method: Methods = None,
    budget: Budgets = None,
    kv_bits: KvBits = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(STAGES)}; all by default; several times."),
    ] = None,
    dtype: Dtype = None,
    images: Annotated[
        bool, typer.Option("--images", help="Run the vision tower on an image of each prompt.")
    ] = False,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of a whole answer.")] = 100,
    repeats: Annotated[int, typer.Option(min=2, help="Samples of each timing.")] = 20,
    preset: Annotated[
        str | None, typer.Option(help="cpu: batch 8 at 8k, the bar of a CPU.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Also trace prefill and decode into this folder, and sum it up."),
    ] = None,
    dump_hlo: Annotated[
        Path | None, typer.Option(help="Also write every optimised program into this folder.")
    ] = None,
    as_json: command.AsJson = False,
    out: command.Out = None,
    force: command.Force = False,
) -> None:
    """Time prefill, what a method adds to it, a decode step, and a whole answer, beside the limit.

    Weights are random. The full cache is always timed too, in turns with the others.

    Example, all stages of the shipped model's shape: python -m benchmarks.speed

    A sweep of decode steps: python -m benchmarks.speed --model small-gqa --batch 8 --stage decode
    --budget 0.1 --budget 0.5 --kv-bits 16 --kv-bits akvq

    Where the time goes: python -m benchmarks.speed --images --profile traces

    On a CPU: python -m benchmarks.speed --preset cpu
    """
    command.check_out(out, force=force)
    with command.bad_input():
        kind = dtype_of(dtype)
        command.check_known("stage", stage or [], STAGES)
        command.check_known("model", model or [], models())
        command.check_known("preset", [preset] if preset else [], ("cpu",))
        if preset is not None and (model or method or budget or kv_bits or images):
            raise ValueError(
                f"preset {preset} has its own model, method and budget: leave them out"
            )
        variants = variants_of(method, budget, kv_bits)
        stages, effort = tuple(stage or STAGES), measure.Effort(repeats=repeats)
        sizes = product(model or ["demo-small"], context or [1024], batch or [1])
        cases: dict[Any, Case] = {size: Case(*size, kind, images, new_tokens) for size in sizes}
        if preset:
            cases, stages, effort = {0: presets.cpu_case(kind)}, ("decode",), CPU_EFFORT
    plan = Plan(cases, variants, stages, effort)
    with command.counting_bar() as bar:
        steps = len(cases) * (len(stages) + (profile is not None) + (dump_hlo is not None))
        task = bar.add_task("measuring", total=steps + 1)
        device, ceilings = limit.measured(kind, measure.BRIEF)
        bar.advance(task)
        head = {
            **environment(),
            **devices.describe(need_gpu=False),
            "limit": asdict(device),
            "ceilings": ceilings,
            "preset": preset,
        }
        result: dict[str, Any] = {**head, "rows": [], "profiles": []}

        def step(found: dict[str, Any]) -> None:
            bar.advance(task)
            result.update(found)
            if preset:
                result["cpu"] = presets.cpu_summary(cases[0], found["rows"])
            if out is not None:
                write_result(out, result)

        measure_all(plan, device, trace=profile, hlo=dump_hlo, step=step)
    if profile is not None:
        write_result(profile / "summary.json", {**head, "rows": result["profiles"]})
    command.finish(result, speed_part(result), as_json=as_json, out=out)


if __name__ == "__main__":
    typer.run(main)
