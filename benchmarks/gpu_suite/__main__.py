"""The command: `python -m benchmarks.gpu_suite`. See the package."""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.command import AsJson, finish
from benchmarks.documents import table
from benchmarks.environment import environment
from benchmarks.gpu_suite.stages import STAGES
from benchmarks.gpu_suite.suite import Suite
from benchmarks.peers.process import PeerError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    minutes: Annotated[
        float, typer.Option(help="Time for everything; a stage that does not fit is left out.")
    ] = 9,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results; benchmarks/results/DEVICE by default.", file_okay=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tiny sizes on the CPU, to try the suite itself.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="A stage, or the beginning of names; may be repeated."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run stages again that have a result of this code.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check and time every kernel on this machine's GPU, and find the best block sizes.

    Each stage's result is saved as it ends; the same command goes on where it was cut off. Exits
    with 1 if a stage failed, with 2 if there is no GPU.
    """
    if dry_run and out is None:
        out = Path(tempfile.mkdtemp(prefix="gpu-suite-"))
    suite = Suite(
        _select(only),
        str(out.resolve()) if out else None,
        dry=dry_run,
        force=force,
        deadline=time.time() + 60 * minutes,
        environment=environment(),
    )
    errors = Console(stderr=True, highlight=False)
    try:
        suite.run(errors.print if errors.is_terminal else lambda text: None)
    except PeerError as error:
        print(
            f"{str(error).removeprefix('NoGpu: ')}, or try the suite without one by --dry-run",
            file=sys.stderr,
        )
        raise typer.Exit(2) from None
    report = suite.report()
    finish(report, _text(report), as_json=as_json, out=None)
    raise typer.Exit(0 if report["ok"] else 1)


def _select(only: list[str] | None) -> tuple[str, ...]:
    """Names of stages, in their order."""
    names = [stage.name for stage in STAGES]
    for beginning in only or ():
        if not any(name.startswith(beginning) for name in names):
            raise typer.BadParameter(
                f"no stage begins with {beginning!r}: choose among {', '.join(names)}",
                param_hint="--only",
            )
    return tuple(name for name in names if not only or name.startswith(tuple(only)))


def _text(report: dict[str, Any]) -> str:
    """The report in Markdown."""

    def rows_of(part: str, *names: str) -> list[list[str]]:
        return [
            ["" if row[name] is None else str(row[name]) for name in names] for row in report[part]
        ]

    bar = ("bar", "must", "aim", "measured", "state", "remark")
    lines = [f"Results: {report['out']}"]
    if report["measured"]:
        lines.append(f"Block sizes: `cp {report['measured']} pallas_kernels/measured.json`")
    stage = ("stage", "status", "seconds", "said")
    tables = [table(stage, rows_of("stages", *stage)), table(bar, rows_of("bars", *bar))]
    return "\n\n".join([*tables, *lines])


if __name__ == "__main__":
    app()
