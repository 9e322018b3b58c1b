"""What the experiments share: items and methods to run, and comparisons item by item."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.accuracy.budgets import Plan, tile_of
from benchmarks.accuracy.evaluate import FULL, Evaluation, Outcome
from benchmarks.accuracy.metrics import METRICS, score
from benchmarks.accuracy.scoring import difference, summarise
from benchmarks.accuracy.tasks import Item
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import METHODS, make_method
from vlcache_jax.vlm import VLM

Cell = tuple[str, str]
"""A label and a budget: ("vl-cache", "0.1")."""

WHOLE: Cell = (FULL, "1.0")
"""The full cache's, which every run has."""

Begin = Callable[[str, int], Callable[[int], object]]
"""Told what begins and how many items it has; gives what is called with the items done."""


class Refused(ValueError):
    """What was asked for cannot be run; found out before anything was."""


FACTS = (
    "n", "score", "interval", "difference", "agreement", "kept", "kept_bytes", "kept_visual",
    "hit_rate", "mass_recall", "answer_recall",
)  # fmt: skip
"""Those of `scoring.summarise` that a result tells."""

AT_ONCE = 48
"""Methods that share one prefill and, at one budget, one decoding."""


@dataclass(frozen=True)
class Bench:
    """What an experiment runs on.

    Attributes:
        evaluation: the model, ready to answer.
        plan: tasks, budgets, and which items.
        turns: different questions of a conversation; None for `long.TURNS`.
        begin: to show how far it is.
    """

    evaluation: Evaluation
    plan: Plan
    turns: int | None = None
    begin: Begin = lambda what, total: lambda done: None

    @property
    def vlm(self) -> VLM:
        """The model."""
        return self.evaluation.vlm

    @property
    def budgets(self) -> tuple[tuple[str, float], ...]:
        """Each budget, and how files write it."""
        return tuple((str(budget), budget) for budget in self.plan.budgets)

    def methods(self) -> dict[Cell, CacheMethod]:
        """Every method at every budget, the full cache left out."""
        return {
            (name, text): make_method(name, budget)
            for text, budget in self.budgets
            for name in METHODS
            if name != FULL
        }

    def items(self, **changes: Any) -> list[Item]:
        """The items of the plan, or of one that is changed: another split, variant, manner."""
        return replace(self.plan, **changes).items(tile_of(self.vlm))

    def run(
        self,
        items: Sequence[Item],
        cells: Mapping[Cell, CacheMethod],
        what: str,
        *,
        at_once: int = AT_ONCE,
    ) -> dict[Cell, Outcome]:
        """Answer items by many methods: the outcomes of the full cache and of each cell."""
        pairs = list(cells.items())
        groups = [pairs[at : at + at_once] for at in range(0, len(cells), at_once)]
        advance = self.begin(what, len(items) * len(groups))
        found: dict[Cell, Outcome] = {}
        for group in groups:
            methods = {" at ".join(cell): method for cell, method in group}
            outcomes = self.evaluation.run(items, methods, advance=advance)
            found.setdefault(WHOLE, outcomes[FULL])
            found |= {cell: outcomes[" at ".join(cell)] for cell, _ in group}
        return found


def compare(items: Sequence[Item], outcomes: Mapping[Cell, Outcome]) -> dict[str, Any]:
    """Scores and measures of all cells, {task: {label: {budget: facts}}}; see `FACTS`."""
    names = {cell: FULL if cell == WHOLE else " at ".join(cell) for cell in outcomes}
    summary = summarise(items, {names[cell]: outcome for cell, outcome in outcomes.items()})
    return {
        task: nested(
            {cell: {fact: of_task[name][fact] for fact in FACTS} for cell, name in names.items()}
        )
        for task, of_task in summary.items()
    }


def nested(facts: Mapping[Cell, Any]) -> dict[str, dict[str, Any]]:
    """{label: {budget: facts}}."""
    found: dict[str, dict[str, Any]] = {}
    for (label, budget), value in facts.items():
        found.setdefault(label, {})[budget] = value
    return found


def differences(
    items: Sequence[Item], outcome: Outcome, baseline: Outcome
) -> dict[str, dict[str, float]]:
    """By how much the first outcome scores better, item by item: {task: interval}."""
    own, other = scores_of(items, outcome), scores_of(items, baseline)
    return {task: difference(own[task], other[task]) for task in own}


def scores_of(items: Sequence[Item], outcome: Outcome) -> dict[str, np.ndarray]:
    """Scores of the items by the first metric of their task, float64 [n] for each task."""
    found = {}
    for task in dict.fromkeys(item.task for item in items):
        rows = [row for row, item in enumerate(items) if item.task == task]
        right = [items[row].answer for row in rows]
        found[task] = lead(task, [outcome.answers[row] for row in rows], right)
    return found


def lead(task: str, answers: Sequence[str], right: Sequence[str]) -> np.ndarray:
    """Scores by the first metric of a task, float64 [n]."""
    return score(task, answers, right)[METRICS[task][0]]
