"""The command: see the package."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console

from benchmarks import device as devices
from benchmarks import measure
from benchmarks.command import bad_input, check_known, check_out, counting_bar
from benchmarks.environment import environment, write_result
from benchmarks.roofline import DEVICES, Device
from benchmarks.speed import display, limit, presets
from benchmarks.speed.cases import LAYERS, Case, models
from benchmarks.speed.options import Budgets, Dtype, KvBits, Methods, dtype_of, variants_of
from benchmarks.speed.run import STAGES, Plan, measure_all

PRESETS = ("paper", "cpu")

CPU_EFFORT = measure.Effort(warm_ups=2, repeats=7)
"""Of the CPU's preset, whose samples are seconds long."""


def main(
    model: Annotated[
        list[str] | None,
        typer.Option(help="demo (the default), small-mha, small-gqa, llava-...; several times."),
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
    backend: Annotated[
        list[str] | None,
        typer.Option(help="triton, cudnn or xla, the best by default; several times."),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(STAGES)}; all by default; several times."),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="How a budget is divided where no prompt is run: paper (the method's rule, of the "
            "sparsities that VL-Cache reports) or uniform."
        ),
    ] = "paper",
    dtype: Dtype = None,
    images: Annotated[
        bool, typer.Option("--images", help="Run the vision tower on an image of each prompt.")
    ] = False,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of a whole answer.")] = 100,
    repeats: Annotated[int, typer.Option(min=2, help="Samples of each timing.")] = 20,
    ceiling: Annotated[
        str, typer.Option(help=f"The limit: measured in this run, or of {', '.join(DEVICES)}.")
    ] = "measured",
    preset: Annotated[
        str | None,
        typer.Option(
            help="paper: VL-Cache's five rows at 7B, of which --context and --batch choose; "
            "cpu: batch 8 at 8k, the bar of a CPU."
        ),
    ] = None,
    scale: Annotated[
        int, typer.Option(min=1, help="Of the paper's rows: contexts divided by it, demo model.")
    ] = 1,
    profile: Annotated[
        Path | None,
        typer.Option(help="Also trace prefill and decode into this folder, and sum it up."),
    ] = None,
    dump_hlo: Annotated[
        Path | None, typer.Option(help="Also write every optimised program into this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Time prefill, what a method adds to it, a decode step, and a whole answer, beside the limit.

    Weights are random. The full cache is always timed too, in turns with the others.

    Example, all stages of the shipped model's shape: python -m benchmarks.speed

    A sweep of decode steps: python -m benchmarks.speed --model small-gqa --batch 8 --stage decode
    --budget 0.1 --budget 0.5

    With a quantized cache: python -m benchmarks.speed --kv-bits 16 --kv-bits akvq --stage decode

    Where the time goes: python -m benchmarks.speed --images --profile traces

    On a GPU: python -m benchmarks.speed --preset paper --ceiling h200 --out paper.json

    On a CPU: python -m benchmarks.speed --preset cpu
    """
    check_out(out, force=force)
    with bad_input():
        gpu = jax.default_backend() == "gpu"
        kind = dtype_of(dtype)
        check_known("stage", stage or [], STAGES)
        check_known("model", model or [], models())
        check_known("layers", [layers], LAYERS)
        check_known("ceiling", [ceiling], ("measured", *DEVICES))
        check_known("preset", [preset] if preset else [], PRESETS)
        if preset is not None and (model or method or budget or kv_bits or images):
            raise ValueError(
                f"preset {preset} has its own model, method and budget: leave them out"
            )
        if scale > 1 and preset != "paper":
            raise ValueError("--scale is for --preset paper")
        variants = variants_of(method, budget, backend or [], kv_bits)
        stages = tuple(stage or STAGES)
        effort = measure.Effort(repeats=repeats)
        if preset == "cpu":
            cases, stages, effort = {0: presets.cpu_case(kind)}, ("decode",), CPU_EFFORT
        elif preset == "paper":
            if not gpu and scale == 1:
                raise ValueError(
                    "the paper's rows are of a 7B model and need a GPU; --scale 16 runs the same "
                    "rows of the small demo model, with a 16th of the tokens"
                )
            cases = presets.paper_cases(kind, scale, context or [], batch or [])
            stages = tuple(stage or ("prefill", "decode", "end-to-end"))
        else:
            size = Case("demo", 1024, 1, kind, images, layers, new_tokens)
            sizes = [
                (m, c, b)
                for m in model or ["demo"]
                for c in context or [1024]
                for b in batch or [1]
            ]
            cases = {
                index: replace(size, model=m, context=c, batch=b)
                for index, (m, c, b) in enumerate(sizes)
            }
    plan = Plan(cases, variants, stages, effort)
    errors = Console(stderr=True)
    with counting_bar(errors, transient=True) as bar:
        steps = len(cases) * (len(stages) + (profile is not None) + (dump_hlo is not None))
        task = bar.add_task("measuring", total=steps + 1)
        found, ceilings = limit.measured(kind, measure.BRIEF)
        bar.advance(task)
        chosen = found if ceiling == "measured" else DEVICES[ceiling]
        head = {
            **environment(),
            **devices.describe(need_gpu=False),
            "limit": asdict(chosen),
            "ceilings": ceilings,
            "preset": preset,
            "scale": scale,
        }

        def whole(result: dict[str, Any]) -> dict[str, Any]:
            return {**head, **result, **_yardsticks(preset, plan, result["rows"], chosen)}

        def save(result: dict[str, Any]) -> None:
            if out is not None:
                write_result(out, whole(result))

        result = whole(
            measure_all(
                plan, chosen, trace=profile, hlo=dump_hlo, save=save,
                step=lambda: bar.advance(task),
            )
        )  # fmt: skip
    if profile is not None:
        write_result(profile / "summary.json", {**head, "rows": result["profiles"]})
    if as_json:
        print(json.dumps(result))
    else:
        display.show(result, Console(width=max(130, errors.width)))


def _yardsticks(
    preset: str | None, plan: Plan, rows: list[dict[str, Any]], device: Device
) -> dict[str, Any]:
    """What a preset's rows are compared with, as far as they are measured."""
    if preset == "cpu":
        return {"cpu": presets.cpu_summary(plan.cases[0], rows)}
    if preset != "paper":
        return {}
    return {"paper": presets.paper_ratios(plan.cases, rows, device)}


if __name__ == "__main__":
    typer.run(main)
