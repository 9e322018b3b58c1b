"""Options that the commands of this benchmark have in common."""

from typing import Annotated

import typer

from benchmarks.accuracy.pages.content import KINDS
from benchmarks.accuracy.tasks import SPLITS, TASKS

Model = Annotated[
    str,
    typer.Option(
        help="A model directory of a LLaVA, or a model of the package, 'demo' or 'demo-small'."
    ),
]
ALL_TASKS = ",".join(TASKS)
Tasks = Annotated[
    str,
    typer.Option(
        metavar="A,B",
        help=f"Some of {', '.join(TASKS)}, or of the questions about pages: {', '.join(KINDS)}.",
    ),
]
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
