"""Options that the commands of this benchmark have in common."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.accuracy.tasks import SPLITS
from benchmarks.command import check_out

Seed = Annotated[int, typer.Option(help="The first item's seed; the others follow it.")]
Split = Annotated[
    str,
    typer.Option(
        help=f"One of {', '.join(SPLITS)}: pictures that no other split has. Choose settings on "
        "'tune' or 'test', report on 'report'."
    ),
]
Level = Annotated[float, typer.Option(help="Difficulty, 0 to 1; below 1 for a model in training.")]
Jitter = Annotated[int, typer.Option(help="Pixels that a glyph may lie off its cell.")]
Batch = Annotated[int, typer.Option(min=1, help="Items that are run at a time.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]


def check_json(out: Path | None, *, force: bool) -> None:
    """Refuse a result file that would be overwritten, or that is called something else."""
    check_out(out, force=force)
    if out is not None and out.suffix != ".json":
        raise typer.BadParameter(f"the file {out} must end in .json")


def names(text: str) -> tuple[str, ...]:
    """The names between the commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
