"""The benchmark itself: every method at every budget on every task, as one result."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import typer
from rich.console import Console

import vlcache_jax
from benchmarks.accuracy import evaluate
from benchmarks.accuracy.evaluate import Cell, Evaluation, Outcome
from benchmarks.accuracy.glyphs import CELL
from benchmarks.accuracy.metrics import METRICS
from benchmarks.accuracy.network import TILE
from benchmarks.accuracy.oracle import MostAttention, Oracle
from benchmarks.accuracy.pages import KINDS, TILE_CELLS, make_page_item
from benchmarks.accuracy.report import FULL, Result
from benchmarks.accuracy.scene import Manner
from benchmarks.accuracy.scoring import summarise
from benchmarks.accuracy.tasks import TASKS, Item, make_item
from benchmarks.command import bad_input, check_known, counting_bar
from benchmarks.environment import environment
from vlcache_jax.cache.budget import Budget
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import METHODS, Custom, make_method
from vlcache_jax.results.report import count_parameters
from vlcache_jax.running import programs
from vlcache_jax.vlm import VLM

Begin = Callable[[str, int], Callable[[int], object]]
"""Told what begins and how many items it has; gives what is called with the items done."""

AT_ONCE = 64
"""Methods that share one prefill and, at one budget, one decoding."""


EXTRA: dict[str, Callable[[float], CacheMethod]] = {
    "oracle": Oracle,
    "oracle-layers": lambda budget: Oracle(budget, allocation=MostAttention()),
    "post-vision-uniform": lambda budget: Custom(budget, allocation="uniform"),
}
"""What is run beside the methods: their ceiling, with equal layers and with the best ones; and
VL-Cache's score with equal layers, which tells its score from its allocation."""

NOTES = (
    "A budget of 1 keeps everything: every method is then the full cache, to the last bit. It is "
    "decoded once, and its figures stand at 1.0 of every method.",
    "The prompts of all methods are prefilled once. Answers are decoded greedily, to the end token "
    "or to the multiple of 8 tokens above the longest right answer to an item of the task.",
    "Scores are from 0 to 1, by the metric under 'metric'. Intervals "
    "are of 95 %; differences are to the full cache, item by item.",
)


class Refused(ValueError):
    """What was asked for cannot be run; found out before anything was."""


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        tasks: keys of `TASKS`, or kinds of questions about pages, `pages.KINDS`.
        methods: keys of `METHODS`; the full cache is always run.
        budgets: shares of the cache, above 0 and at most 1.
        extra: keys of `EXTRA`.
        n: items of each task.
        seed: the first item's.
        split: of the items.
        variant: of the items, a key of `VARIANTS`; all of them if None, as often as it says.
        manner: how the items' questions are put.

    Raises:
        ValueError: a name or a number is none of these.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = tuple(METHODS)
    budgets: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.4, 1.0)
    extra: tuple[str, ...] = tuple(EXTRA)
    n: int = 500
    seed: int = 0
    split: str = "report"
    variant: str | None = None
    manner: Manner = "full"

    def __post_init__(self):
        check_known("task", self.tasks, (*TASKS, *KINDS))
        check_known("method", self.methods, METHODS)
        check_known("extra method", self.extra, EXTRA)
        if not self.tasks or not self.budgets:
            raise ValueError("there must be a task and a budget to run")
        for budget in self.budgets:
            Budget(budget)
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1")
        self.item(self.tasks[0], 0)  # a split or a seed of no item is refused now, not later

    def cells(self) -> dict[Cell, CacheMethod]:
        """All that is run beside the full cache."""
        found: dict[Cell, CacheMethod] = {}
        for budget in self.budgets:
            extra = self.extra if budget < 1 else ()
            made = {name: make_method(name, budget) for name in self.methods if name != FULL}
            made |= {name: EXTRA[name](budget) for name in extra}
            found |= {(name, str(budget)): method for name, method in made.items()}
        return found

    def item(self, task: str, index: int, tile: int = TILE) -> Item:
        """One item of a task, for tiles of that many pixels a side."""
        if task in KINDS:
            side = max(TILE_CELLS, tile // CELL)
            variant = self.variant
            return make_page_item(
                task, self.seed + index, split=self.split, variant=variant, side=side
            )
        return make_item(
            task, self.seed + index, split=self.split, variant=self.variant, manner=self.manner,
            tile=tile,
        )  # fmt: skip

    def items(self, tile: int) -> list[Item]:
        """All items, task by task."""
        return [self.item(task, index, tile) for task in self.tasks for index in range(self.n)]


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
        groups = [pairs[at : at + at_once] for at in range(0, max(len(cells), 1), at_once)]
        advance = self.begin(what, len(items) * len(groups))
        found: dict[Cell, Outcome] = {}
        for group in groups:
            found |= self.evaluation.run(items, dict(group), advance=advance)
        return found


def measure(bench: Bench) -> Result:
    """Run a plan's methods: what its result file says beside what every one says.

    Returns:
        Under "details" {task: {name: {budget: facts}}} of the full cache, the methods and the extra
        ones, see `scoring.summarise`.
    """
    items = bench.items()
    outcomes = bench.run(items, bench.plan.cells(), "items")
    return {"notes": list(NOTES), "details": summarise(items, outcomes)}


def conduct(
    plan: Plan,
    run: Callable[[Bench], Result],
    model: str,
    dtype: str | None,
    batch: int,
    turns: int | None = None,
) -> Result:
    """Run an experiment on a model, with bars in the terminal, and give what its file says.

    Args as of the commands; `turns` as in `Bench`.

    Raises:
        typer.BadParameter: the model cannot be opened, or the experiment not be run by this plan.
    """
    errors, began = Console(stderr=True, highlight=False), time.perf_counter()
    with errors.status("loading ..."), bad_input():
        programs.keep_programs()
        evaluation = evaluate.Evaluation(vlcache_jax.load(model, dtype), batch=batch)
    with counting_bar(errors) as bar:

        def begin(what: str, total: int) -> Callable[[int], object]:
            task = bar.add_task(what, total=total)
            return lambda done: bar.advance(task, done)

        try:
            found = run(Bench(evaluation, plan, turns, begin))
        except Refused as error:
            raise typer.BadParameter(str(error)) from None
    seconds = {**evaluation.seconds, "total": time.perf_counter() - began}
    return {
        **environment(),
        "model": evaluation.vlm.name,
        "architecture": architecture(evaluation.vlm),
        "n": plan.n,
        "seed": plan.seed,
        "split": plan.split,
        "batch": batch,
        "budgets": list(map(str, plan.budgets)),
        "metric": {task: METRICS[task] for task in plan.tasks},
        **found,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def tile_of(vlm: VLM) -> int:
    """Pixels of a tile's side that suit a model's pictures."""
    return max(TILE, vlm.config.tile_side)


def architecture(vlm: VLM) -> dict[str, Any]:
    """Which model it was, to the last weight."""
    text, leaves = vlm.config.text, jax.tree.leaves(vlm.params)
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(np.asarray(leaf).tobytes())
    return {
        "family": vlm.config.family,
        "parameters": count_parameters(vlm.config)["total"],
        "layers": text.num_layers,
        "query_heads": text.num_heads,
        "kv_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "dtype": str(leaves[0].dtype),
        "device": jax.devices()[0].device_kind,
        "sha256": digest.hexdigest(),
    }
