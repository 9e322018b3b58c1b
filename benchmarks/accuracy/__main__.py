"""The command: `python -m benchmarks.accuracy`."""

import time
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.accuracy.options import (
    ALL_TASKS,
    AsJson,
    Batch,
    Dtype,
    Force,
    Model,
    Out,
    Seed,
    Split,
    Tasks,
    check_json,
    give,
    names,
    shares,
)
from benchmarks.accuracy.report import score_tables
from benchmarks.command import bad_input, counting_bar
from benchmarks.environment import environment

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Model = "demo",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="64 items of a task, and the budgets 0.1 and 1.0 only."),
    ] = False,
    tasks: Tasks = ALL_TASKS,
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Some of these; the full cache is always run.")
    ] = "full,vl-cache,h2o,snapkv,pyramidkv,streaming-llm,random",
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y",
            help="Shares of the cache to keep; 0.01,0.05,0.1,0.2,0.4,1.0 by default.",
        ),
    ] = None,
    extra: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Some of these, or none: run beside the methods, as their ceiling, and VL-Cache's "
            "score with equal layers.",
        ),
    ] = "oracle,oracle-layers,post-vision-uniform",
    n: Annotated[int | None, typer.Option(help="Items of each task; 500 by default.")] = None,
    seed: Seed = 0,
    split: Split = "report",
    batch: Batch = 16,
    dtype: Dtype = None,
    as_json: AsJson = False,
    out: Out = None,
    force: Force = False,
) -> None:
    """Ask a model about drawn pictures, with every cache method at every budget.

    Each table shows a task's score by method and budget, with its 95 % interval; the column 100% is
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
    with errors.status("loading ..."), bad_input():
        # Heavy imports, too: --help need not wait for them.
        import vlcache_jax
        from benchmarks.accuracy.budgets import Plan, measure
        from vlcache_jax.programs import keep_programs

        keep_programs()
        if budgets is None:
            budgets = "0.1,1.0" if quick else "0.01,0.05,0.1,0.2,0.4,1.0"
        plan = Plan(
            names(tasks), names(methods), shares(budgets), () if extra == "none" else names(extra),
            n=(64 if quick else 500) if n is None else n, seed=seed, split=split,
        )  # fmt: skip
        vlm = vlcache_jax.load(model, dtype)
    with counting_bar(errors, transient=True) as bar:
        task = bar.add_task("items", total=plan.n * len(plan.tasks))
        found = measure(vlm, plan, batch=batch, advance=lambda done: bar.advance(task, done))
    found["seconds"]["with start"] = round(time.perf_counter() - began, 2)
    give({**environment(), "quick": quick, **found}, score_tables, out, as_json)


if __name__ == "__main__":
    app()
