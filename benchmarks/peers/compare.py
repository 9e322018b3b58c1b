"""The run: check that the sides agree, time them in turns, and set them beside each other."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Timing, difference
from benchmarks.peers.agreement import Differs, agree
from benchmarks.peers.model import MODELS, config_json
from benchmarks.peers.process import PeerError, Process
from vlcache_jax.config import LlavaConfig

FIRST = 1
"""Tokens of the shorter answer: its time is the time to the first token."""

STAGES = ("first token", "decode", "end to end")

WARM_UPS = 3
"""Answers before the first sample, the compiling one among them."""


@dataclass(frozen=True)
class Side:
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
        config = self.shape or MODELS[self.model]
        if not self.synthetic_positions:
            return config
        return replace(config, text=replace(config.text, max_positions=self.positions))

    @property
    def positions(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.context + self.new_tokens

    @property
    def synthetic_positions(self) -> bool:
        """The model was not made for so many positions."""
        return self.positions > (self.shape or MODELS[self.model]).text.max_positions

    @property
    def compressed(self) -> Side:
        """Our side with the budget."""
        return Side(f"{self.budget:.0%}", "ours", "ours", str(self.budget))

    @property
    def sides(self) -> tuple[Side, ...]:
        """All sides, the reference first."""
        return (DEFAULT, *([STATIC] if self.static else []), FULL, self.compressed)

    @property
    def pairs(self) -> tuple[tuple[Side, Side], ...]:
        """What is set beside what: (faster, slower) as it should be."""
        others = ((FULL, DEFAULT), *([(FULL, STATIC)] if self.static else []))
        return (*others, (self.compressed, FULL))

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the two answers that are timed."""
        return FIRST, self.new_tokens

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
    """

    def __init__(self, plan: Plan, folder: Path, start: Callable[..., Any], stack: ExitStack):
        self.plan = plan
        self.about: dict[str, Any] = {}
        self.failed: dict[Side, str] = {}
        self.checks: list[dict[str, Any]] = []
        self.times: dict[Side, dict[int, list[float]]] = {}
        self._facts: dict[Side, dict[str, Any]] = {}
        self._start, self._stack, self._folder = start, stack, folder
        self._processes: dict[str, Any] = {}
        self._settings = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share a GPU
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # compile times are of this run
        }
        self._order = {
            "config": config_json(plan.config),
            "folder": str(folder / "model"),
            "context": plan.context,
            "batch": plan.batch,
            "dtype": plan.dtype,
        }

    def open(self, side: Side, **more: Any) -> None:
        """Start a side's process.

        Raises:
            PeerError: it does not start.
        """
        process = self._start(f"benchmarks.peers.{side.module}", self._settings)
        self._processes[side.process] = self._stack.enter_context(process)
        self.about[side.process] = self._ask(side, "start", **self._order, **more)

    def begin(self) -> None:
        """Start all processes, compile all programs, and check the answers.

        Raises:
            Differs: our side does not compute what the reference does.
            PeerError: our side does not run.
        """
        self.open(FULL)
        answers: dict[Side, tuple[np.ndarray, np.ndarray]] = {}
        for side in self.plan.sides:
            with self._excused(side):
                if side.process not in self._processes:
                    self.open(side, gpu=self.about[FULL.process]["gpu"])
                self.times[side] = {}
                for tokens in self.plan.lengths:
                    self._time(side, tokens)
                answers[side] = self._answer(side)
                self._check(side, answers)

    def turn(self) -> None:
        """Time both answers of each side."""
        for side in self.plan.sides:
            with self._excused(side):
                for tokens in self.plan.lengths if side not in self.failed else ():
                    self._time(side, tokens)

    def count_programs(self, when: str) -> None:
        """Note how many programs the sides' processes have compiled."""
        for side in self.plan.sides:
            with self._excused(side):
                if side not in self.failed:
                    self._facts[side][when] = self._ask(side, "programs")

    def rows(self) -> list[dict[str, Any]]:
        """A row for each side and stage."""
        plan, rows = self.plan, []
        for side in plan.sides:
            row = {
                "side": side.name,
                "cache": side.cache,
                "model": plan.model,
                "context": plan.context,
                "batch": plan.batch,
                "dtype": plan.dtype,
                "new_tokens": plan.new_tokens,
                "synthetic_positions": plan.synthetic_positions,
            }
            if side in self.failed:
                rows += [{**row, "stage": s, "exception": self.failed[side]} for s in STAGES]
                continue
            short, long = (
                Timing(times[WARM_UPS:], times[0], 1, 1)
                for times in (self.times[side][tokens] for tokens in plan.lengths)
            )
            step = difference(long, short, plan.new_tokens - FIRST)
            for stage, timing in zip(STAGES, (short, step, long), strict=True):
                rows.append({**row, "stage": stage, **self._facts[side], **timing.record()})
        return rows

    def _ask(self, side: Side, name: str, **request: Any) -> Any:
        return self._processes[side.process].ask(name, self.plan.limit_s, **request)

    def _time(self, side: Side, tokens: int) -> None:
        seconds = self._ask(side, "seconds", cache=side.cache, tokens=tokens)
        self.times[side].setdefault(tokens, []).append(seconds)

    def _answer(self, side: Side) -> tuple[np.ndarray, np.ndarray]:
        """The longer answer: tokens [B, n], and logits [B, n, V], or [B, 1, V] of the first one."""
        file = self._folder / "logits.npy"
        request = {"cache": side.cache, "tokens": self.plan.new_tokens, "logits": str(file)}
        found = self._ask(side, "answer", **request)
        self._facts[side] = {k: v for k, v in found.items() if k != "tokens"}
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
        if side == reference:
            return
        agreement = agree(tokens, logits[:, 0], *answers[reference], self.plan.dtype)
        self.checks.append({"side": side.name, "reference": reference.name, **agreement.record()})

    @contextmanager
    def _excused(self, side: Side) -> Iterator[None]:
        """Where a side of others fails it is left out, and the run goes on."""
        try:
            yield
        except (PeerError, Differs) as error:
            if side.module == FULL.module:
                raise type(error)(f"{side.name}: {error}") from None
            name = "" if isinstance(error, PeerError) else "Differs: "
            self.failed[side] = f"{name}{error}"


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
            run.turn()
            step()
        run.count_programs("programs_in_the_end")
        rows = run.rows()
        return {
            "about": run.about,
            "checks": run.checks,
            "rows": rows,
            "ratios": ratios(plan, rows),
        }


def ratios(plan: Plan, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as fast one side is as another, by their medians.

    Args:
        plan: which sides.
        rows: of `Run.rows`.
    """
    seconds = {(row["side"], row["stage"]): row.get("seconds") for row in rows}
    found = []
    for fast, slow in plan.pairs:
        for stage in STAGES:
            ours, theirs = seconds[fast.name, stage], seconds[slow.name, stage]
            found.append(
                {
                    "ratio": f"{fast.name} over {slow.name}",
                    "stage": stage,
                    "seconds": [ours, theirs],
                    "speedup": theirs / ours if ours and theirs else None,
                }
            )
    return found
