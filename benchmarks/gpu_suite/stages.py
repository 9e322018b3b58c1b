"""The stages, in the order of their worth, and what each is given."""

import hashlib
import importlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from benchmarks import measure
from benchmarks.environment import write_result

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Stage:
    """One part of the suite.

    Attributes:
        name: of the stage and of its result file.
        function: "module:function" of this package; it takes a `Context` and returns what is to be
            saved, with a one-line "headline". "ok": False in it says that something is wrong.
        need_s: it is not begun with less time than this.
        most_s: when it should stop by itself. It is killed `suite.GRACE_S` later.
        alone: it starts processes of its own that want the GPU's memory: so it is run in one that
            takes next to nothing of it.
    """

    name: str
    function: str
    need_s: float
    most_s: float
    alone: bool = False

    def run(self, context: "Context") -> dict[str, Any]:
        """Call the function; imported here, so that one that does not import fails alone."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)(context)


STAGES = (
    Stage("ceilings", "speed:ceilings", 15, 40),
    Stage("correctness_prefill", "correctness:prefill", 20, 90),
    Stage("correctness_decode", "correctness_cache:decode", 20, 90),
    Stage("correctness_scores", "correctness:scores", 20, 90),
    Stage("correctness_norm", "correctness:norm", 10, 30),
    Stage("correctness_long", "correctness_cache:long", 20, 90),
    Stage("correctness_model", "model:model", 30, 120),
    Stage("speed_decode", "speed:decode", 20, 80),
    Stage("speed_prefill", "speed:prefill", 20, 80),
    Stage("speed_scores", "speed:scores", 15, 60),
    Stage("speed_compact", "speed:compaction", 10, 30),
    Stage("sweep_decode", "sweep:decode", 20, 80),
    Stage("sweep_prefill", "sweep:prefill", 20, 100),
    Stage("sweep_scores", "sweep:scores", 20, 80),
    Stage("sweep_norm", "sweep:norm", 10, 40),
    Stage("paper_decode", "end_to_end:paper_decode", 60, 240),
    Stage("model_decode", "end_to_end:decode", 60, 200),
    Stage("peers", "end_to_end:peers", 120, 360, alone=True),
    Stage("throughput", "end_to_end:throughput", 90, 240),
    Stage("profile", "end_to_end:profile", 40, 120),
    Stage("sessions", "questions:sessions", 60, 180),
    Stage("chunks", "questions:chunks", 60, 180),
    Stage("paper_whole", "end_to_end:paper_whole", 120, 420),
    Stage("flags", "end_to_end:flags", 120, 400, alone=True),
    Stage("packed_decode", "end_to_end:packed_decode", 60, 200),
    Stage("correctness_packed", "correctness_cache:packed", 20, 90),
    Stage("speed_packed", "speed:packed", 20, 80),
    Stage("sweep_packed", "sweep:packed", 20, 80),
    Stage("correctness_sample", "correctness:sample", 15, 60),
)
"""Later ones are appended. Several small stages lose less to a crash than a large one."""


@dataclass
class Context:
    """What a stage is given.

    Attributes:
        stage: its name.
        out: folder of the results.
        dry: on a CPU, in tiny sizes.
        until: when the stage should stop, in seconds of `time.time`.
        head: fields that stand in every result file.
        seed: of all random numbers; fresh in every run.
    """

    stage: str
    out: Path
    dry: bool
    until: float
    head: dict[str, Any]
    seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4), "little"))
    _count: Iterator[int] = field(default_factory=itertools.count)

    @property
    def effort(self) -> measure.Effort:
        """How thoroughly things are timed."""
        return measure.DRY if self.dry else measure.Effort()

    def key(self) -> jax.Array:
        """A key for random numbers, another one at each call."""
        return jax.random.fold_in(jax.random.key(self.seed), next(self._count))

    def late(self) -> bool:
        """Whether the stage should come to its end."""
        return time.time() > self.until

    def save(self, **result: Any) -> None:
        """Write the result file as it is now, so that a crash loses as little as possible."""
        whole = {**self.head, "stage": self.stage, "seed": self.seed, "ok": False, **result}
        write_result(file_of(self.out, self.stage), whole)


def file_of(out: Path, name: str) -> Path:
    """The result file of a stage."""
    return out / f"{name}.json"


def finished(out: Path, name: str, head: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a stage, where it is whole and of the same code on the same device."""
    try:
        old = json.loads(file_of(out, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = all(old.get(key) == head[key] for key in ("source", "device", "dry_run"))
    return old if same and old.get("ok") and not old.get("not_run") else None


def source() -> str:
    """A digest of the code that results depend on.

    The commit does not do: it is marked as changed by the first result that is written, and a copy
    of the code without its history has none.
    """
    digest = hashlib.sha256()
    measuring = ("hlo.py", "measure.py", "models.py", "operations.py")
    measuring += ("sessions.py", "throughput.py", "roofline", "speed", "peers", "gpu_suite")
    parts = (*(f"benchmarks/{name}" for name in measuring), "pallas_kernels", "vlcache_jax")
    for part in map(ROOT.joinpath, parts):
        for file in [part] if part.is_file() else sorted(part.rglob("*")):
            if file.suffix == ".py" or file.name == "measured.json":
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]
