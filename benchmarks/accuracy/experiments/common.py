"""What the experiments share: items and methods to run, and comparisons item by item."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.budgets import Plan, tile_of
from benchmarks.accuracy.evaluate import FULL, Evaluation, Outcome
from benchmarks.accuracy.report import Result
from benchmarks.accuracy.scoring import difference, scores_of, summarise
from benchmarks.accuracy.tasks import TASKS, Item
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import METHODS, make_method
from vlcache_jax.vlm import VLM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = tuple[str, str]
"""A label and a budget: ("vl-cache", "0.1")."""

WHOLE: Cell = (FULL, "1.0")
"""The full cache's, which every run has."""

Begin = Callable[[str, int], Callable[[int], object]]
"""Told what begins and how many items it has; gives what is called with the items done."""

FACTS = (
    "n", "score", "interval", "difference", "agreement", "kept", "kept_bytes", "kept_visual",
    "hit_rate", "mass_recall", "answer_recall",
)  # fmt: skip
"""Those of `scoring.summarise` that a result tells."""

AT_ONCE = 48
"""Methods that share one prefill and, at one budget, one decoding."""


class Refused(ValueError):
    """What was asked for cannot be run; found out before anything was."""


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

    def cells(
        self, methods: Callable[[float], Mapping[str, CacheMethod]]
    ) -> dict[Cell, CacheMethod]:
        """Methods of a budget, by label, at every budget of the plan."""
        return {
            (label, str(budget)): method
            for budget in self.plan.budgets
            for label, method in methods(budget).items()
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


@dataclass(frozen=True)
class Experiment:
    """Methods that answer the same items, and how the result is told.

    Attributes:
        help: what it finds out.
        budgets: shares of the cache, where none are asked for.
        section: makes of a result its part of docs/accuracy.md.
        methods: those of a budget by label, for a model of so many layers.
        whole: those that keep every token, by label.
        baseline: the name of a fact, and to what label a label is compared under it.
        effects: two labels each, of which the first is compared with the second.
        at_once: methods that share a prefill.
        tasks: those that are run, where none are asked for.
        draw: makes a plot of a result, if there is one.
        run: in place of all this: items, methods and comparisons of its own.
    """

    help: str
    budgets: tuple[float, ...]
    section: Callable[[Result], str]
    methods: Callable[[float, int], Mapping[str, CacheMethod]] = lambda budget, layers: {}
    whole: Callable[[], Mapping[str, CacheMethod]] = dict
    baseline: tuple[str, Callable[[str], str]] | None = None
    effects: Mapping[str, tuple[str, str]] | None = None
    at_once: int = AT_ONCE
    tasks: tuple[str, ...] = tuple(TASKS)
    draw: "Callable[[Result], Figure] | None" = None
    run: Callable[[Bench], Result] | None = None

    def __call__(self, bench: Bench) -> Result:
        """What came out, as plain values for a JSON file.

        Raises:
            Refused: the plan is none that it can be run by.
        """
        if self.run:
            return self.run(bench)
        layers = bench.vlm.config.text.num_layers
        cells = bench.cells(lambda budget: self.methods(budget, layers))
        whole = {(label, "1.0"): method for label, method in self.whole().items()}
        items = bench.items()
        outcomes = bench.run(items, whole | cells, "methods", at_once=self.at_once)
        result: Result = {"details": compare(items, outcomes)}
        if self.baseline:
            fact, other = self.baseline
            for label, budget in cells:
                if label != other(label):
                    pair = outcomes[label, budget], outcomes[other(label), budget]
                    for task, changed in differences(items, *pair).items():
                        result["details"][task][label][budget][fact] = changed
        if self.effects:
            result["effects"] = {
                budget: {
                    name: differences(items, *(outcomes[label, budget] for label in pair))
                    for name, pair in self.effects.items()
                }
                for budget in map(str, bench.plan.budgets)
            }
        return result


def methods_of(budget: float) -> dict[str, CacheMethod]:
    """Every method at a budget, the full cache left out."""
    return {name: make_method(name, budget) for name in METHODS if name != FULL}


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
