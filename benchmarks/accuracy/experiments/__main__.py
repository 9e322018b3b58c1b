"""The command: `python -m benchmarks.accuracy.experiments NAME`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import vlcache_jax
from benchmarks.accuracy import evaluate
from benchmarks.accuracy.budgets import Plan
from benchmarks.accuracy.experiments.common import Bench, Refused
from benchmarks.accuracy.experiments.sections import EXPERIMENTS, result_file
from benchmarks.accuracy.options import (
    AsJson,
    Batch,
    Dtype,
    Force,
    Items,
    Model,
    Seed,
    Split,
    Tasks,
    check_json,
    give,
    names,
    shares,
)
from benchmarks.command import bad_input, counting_bar
from benchmarks.environment import environment
from vlcache_jax import programs

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="""Experiments on cache methods, each with a result file and a part of docs/accuracy.md.

    Every experiment writes its scores, their 95 % intervals, the differences to the full cache item
    by item, versions and times to a JSON file, and prints what the document will say of it.

    Examples:

        python -m benchmarks.accuracy.experiments ablation

        python -m benchmarks.accuracy.experiments layers --tasks document --budgets 0.05 --n 50

        python -m benchmarks.accuracy.experiments settings --split tune --out tuned.json
    """,
)


def command_of(name: str) -> Callable[..., None]:
    """The command of an experiment: all have the same options."""
    experiment, file = EXPERIMENTS[name], result_file(name)
    all_tasks, all_budgets = (",".join(map(str, x)) for x in (experiment.tasks, experiment.budgets))

    def command(
        model: Model = "demo",
        tasks: Tasks = all_tasks,
        budgets: Annotated[
            str, typer.Option(metavar="X,Y", help="Shares of the cache to keep, below 1.")
        ] = all_budgets,
        n: Items = 200,
        seed: Seed = 0,
        split: Split = "report",
        turns: Annotated[
            int | None,
            typer.Option(
                min=2,
                help="Different questions of a conversation; by default as many as take 300 tokens "
                "and more.",
                hidden=name != "long",
            ),
        ] = None,
        batch: Batch = 16,
        dtype: Dtype = None,
        as_json: AsJson = False,
        out: Annotated[
            Path,
            typer.Option(dir_okay=False, metavar="FILE.json", help="Where the result is written."),
        ] = file,
        force: Force = False,
    ) -> None:
        check_json(out, force=force)
        errors = Console(stderr=True, highlight=False)
        began = time.perf_counter()
        with errors.status("loading ..."), bad_input():
            programs.keep_programs()
            kept = shares(budgets)
            if not all(0 < share < 1 for share in kept):
                raise ValueError(f"budgets {budgets!r} must be above 0 and below 1: the full cache "
                                 "is always run")  # fmt: skip
            plan = Plan(
                names(tasks), methods=(), budgets=kept, extra=(), n=n, seed=seed, split=split
            )
            evaluation = evaluate.Evaluation(vlcache_jax.load(model, dtype), batch=batch)
        with counting_bar(errors, transient=True) as bar:

            def begin(what: str, total: int) -> Callable[[int], object]:
                task = bar.add_task(what, total=total)
                return lambda done: bar.advance(task, done)

            try:
                found = EXPERIMENTS[name](Bench(evaluation, plan, turns, begin))
            except Refused as error:
                raise typer.BadParameter(str(error)) from None
        seconds = {part: round(s, 2) for part, s in evaluation.seconds.items() if s}
        result = {
            **environment(),
            "experiment": name,
            **plan.about(evaluation.vlm, batch),
            "budgets": list(map(str, kept)),
            **found,
            "seconds": {**seconds, "total": round(time.perf_counter() - began, 2)},
        }
        give(result, experiment.section, out, as_json)

    return command


for _name, _experiment in EXPERIMENTS.items():
    app.command(_name, help=_experiment.help)(command_of(_name))

if __name__ == "__main__":
    app()
