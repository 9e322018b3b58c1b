"""What the benchmarks' commands share: how they take input, and how they give their results."""

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.environment import write_result
from vlcache_jax.files import check_file

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Out = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.", dir_okay=False)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]


@contextmanager
def bad_input() -> Iterator[None]:
    """What a name, a file or a model is refused for is an error of the command's input."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        raise typer.BadParameter(str(error)) from None


def check_out(out: Path | None, what: str = "result file", *, force: bool) -> None:
    """Refuse a file, one of the library's `KINDS`, that cannot be written or would be lost."""
    if out is not None:
        with bad_input():
            check_file(out, what, force=force, folders=True)


def check_known(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse what is not among the names that there are.

    Raises:
        ValueError: the message has all of them.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"{kind} {name!r} is not one of {', '.join(known)}")


def counting_bar(console: Console | None = None, *, transient: bool = True) -> Progress:
    """A bar with a count and the time; nothing where the console is no terminal.

    It is shown on the standard error stream by default, and goes where it ends if `transient`.
    """
    console = console or Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )


def finish(result: dict[str, Any], text: str, *, as_json: bool, out: Path | None) -> None:
    """Write a result to its file, and print it; what failed is said on the standard error stream.

    Args:
        result: what JSON holds; the reason of what failed is a row's "exception" or "error".
        text: what the result says, in Markdown.
        as_json: print JSON in place of the text.
        out: the file; None for none.
    """
    if out is not None:
        write_result(out, result)
    if as_json:
        print(json.dumps(result))
    else:
        Console(width=max(130, Console().width)).print(Markdown(text))
    failed = (row.get("exception") or row.get("error") for row in result.get("rows", ()))
    for reason in dict.fromkeys(failed):
        if isinstance(reason, str):  # not the size of an error
            Console(stderr=True).print(reason, style="red", markup=False)
