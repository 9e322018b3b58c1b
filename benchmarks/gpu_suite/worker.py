"""The process that runs stages: `peers.process.serve` answers the suite's command with it."""

import gc
import json
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from benchmarks import device
from benchmarks.gpu_suite.stages import RESULTS, STAGES, Context, file_of, source
from benchmarks.peers.process import serve


class Worker:
    """Runs stages, each saved as it ends; what it is given is as in `suite.Suite`.

    Raises:
        benchmarks.device.NoGpu: there is none, and this is no dry run.
    """

    def __init__(self, out: str | None, dry: bool, environment: dict[str, Any]):
        if dry:
            jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
        about = device.describe(need_gpu=not dry)
        self.dry, self.head = dry, {**environment, **about, "source": source(), "dry_run": dry}
        self.out = Path(out) if out else RESULTS / device.slug(about["device"])

    def about(self) -> dict[str, Any]:
        """Where the results are, and what stands in all of them."""
        return {"out": str(self.out), "head": self.head}

    def run(self, stage: str, deadline: float) -> dict[str, Any]:
        """Run a stage by its name, to be over at a time of `time.time`.

        Returns:
            "status", "seconds", and whether the process is "healthy": a CUDA error stays.
        """
        wanted = next(each for each in STAGES if each.name == stage)
        began = time.time()
        until = float("inf") if self.dry else min(deadline, began + wanted.most_s)
        context = Context(stage, self.out, self.dry, until, self.head)
        context.save(error="the process ended before the stage did")
        try:
            result = {"ok": True, **wanted.run(context)}
        except Exception:
            kept = json.loads(file_of(self.out, stage).read_text(encoding="utf-8"))
            rows = {"rows": kept["rows"]} if "rows" in kept else {}
            result = {**rows, "ok": False, "error": traceback.format_exc()}
        seconds = round(time.time() - began, 2)
        context.save(**{**result, "seconds": seconds})
        gc.collect()  # arrays on the device
        healthy = result["ok"] or _healthy()
        return {
            "status": "ok" if result["ok"] else "failed", "seconds": seconds, "healthy": healthy
        }  # fmt: skip


def _healthy() -> bool:
    """Whether this process can still use its device."""
    try:
        return float(jax.numpy.ones(2).sum()) == 2.0
    except Exception:
        return False


if __name__ == "__main__":
    serve(Worker)
