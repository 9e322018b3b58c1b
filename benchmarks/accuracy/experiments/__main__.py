"""The command: `python -m benchmarks.accuracy.experiments NAME`."""

import json
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

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
from benchmarks.accuracy.tasks import TASKS
from benchmarks.command import bad_input, counting_bar
from benchmarks.environment import environment, write_result

FOLDER = Path(__file__).parents[2] / "results" / "accuracy"


class Experiment(NamedTuple):
    """What a command says of itself, and its defaults.

    Attributes:
        help: what it finds out; a module of the same name finds it.
        budgets: shares of the cache.
        tasks: those that are run.
    """

    help: str
    budgets: tuple[float, ...]
    tasks: tuple[str, ...] = tuple(TASKS)


EXPERIMENTS = {
    "ablation": Experiment(
        "Two scores by two allocations: is it VL-Cache's score that helps, or its layer budgets?",
        (0.05, 0.1),
    ),
    "layers": Experiment(
        "One layer compressed at a time, the others whole: which layers can spare their tokens?",
        (0.1,),
    ),
    "settings": Experiment(
        "VL-Cache's settings, one at a time around their defaults: threshold p, recent ratio, "
        "window rows, shared heads, renormalised shares.",
        (0.05, 0.1),
    ),
    "variants": Experiment(
        "All methods on plain prompts, with the question first, two pictures, several turns.",
        (0.1,),
    ),
    "long": Experiment(
        "Conversations of hundreds of tokens behind a cache that was compressed at the first "
        "question: do the kept tokens stay right?",
        (0.1, 0.2),
        ("document", "reading"),
    ),
    "rare": Experiment(
        "Values of digits alone against values with letters, which are rarer: what is lost first?",
        (0.05, 0.1),
        ("document",),
    ),
    "quantized": Experiment(
        "The cache in 8, 4 and 2 bits, by KIVI and by AKVQ, and AKVQ on top of methods that evict: "
        "what do the answers lose?",
        (0.1,),
    ),
    "scores": Experiment(
        "Other scores than VL-Cache's: chosen on the split 'tune', reported beside VL-Cache and "
        "the oracle on --split; and scores by the length of the question.",
        (0.05, 0.1),
    ),
}

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
    defaults = EXPERIMENTS[name]

    def command(
        model: Annotated[
            str, typer.Option(help="A model directory, or 'demo' for the model in the package.")
        ] = "demo",
        tasks: Annotated[
            str, typer.Option(metavar="A,B", help=f"Some of {', '.join(TASKS)}.")
        ] = ",".join(defaults.tasks),
        budgets: Annotated[
            str, typer.Option(metavar="X,Y", help="Shares of the cache to keep, below 1.")
        ] = ",".join(map(str, defaults.budgets)),
        n: Annotated[int, typer.Option(help="Items of each task.")] = 200,
        seed: Seed = 0,
        split: Split = "report",
        level: Level = 1.0,
        jitter: Jitter = 2,
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
        as_json: Annotated[
            bool, typer.Option("--json", help="Print the result as one JSON object, not as text.")
        ] = False,
        out: Annotated[
            Path,
            typer.Option(dir_okay=False, metavar="FILE.json", help="Where the result is written."),
        ] = FOLDER / f"experiment-{name}.json",
        force: Force = False,
    ) -> None:
        check_json(out, force=force)
        errors = Console(stderr=True, highlight=False)
        began = time.perf_counter()
        with errors.status("loading ..."):  # heavy imports, too: --help need not wait for them
            import vlcache_jax
            from benchmarks.accuracy.budgets import Plan, architecture
            from benchmarks.accuracy.evaluate import Evaluation
            from benchmarks.accuracy.experiments.common import Bench, Refused
            from benchmarks.accuracy.metrics import METRICS
            from vlcache_jax.programs import keep_programs

            module = import_module(f"benchmarks.accuracy.experiments.{name}")
            keep_programs()
            with bad_input():
                shares = tuple(map(_share, names(budgets)))
                plan = Plan(
                    names(tasks), methods=(), budgets=shares, extra=(), n=n, seed=seed,
                    split=split, level=level, jitter=jitter,
                )  # fmt: skip
                vlm = vlcache_jax.load(model, dtype)
        evaluation = Evaluation(vlm, batch=batch)
        with counting_bar(errors, transient=True) as bar:

            def begin(what: str, total: int) -> Callable[[int], object]:
                task = bar.add_task(what, total=total)
                return lambda done: bar.advance(task, done)

            try:
                found = module.run(Bench(evaluation, plan, turns, begin))
            except Refused as error:
                raise typer.BadParameter(str(error)) from None
        seconds = {part: round(s, 2) for part, s in evaluation.seconds.items() if s}
        result = {
            **environment(),
            "experiment": name,
            "model": vlm.name,
            "architecture": architecture(vlm),
            "n": n,
            "seed": seed,
            "split": split,
            "level": level,
            "jitter": jitter,
            "batch": batch,
            "budgets": list(map(str, shares)),
            "metric": {task: METRICS[task][0] for task in plan.tasks},
            **found,
            "seconds": {**seconds, "total": round(time.perf_counter() - began, 2)},
        }
        write_result(out, result)
        print(json.dumps(result) if as_json else module.section(result))

    return command


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 1.0
    if not 0 < share < 1:
        raise ValueError(
            f"budget {text!r} must be a share of the cache above 0 and below 1, such as 0.1; the "
            "full cache is always run"
        )
    return share


for _name, _experiment in EXPERIMENTS.items():
    app.command(_name, help=_experiment.help)(command_of(_name))

if __name__ == "__main__":
    app()
