"""The command: `python -m benchmarks.accuracy`."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy.options import (
    Batch,
    Dtype,
    Force,
    Jitter,
    Level,
    Seed,
    Split,
    check_json,
    names,
)
from benchmarks.accuracy.tasks import TASKS, VARIANTS
from benchmarks.command import bad_input, counting_bar
from benchmarks.environment import environment, write_result

METHOD_NAMES = "full, vl-cache, h2o, snapkv, pyramidkv, streaming-llm, random"
QUICK = {"n": 64, "budgets": (0.1, 1.0)}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[
        str,
        typer.Option(
            help="A model directory, as of `benchmarks.accuracy.train` (OUT/model) or of any LLaVA "
            "checkpoint, or 'demo' for the model in the package."
        ),
    ] = "demo",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="64 items of a task, and the budgets 0.1 and 1.0 only."),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help=f"Some of {', '.join(TASKS)}; all by default."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help=f"Some of {METHOD_NAMES}; all by default. The full cache is always run.",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y",
            help="Shares of the cache to keep; 0.01,0.05,0.1,0.2,0.4,1.0 by default.",
        ),
    ] = None,
    extra: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Some of oracle, oracle-layers, post-vision-uniform, or none; all by default: "
            "run beside the methods, as their ceiling, and VL-Cache's score with equal layers.",
        ),
    ] = None,
    n: Annotated[int | None, typer.Option(help="Items of each task; 500 by default.")] = None,
    seed: Seed = 0,
    split: Split = "report",
    level: Level = 1.0,
    jitter: Jitter = 2,
    variant: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(VARIANTS)}; all by default, told apart in the JSON."),
    ] = None,
    manner: Annotated[
        str, typer.Option(help="How questions are put: full, brief or terse.")
    ] = "full",
    batch: Batch = 16,
    dtype: Dtype = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, metavar="FILE.json", help="Also write the JSON to this file."),
    ] = None,
    force: Force = False,
) -> None:
    """Ask a model about drawn pictures, with every cache method at every budget.

    Each table shows a task's score by method and budget, with its 95 % interval; the column 1.0 is
    the full cache. VL-Cache's claim is: the same score from a tenth of the cache.

    Below the methods stand the rows of --extra: an oracle keeps what the full cache's answer really
    attends to, which no method can know.

    --json and --out tell more: differences to the full cache item by item, agreement of tokens, hit
    rates, layers, kinds of prompt. Compiled programs are kept in the user's cache folder, so that
    the next run is quicker.

    Example: python -m benchmarks.accuracy --quick

    Example: python -m benchmarks.accuracy --tasks document --methods vl-cache,snapkv --budgets 0.05
    """
    check_json(out, force=force)
    errors = Console(stderr=True, highlight=False)
    began = time.perf_counter()
    with errors.status("loading ..."):  # heavy imports, too: --help need not wait for them
        import vlcache_jax
        from benchmarks.accuracy.budgets import Plan, measure
        from vlcache_jax.programs import keep_programs

        keep_programs()
        chosen: dict[str, Any] = dict(QUICK) if quick else {}
        given = {"tasks": tasks, "methods": methods, "budgets": budgets, "extra": extra}
        with bad_input():
            chosen |= {name: names(text) for name, text in given.items() if text is not None}
            if extra is not None:
                chosen["extra"] = () if chosen["extra"] == ("none",) else chosen["extra"]
            if budgets is not None:
                chosen["budgets"] = tuple(map(_share, chosen["budgets"]))
            if n is not None:
                chosen["n"] = n
            chosen |= {"level": level, "jitter": jitter, "variant": variant, "manner": manner}
            plan = Plan(**chosen, seed=seed, split=split)
            vlm = vlcache_jax.load(model, dtype)
    with counting_bar(errors, transient=True) as bar:
        task = bar.add_task("items", total=plan.n * len(plan.tasks))
        found = measure(vlm, plan, batch=batch, advance=lambda done: bar.advance(task, done))
    found["seconds"]["with start"] = round(time.perf_counter() - began, 2)
    result = {**environment(), "quick": quick, **found}
    if out is not None:
        write_result(out, result)
    if as_json:
        print(json.dumps(result))
    else:
        _show(result)


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"budget {text!r} must be a share of the cache, such as 0.1") from None


def _show(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # a log file is as wide as it needs to be
        console = Console(highlight=False, width=130)
    for task, of_task in result["details"].items():
        budgets = sorted({budget for of in of_task.values() for budget in of}, key=float)
        metric = result["metric"][task]
        table = Table(title=f"{task}: {metric}, %, {result['n']} items", title_justify="left")
        table.add_column("method")
        for budget in budgets:
            table.add_column(budget, justify="right")
        for name, of in of_task.items():
            texts = (_cell(of.get(budget)) for budget in budgets)
            table.add_row(name, *texts, style="dim" if name in result["extra"][task] else None)
        console.print(table)
    console.print(f"{result['model']}, {result['seconds']['total']:.0f} s")


def _cell(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return ""
    low, high = facts["interval"]
    return f"{100 * facts['score']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


if __name__ == "__main__":
    app()
