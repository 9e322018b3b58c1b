"""The run: check that the sides agree, time them in turns, and set them beside each other."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import Timing, difference
from benchmarks.models import with_positions
from benchmarks.peers.agreement import Differs, agree
from benchmarks.peers.model import MODELS, config_json
from benchmarks.peers.process import PeerError, Process
from vlcache_jax.models.llava.config import LlavaConfig

FIRST = 1
"""Tokens of the shorter answer: its time is the time to the first token."""

STAGES = ("first token", "decode", "end to end")

WARM_UPS = 3
"""Answers before the first sample, the compiling one among them."""


class Side(NamedTuple):
    """One thing to compare.

    Attributes:
        name: for people.
        process: the process that answers, by a name of its own.
        module: what the process runs.
        cache: what it is asked for.
    """

    name: str
    process: str
    module: str
    cache: str


DEFAULT = Side("Hugging Face", "default", "hugging_face", "default")
STATIC = Side("Hugging Face, static cache, torch.compile", "static", "hugging_face", "static")
FULL = Side("full", "ours", "ours", "full")


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        model: a name of `MODELS`.
        context: tokens of the prompt.
        batch: how many times the prompt is answered at once.
        dtype: "float32" or "bfloat16", of all sides.
        budget: share of the cache that our last side keeps.
        new_tokens: of the longer answer.
        repeats: samples of each time.
        static: also time the static cache with torch.compile.
        limit_s: most seconds of one request, the compiling ones among them.
        shape: the model, where it is none of `MODELS`.
    """

    model: str = "small"
    context: int = 1024
    batch: int = 1
    dtype: str = "float32"
    budget: float = 0.1
    new_tokens: int = 65
    repeats: int = 20
    static: bool = True
    limit_s: float = 300
    shape: LlavaConfig | None = None

    @cached_property
    def config(self) -> LlavaConfig:
        """The model, with positions for all tokens."""
        return with_positions(self.shape or MODELS[self.model], self.context + self.new_tokens)

    @property
    def compressed(self) -> Side:
        """Our side with the budget."""
        return FULL._replace(name=f"{self.budget:.0%}", cache=str(self.budget))

    @property
    def sides(self) -> tuple[Side, ...]:
        """All sides, the reference first."""
        return (DEFAULT, *([STATIC] if self.static else []), FULL, self.compressed)

    @property
    def steps(self) -> int:
        """How often `compare` calls `step`."""
        return WARM_UPS + self.repeats


class Run:
    """The processes of a run, and what they said.

    Attributes:
        about: what each process runs on, by its name.
        failed: why a side is left out.
        checks: what the answers were compared with, and how far they agree.
        times: seconds of every answer of a side by its tokens, the compiling one first.
        facts: what else a side's rows say.
    """

    def __init__(self, plan: Plan, folder: Path, start: Callable[..., Any], stack: ExitStack):
        self.plan = plan
        self.about: dict[str, Any] = {}
        self.failed: dict[Side, str] = {}
        self.checks: list[dict[str, Any]] = []
        self.times: dict[Side, dict[int, list[float]]] = {}
        self.facts: dict[Side, dict[str, Any]] = {}
        self._start, self._stack, self._folder = start, stack, folder
        self._processes: dict[str, Any] = {}

    def open(self, side: Side, **more: Any) -> None:
        """Start a side's process.

        Raises:
            PeerError: it does not start.
        """
        plan, folder = self.plan, self._folder
        settings = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share a GPU
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # compile times are of this run
        }
        process = self._start(f"benchmarks.peers.{side.module}", settings)
        self._processes[side.process] = self._stack.enter_context(process)
        order = {"context": plan.context, "batch": plan.batch, "dtype": plan.dtype, **more}
        model = {"config": config_json(plan.config), "folder": str(folder / "model")}
        self.about[side.process] = self._ask(side, "start", **model, **order)

    def begin(self) -> None:
        """Start all processes, compile all programs, and check the answers.

        Raises:
            Differs: our side does not compute what the reference does.
            PeerError: our side does not run.
        """
        self.open(FULL)
        answers: dict[Side, tuple[np.ndarray, np.ndarray]] = {}

        def first(side: Side) -> None:
            if side.process not in self._processes:
                self.open(side, gpu=self.about[FULL.process]["gpu"])
            self.times[side] = {FIRST: [], self.plan.new_tokens: []}
            self.time(side)
            answers[side] = self._answer(side)
            self._check(side, answers)

        self.each(first)

    def each(self, action: Callable[[Side], None]) -> None:
        """Do something with each side. Where one of others fails it is left out from there on."""
        for side in self.plan.sides:
            if side in self.failed:
                continue
            try:
                action(side)
            except (PeerError, Differs) as error:
                if side.module == FULL.module:
                    raise type(error)(f"{side.name}: {error}") from None
                name = "" if isinstance(error, PeerError) else "Differs: "
                self.failed[side] = f"{name}{error}"

    def time(self, side: Side) -> None:
        """Time both answers of a side."""
        for tokens, times in self.times[side].items():
            times.append(self._ask(side, "seconds", cache=side.cache, tokens=tokens))

    def count_programs(self, when: str) -> None:
        """Note how many programs the sides' processes have compiled."""
        self.each(lambda side: self.facts[side].update({when: self._ask(side, "programs")}))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each side and stage."""
        plan, rows = self.plan, []
        about = {name: getattr(plan, name) for name in ("model", "context", "batch", "dtype")}
        own = self.plan.shape or MODELS[plan.model]
        about |= {"new_tokens": plan.new_tokens, "synthetic_positions": plan.config != own}
        for side in plan.sides:
            row = {"side": side.name, "cache": side.cache, **about}
            if side in self.failed:
                rows += [{**row, "stage": s, "exception": self.failed[side]} for s in STAGES]
                continue
            short, long = (
                Timing(times[WARM_UPS:], times[0], 1, 1) for times in self.times[side].values()
            )
            step = difference(long, short, plan.new_tokens - FIRST)
            for stage, timing in zip(STAGES, (short, step, long), strict=True):
                rows.append({**row, "stage": stage, **self.facts[side], **timing.record()})
        return rows

    def _ask(self, side: Side, name: str, **request: Any) -> Any:
        return self._processes[side.process].ask(name, self.plan.limit_s, **request)

    def _answer(self, side: Side) -> tuple[np.ndarray, np.ndarray]:
        """The longer answer: tokens [B, n], and logits [B, n, V], or [B, 1, V] of the first one."""
        file = self._folder / "logits.npy"
        request = {"cache": side.cache, "tokens": self.plan.new_tokens, "logits": str(file)}
        found = self._ask(side, "answer", **request)
        self.facts[side] = {k: v for k, v in found.items() if k != "tokens"}
        return np.asarray(found["tokens"]), np.load(file)

    def _check(self, side: Side, answers: dict[Side, tuple[np.ndarray, np.ndarray]]) -> None:
        """Compare a side's answer with the reference, which is the first that there is.

        Raises:
            Differs: it is not the same.
        """
        tokens, logits = answers[side]
        if side == self.plan.compressed:  # what it drops, it drops behind the first token
            if (tokens[:, 0] != answers[FULL][0][:, 0]).any():
                raise Differs(f"{side.name} does not begin as the full cache does")
            return
        reference = next(iter(answers))
        if side != reference:
            found = agree(tokens, logits[:, 0], *answers[reference], self.plan.dtype)
            about = {"side": side.name, "reference": reference.name}
            self.checks.append({**about, **asdict(found)})


def compare(
    plan: Plan, *, start: Callable[..., Any] = Process, step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run a plan.

    Args:
        plan: what to do.
        start: makes a `Process` of a module and environment variables.
        step: called `plan.steps` times.

    Returns:
        For a result file: "about" the processes, "checks" (none where no other side runs), "rows"
        and "ratios". A side that does not run has the reason in its rows.

    Raises:
        Differs: our side does not compute what the reference does.
        PeerError: our side does not run.
    """
    with tempfile.TemporaryDirectory(prefix="vlcache-peers-") as folder, ExitStack() as stack:
        run = Run(plan, Path(folder), start, stack)
        run.begin()
        step()
        for index in range(WARM_UPS - 1 + plan.repeats):
            if index == WARM_UPS - 1:
                run.count_programs("programs")
            run.each(run.time)
            step()
        run.count_programs("programs_in_the_end")
        rows = run.rows()
    found = {"about": run.about, "checks": run.checks, "rows": rows}
    return {**found, "ratios": ratios(plan, rows)}


def ratios(plan: Plan, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as fast one side is as another, by their medians.

    Args:
        plan: which sides.
        rows: of `Run.rows`.
    """
    seconds = {(row["side"], row["stage"]): row.get("seconds") for row in rows}
    pairs = [(FULL, other) for other in plan.sides if other.module != FULL.module]
    found = []
    for fast, slow in [*pairs, (plan.compressed, FULL)]:
        for stage in STAGES:
            ours, theirs = seconds[fast.name, stage], seconds[slow.name, stage]
            row = {"ratio": f"{fast.name} over {slow.name}", "stage": stage}
            speedup = theirs / ours if ours and theirs else None
            found.append({**row, "seconds": [ours, theirs], "speedup": speedup})
    return found
