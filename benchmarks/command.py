"""What the benchmarks' commands share: how they take input, and how they show how far they are."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def check_out(out: Path | None, *, force: bool) -> None:
    """Refuse a result file that would be overwritten."""
    if out is not None and out.exists() and not force:
        raise typer.BadParameter(f"{out} exists: choose another name, or overwrite it with --force")


@contextmanager
def bad_input() -> Iterator[None]:
    """What a name, a file or a model is refused for is an error of the command's input."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        raise typer.BadParameter(str(error)) from None


def check_known(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse what is not among the names that there are.

    Raises:
        ValueError: the message has all of them.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"{kind} {name!r} is not one of {', '.join(known)}")


def counting_bar(console: Console, *, transient: bool = False) -> Progress:
    """A bar with a count and the time; nothing where the console is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )
