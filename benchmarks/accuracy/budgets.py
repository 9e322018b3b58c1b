"""The benchmark itself: every method at every budget on every task, as one result."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.accuracy.evaluate import FULL, Evaluation
from benchmarks.accuracy.metrics import METRICS
from benchmarks.accuracy.oracle import MostAttention, Oracle
from benchmarks.accuracy.scene import Manner
from benchmarks.accuracy.scoring import summarise
from benchmarks.accuracy.tasks import TASKS, Item, make_item
from benchmarks.command import check_known
from benchmarks.processor import TILE
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import METHODS, Custom, make_method
from vlcache_jax.report import count_parameters
from vlcache_jax.vlm import VLM

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
    "Scores are from 0 to 1, by the metric under 'metric'; 'cider_like' is not CIDEr. Intervals "
    "are of 95 %; differences are to the full cache, item by item.",
)


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        tasks: keys of `TASKS`.
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
        check_known("task", self.tasks, TASKS)
        check_known("method", self.methods, METHODS)
        check_known("extra method", self.extra, EXTRA)
        if not self.tasks or not self.budgets:
            raise ValueError("there must be a task and a budget to run")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise ValueError(f"budget {budget:g} must be above 0 and at most 1 (0.1 is 10 %)")
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1")
        self.item(self.tasks[0], 0)  # a split or a seed of no item is refused now, not later

    def cells(self) -> Iterator[tuple[str, str, CacheMethod]]:
        """(method or extra, budget, what is run) of all that is not the full cache."""
        for budget in self.budgets:
            if budget < 1:
                for name in self.methods:
                    if name != FULL:
                        yield name, str(budget), make_method(name, budget)
                for name in self.extra:
                    yield name, str(budget), EXTRA[name](budget)

    def item(self, task: str, index: int, tile: int = TILE) -> Item:
        """One item of a task, for tiles of that many pixels a side."""
        return make_item(
            task, self.seed + index, split=self.split, variant=self.variant, manner=self.manner,
            tile=tile,
        )  # fmt: skip

    def items(self, tile: int) -> list[Item]:
        """All items, task by task."""
        return [self.item(task, index, tile) for task in self.tasks for index in range(self.n)]

    def about(self, vlm: VLM, batch: int) -> dict[str, Any]:
        """What a result file says of what was run.

        Args:
            vlm: the model.
            batch: items that were run at a time.
        """
        return {
            "model": vlm.name,
            "architecture": architecture(vlm),
            "n": self.n,
            "seed": self.seed,
            "split": self.split,
            "batch": batch,
            "metric": {task: METRICS[task] for task in self.tasks},
        }


def measure(
    vlm: VLM, plan: Plan, *, batch: int = 16, advance: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """Run a plan: what its result file says beside the environment.

    Args:
        vlm: the model.
        plan: what is to be run.
        batch: items that are run at a time.
        advance: called with the number of items done at a time.

    Returns:
        What was run, the seconds that it took, and under "details" {task: {name: {budget: facts}}}
        of the full cache, the methods and the extra ones, see `scoring.summarise`.
    """
    began = time.perf_counter()
    items = plan.items(tile_of(vlm))
    drawn = time.perf_counter()
    evaluation = Evaluation(vlm, batch=batch)
    cells = {f"{name} {budget}": (name, budget, method) for name, budget, method in plan.cells()}
    methods = {label: method for label, (_, _, method) in cells.items()}
    outcomes = evaluation.run(items, methods, advance=advance)
    answered = time.perf_counter()
    details: dict[str, dict[str, dict[str, Any]]] = {}
    for task, facts in summarise(items, outcomes).items():
        names = dict.fromkeys((FULL, *plan.methods, *plan.extra))
        details[task] = {
            name: {budget: facts[f"{name} {budget}"] for own, budget, _ in cells.values()
                   if own == name}
            for name in names
        }  # fmt: skip
        for name in (FULL, *(plan.methods if 1 in plan.budgets else ())):
            details[task][name]["1.0"] = facts[FULL]
    ended = time.perf_counter()
    return {
        **plan.about(vlm, batch),
        "notes": list(NOTES),
        "details": details,
        "seconds": {
            "draw": round(drawn - began, 2),
            **{name: round(value, 2) for name, value in evaluation.seconds.items()},
            "score": round(ended - answered, 2),
            "total": round(ended - began, 2),
        },
    }


def tile_of(vlm: VLM) -> int:
    """Pixels of a tile's side that suit a model's pictures."""
    return max(TILE, vlm.config.vision.image_size)


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
