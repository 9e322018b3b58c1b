"""The command: `python -m benchmarks.accuracy.experiments NAME`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.accuracy import options
from benchmarks.accuracy.budgets import Plan, conduct
from benchmarks.accuracy.experiments.sections import EXPERIMENTS, result_file
from benchmarks.command import AsJson, Force, bad_input, check_out, finish

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
        model: options.Model = "demo-small",
        tasks: options.Tasks = all_tasks,
        budgets: Annotated[
            str, typer.Option(metavar="X,Y", help="Shares of the cache to keep, below 1.")
        ] = all_budgets,
        n: options.Items = 200,
        seed: options.Seed = 0,
        split: options.Split = "report",
        turns: Annotated[
            int | None,
            typer.Option(
                min=2,
                help="Different questions about a picture; by default as many as take 300 tokens "
                "and more.",
                hidden=name not in ("long", "questions"),
            ),
        ] = None,
        batch: options.Batch = 16,
        dtype: options.Dtype = None,
        as_json: AsJson = False,
        out: Annotated[
            Path,
            typer.Option(dir_okay=False, metavar="FILE.json", help="Where the result is written."),
        ] = file,
        force: Force = False,
    ) -> None:
        check_out(out, force=force)
        with bad_input():
            kept = options.shares(budgets)
            if not all(0 < share < 1 for share in kept):
                raise ValueError(f"budgets {budgets!r} must be above 0 and below 1: the full cache "
                                 "is always run")  # fmt: skip
            plan = Plan(options.names(tasks), (), kept, (), n, seed, split)
        result = conduct(plan, EXPERIMENTS[name], model, dtype, batch, turns)
        finish({"experiment": name, **result}, experiment.section(result), as_json=as_json, out=out)

    return command


for _name, _experiment in EXPERIMENTS.items():
    app.command(_name, help=_experiment.help)(command_of(_name))

if __name__ == "__main__":
    app()
