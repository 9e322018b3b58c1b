"""What the commands of this benchmark have in common: options, and what becomes of a result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.accuracy.tasks import SPLITS, TASKS
from benchmarks.command import check_out
from benchmarks.environment import write_result

Model = Annotated[
    str,
    typer.Option(help="A model directory of a LLaVA, or 'demo' for the model in the package."),
]
ALL_TASKS = ",".join(TASKS)
Tasks = Annotated[str, typer.Option(metavar="A,B", help=f"Some of {', '.join(TASKS)}.")]
Items = Annotated[int, typer.Option(help="Items of each task.")]
Seed = Annotated[int, typer.Option(help="The first item's seed; the others follow it.")]
Split = Annotated[
    str,
    typer.Option(
        help=f"One of {', '.join(SPLITS)}: pictures that no other split has. Choose settings on "
        "'tune' or 'test', report on 'report'."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Items that are run at a time.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Out = Annotated[
    Path | None,
    typer.Option(dir_okay=False, metavar="FILE.json", help="Also write the JSON to this file."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]


def check_json(out: Path | None, *, force: bool) -> None:
    """Refuse a result file that would be overwritten, or that is called something else."""
    check_out(out, force=force)
    if out is not None and out.suffix != ".json":
        raise typer.BadParameter(f"the file {out} must end in .json")


def give(
    result: dict[str, Any], text: Callable[[dict[str, Any]], str], out: Path | None, as_json: bool
) -> None:
    """Write a result to its file, if it is to have one, and print it.

    Args:
        result: what was found.
        text: makes of it what people read.
        out: the file.
        as_json: print it as JSON instead.
    """
    if out is not None:
        write_result(out, result)
    print(json.dumps(result) if as_json else text(result))


def names(text: str) -> tuple[str, ...]:
    """The names between the commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def shares(text: str) -> tuple[float, ...]:
    """The shares of the cache between the commas.

    Raises:
        ValueError: one is no number.
    """
    try:
        return tuple(map(float, names(text)))
    except ValueError as error:
        raise ValueError(f"a budget must be a share of the cache, such as 0.1: {error}") from None
