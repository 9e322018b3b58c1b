"""The command: `python -m benchmarks.gpu_suite`. See the package."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.device import NoGpu
from benchmarks.environment import environment
from benchmarks.gpu_suite import bars, stages
from benchmarks.gpu_suite.stages import STAGES, Order
from benchmarks.gpu_suite.supervisor import NO_GPU, launch, supervise

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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Check and time every kernel on this machine's GPU, and find the best block sizes.

    Each stage's result is saved as it ends; the same command goes on where it was cut off. Exits
    with 1 if a stage failed, with 2 if there is no GPU.
    """
    if worker is not None:
        _work(json.loads(worker))
        return
    if dry_run and out is None:
        out = Path(tempfile.mkdtemp(prefix="gpu-suite-"))
    order = Order(
        stages=_select(only),
        out=str(out.resolve()) if out else None,
        dry=dry_run,
        force=force,
        deadline=time.time() + 60 * minutes,
        environment=environment(),
    )
    errors = Console(stderr=True, highlight=False)
    ends, folder, code = _run(order, errors)
    if folder is None:
        raise typer.Exit(code)  # the process has said why
    report = _report(order, ends, folder)
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)
    raise typer.Exit(0 if code == 0 and report["ok"] else 1)


def _work(order: dict[str, Any]) -> None:
    """What the process that runs the stages does; stdout is how it speaks to the other one."""
    try:
        found = Order(**{**order, "stages": tuple(order["stages"])})
        stages.work(found, lambda event: print(json.dumps(event), flush=True))
    except NoGpu as error:
        print(f"{error}, or try the suite without one by --dry-run", file=sys.stderr)
        raise typer.Exit(NO_GPU) from None


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


def _run(order: Order, errors: Console) -> tuple[dict[str, Any], Path | None, int]:
    """How each stage ended, where the results are, and the exit code if it is not 0."""
    ends: dict[str, Any] = {}
    folder: Path | None = None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def listen(event: dict[str, Any]) -> None:
            nonlocal folder
            kind, name = event["event"], event.get("stage", "")
            if kind == "out":
                folder = Path(event["out"])
            elif kind == "begin":
                bar.reset(task, description=name, total=None)
            elif kind == "progress":
                bar.update(task, completed=event["done"], total=event["total"])
            elif kind == "end":
                ends[name] = event
                if not bar.disable:
                    bar.console.print(f"{name}: {event['status']} {event.get('why', '')}")

        code = supervise(order, listen, launch)
    return ends, folder, code


def _report(order: Order, ends: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All that there is to say at the end."""
    results: bars.Results = {}
    source = stages.source()
    for stage in STAGES:
        path = folder / f"{stage.name}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            if result.get("source") == source:
                results[stage.name] = result
    rows = []
    for name in order.stages:
        end, result = ends.get(name, {"status": "not run"}), results.get(name, {})
        row = {"stage": name, "status": end["status"], "seconds": end.get("seconds")}
        error = (result.get("error") or "").strip().splitlines()[-1:]
        said = end.get("why") or result.get("headline") or "".join(error)
        rows.append({**row, "said": said})
    found = folder / "measured.json"
    return {
        "ok": all(row["status"] in ("ok", "done before", "no time") for row in rows),
        "out": str(folder),
        "stages": rows,
        "bars": bars.table(results),
        "measured": str(found) if found.exists() else None,
    }


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # a log file is as wide as it needs to be
        console = Console(highlight=False, width=160)
    colours = {"failed": "red", "short": "red", "not run": "yellow", "no time": "yellow"}

    def show(title: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> None:
        table = Table(title=title, title_justify="left")
        for name in columns:
            table.add_column(name, overflow="fold")
        for row in rows:
            texts = ["" if row[key] is None else str(row[key]) for key in columns.values()]
            colour = next((colours[text] for text in texts if text in colours), None)
            table.add_row(*texts, style=colour)
        console.print(table)

    names = {"stage": "stage", "": "status", "s": "seconds", "result": "said"}
    show("stages", names, report["stages"])
    names = {name: name for name in ("bar", "must", "aim", "measured", "state", "remark")}
    show("bars", names, report["bars"])
    console.print(f"results: {report['out']}")
    if report["measured"]:
        console.print(f"block sizes: cp {report['measured']} pallas_kernels/measured.json")


if __name__ == "__main__":
    app()
