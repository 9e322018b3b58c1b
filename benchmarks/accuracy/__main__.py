"""The command: `python -m benchmarks.accuracy`."""

from typing import Annotated

import typer

from benchmarks import command
from benchmarks.accuracy import options
from benchmarks.accuracy.report import score_tables
from vlcache_jax.cache.methods import METHODS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: options.Model = "demo-small",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="64 items of a task, and the budgets 0.1 and 1.0 only."),
    ] = False,
    tasks: options.Tasks = options.ALL_TASKS,
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Some of these; the full cache is always run.")
    ] = ",".join(METHODS),
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
    seed: options.Seed = 0,
    split: options.Split = "report",
    batch: options.Batch = 16,
    dtype: options.Dtype = None,
    as_json: command.AsJson = False,
    out: command.Out = None,
    force: command.Force = False,
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
    command.check_out(out, force=force)
    # A heavy import: --help need not wait for it.
    from benchmarks.accuracy.budgets import Plan, conduct, measure

    if budgets is None:
        budgets = "0.1,1.0" if quick else "0.01,0.05,0.1,0.2,0.4,1.0"
    with command.bad_input():
        plan = Plan(
            options.names(tasks), options.names(methods), options.shares(budgets),
            options.names(extra.replace("none", "")),
            n=(64 if quick else 500) if n is None else n, seed=seed, split=split,
        )  # fmt: skip
    result = conduct(plan, measure, model, dtype, batch)
    command.finish(result, score_tables(result), as_json=as_json, out=out)


if __name__ == "__main__":
    app()
