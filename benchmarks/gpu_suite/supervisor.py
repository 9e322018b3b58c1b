"""Runs the stages in a process of their own, and starts another one when that one dies.

A kernel that reads where it must not leaves its process without a GPU for good, a compiler may
abort, a kernel may never end: each of these costs one stage.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from benchmarks.gpu_suite.stages import ROOT, STAGES, Emit, Order

GRACE_S = 60
"""Seconds after its time in which a stage may still end by itself."""

NO_GPU = 2
"""Exit code where there is none."""

ALONE = {stage.name for stage in STAGES if stage.alone}
"""Stages that are run in a process of their own."""

Launch = Callable[[Order, Emit], int]


def launch(order: Order, emit: Emit) -> int:
    """Run an order in a new process.

    Args:
        order: what is to be done.
        emit: is told what happens, as in `stages.work`.

    Returns:
        The process's exit code.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_suite"]
    command += ["--worker", json.dumps(dataclasses.asdict(order))]
    environment = dict(os.environ)
    if order.dry:
        environment["JAX_PLATFORMS"] = "cpu"
    if set(order.stages) & ALONE:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    pipe: Any = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipe) as child:
        timer: threading.Timer | None = None
        try:
            for line in child.stdout or ():
                try:
                    event = json.loads(line)
                    kind = event["event"]
                except (ValueError, TypeError, KeyError):
                    sys.stderr.write(line)  # some library had something to say
                    continue
                if kind in ("begin", "end") and timer is not None:
                    timer.cancel()
                if kind == "begin":
                    timer = threading.Timer(event["most_s"] + GRACE_S, child.kill)
                    timer.daemon = True
                    timer.start()
                emit(event)
            return child.wait()
        finally:
            if timer is not None:
                timer.cancel()
            child.kill()


def supervise(order: Order, emit: Emit, start: Launch) -> int:
    """Run an order to its end, with as many processes as it takes.

    Args:
        order: what is to be done.
        emit: is told what happens, as in `stages.work`.
        start: `launch`.

    Returns:
        0, or the exit code of a process that could not begin.
    """
    waiting = list(order.stages)
    out: Path | None = None
    running: str | None = None

    def listen(event: dict[str, Any]) -> None:
        nonlocal out, running
        if event["event"] == "out":
            out = Path(event["out"])
        elif event["event"] == "begin":
            running = event["stage"]
        elif event["event"] == "end":
            running = None
            waiting.remove(event["stage"])
        emit(event)

    while waiting:
        before = len(waiting)
        code = start(replace(order, stages=_together(waiting)), listen)
        if running is not None and out is not None:
            why = f"the process ended with code {code} in this stage"
            _mark(out / f"{running}.json", why)
            listen({"event": "end", "stage": running, "status": "failed", "why": why})
        elif len(waiting) == before:
            return code or 1  # it cannot even begin
    return 0


def _together(waiting: list[str]) -> tuple[str, ...]:
    """The first of the stages, and those behind it that one process can run with it."""
    alone = [index for index, name in enumerate(waiting) if name in ALONE]
    return tuple(waiting[: max(1, alone[0])] if alone else waiting)


def _mark(path: Path, why: str) -> None:
    """Say in a result file, which may hold some rows, what became of its stage."""
    write_result(path, {**json.loads(path.read_text(encoding="utf-8")), "ok": False, "error": why})
