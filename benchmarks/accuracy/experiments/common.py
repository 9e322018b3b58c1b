"""What the experiments share: items and methods to run, and comparisons item by item."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy.budgets import AT_ONCE, Bench
from benchmarks.accuracy.evaluate import Cell, Outcome
from benchmarks.accuracy.report import FULL, Result
from benchmarks.accuracy.scoring import difference, scores_of, summarise
from benchmarks.accuracy.tasks import TASKS, Item
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import METHODS, make_method

FACTS = (
    "n", "score", "interval", "difference", "agreement", "kept", "kept_bytes", "kept_visual",
    "hit_rate", "mass_recall", "answer_recall",
)  # fmt: skip
"""Those of `scoring.summarise` that a result tells."""


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
    draw: Callable[[Result], Any] | None = None
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
    return {
        task: {
            label: {budget: {name: facts[name] for name in FACTS} for budget, facts in of.items()}
            for label, of in of_task.items()
        }
        for task, of_task in summarise(items, outcomes).items()
    }


def differences(
    items: Sequence[Item], outcome: Outcome, baseline: Outcome
) -> dict[str, dict[str, float]]:
    """By how much the first outcome scores better, item by item: {task: interval}."""
    own, other = scores_of(items, outcome), scores_of(items, baseline)
    return {task: difference(own[task], other[task]) for task in own}
