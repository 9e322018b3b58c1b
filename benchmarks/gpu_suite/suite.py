"""Runs the stages in a process of their own, and starts another one when that one dies.

A kernel that reads where it must not leaves its process without a GPU for good, a compiler may
abort, a kernel may never end: each of these costs one stage.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from benchmarks.gpu_suite import bars
from benchmarks.gpu_suite.stages import STAGES, Stage, file_of, finished, source
from benchmarks.peers.process import PeerError, Process

GRACE_S = 60
"""Seconds after its time in which a stage may still end by itself."""

START_S = 120
"""Most seconds in which a process begins."""


class Suite:
    """The stages of one run.

    Args:
        stages: names.
        out: folder of the results; by the device's name where it is None.
        dry: on a CPU, in tiny sizes.
        force: run stages again that have a result of the same code.
        deadline: when everything should be over, in seconds of `time.time`.
        environment: `benchmarks.environment.environment()` of the command.
        start: makes a `Process` of a module and environment variables.

    Attributes:
        out: folder of the results, once a process has begun.
        ends: how each stage ended: "status", and "seconds" or "why".
    """

    def __init__(
        self,
        stages: tuple[str, ...],
        out: str | None,
        *,
        dry: bool,
        force: bool,
        deadline: float,
        environment: dict[str, Any],
        start: Callable[..., Any] = Process,
    ):
        self.stages, self.dry, self.force, self.deadline = stages, dry, force, deadline
        self.out = Path()
        self.ends: dict[str, dict[str, Any]] = {}
        self._order = {"out": out, "dry": dry, "environment": environment}
        self._start, self._head = start, {}
        self._process: Any = None
        self._stack, self._alone = ExitStack(), False

    def run(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Run all stages; one that fails never stops the next.

        `say` is told the name of a stage that begins, and how each one ended.

        Raises:
            PeerError: no process can begin.
        """
        with self._stack:
            self._open()
            for stage in STAGES:
                if stage.name in self.stages:
                    say(stage.name)
                    end = self.ends[stage.name] = self._end_of(stage)
                    say(f"{stage.name}: {end['status']} {end.get('why', '')}")

    def _open(self, *, alone: bool = False) -> Any:
        """A new process in place of the one that there is."""
        self._stack.close()
        settings = {"JAX_PLATFORMS": "cpu"} if self.dry else {}
        settings |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if alone else {}
        process = self._start("benchmarks.gpu_suite.worker", settings)
        self._process, self._alone = self._stack.enter_context(process), alone
        about = self._process.ask("start", START_S, **self._order)
        self.out, self._head = Path(about["out"]), about["head"]
        return self._process

    def _end_of(self, stage: Stage) -> dict[str, Any]:
        """Run a stage, where it has no result and there is time."""
        left = self.deadline - time.time()
        if not self.force and (old := finished(self.out, stage.name, self._head)):
            return {"status": "done before", "seconds": old["seconds"]}
        if left < stage.need_s and not self.dry:
            why = f"needs {stage.need_s:.0f} s, {max(left, 0):.0f} s are left"
            return {"status": "no time", "why": why}
        limit, request = stage.most_s + GRACE_S, {"stage": stage.name, "deadline": self.deadline}
        try:
            fresh = self._process is None or stage.alone or self._alone
            process: Any = self._open(alone=stage.alone) if fresh else self._process
            end = process.ask("run", limit, **request)
        except PeerError as error:
            self._process, file = None, file_of(self.out, stage.name)
            kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else self._head
            write_result(file, {**kept, "ok": False, "error": str(error)})
            return {"status": "failed", "why": str(error)}
        if not end["healthy"]:
            self._process = None
        return end

    def report(self) -> dict[str, Any]:
        """All that there is to say at the end."""
        results: bars.Results = {}
        code = source()
        for file in (file_of(self.out, stage.name) for stage in STAGES):
            if file.exists():
                result = json.loads(file.read_text(encoding="utf-8"))
                if result.get("source") == code:
                    results[file.stem] = result
        rows = []
        for name, end in self.ends.items():
            result = results.get(name, {})
            error = (result.get("error") or "").strip().splitlines()[-1:]
            said = end.get("why") or result.get("headline") or "".join(error)
            row = {"stage": name, "status": end["status"], "seconds": end.get("seconds")}
            rows.append({**row, "said": said})
        found = self.out / "measured.json"
        return {
            "ok": all(row["status"] in ("ok", "done before", "no time") for row in rows),
            "out": str(self.out),
            "stages": rows,
            "bars": bars.table(results),
            "measured": str(found) if found.exists() else None,
        }
