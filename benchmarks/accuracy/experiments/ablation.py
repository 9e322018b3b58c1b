"""Two scores by two allocations: what of VL-Cache is its score, and what its layer budgets."""

from itertools import product
from typing import Any

from benchmarks.accuracy.evaluate import FULL
from benchmarks.accuracy.experiments.common import Bench, compare, differences
from benchmarks.accuracy.experiments.text import budget_of, change, made_by
from benchmarks.accuracy.report import Result, scored
from benchmarks.documents import table
from vlcache_jax.cache.allocate import Allocation, Sparsity, Uniform
from vlcache_jax.cache.methods import Custom
from vlcache_jax.cache.score import AllRows, ColumnSum, PostVisionRows, Score

SCORES: dict[str, Score] = {
    "post-vision": ColumnSum(PostVisionRows()),
    "full prompt": ColumnSum(AllRows()),
}
ALLOCATIONS: dict[str, Allocation] = {"sparsity": Sparsity(), "uniform": Uniform()}
PAIRS = tuple(product(SCORES, ALLOCATIONS))
"""All keep the last 10 % of a layer's budget, so that nothing else differs: the first pair is
VL-Cache; the last one differs from H2O in that share, which is a half there."""


def run(bench: Bench) -> Result:
    """Scores of the four pairs, and what each axis changes while the other one stays."""
    cells = {
        (f"{score}, {allocation}", text): Custom(
            budget, score=SCORES[score], allocation=ALLOCATIONS[allocation]
        )
        for text, budget in bench.budgets
        for score, allocation in PAIRS
    }
    items = bench.items()
    outcomes = bench.run(items, cells, "pairs")
    effects: dict[str, dict[str, Any]] = {}
    for text, _ in bench.budgets:
        effects[text] = {
            name: differences(items, outcomes[better, text], outcomes[worse, text])
            for name, (better, worse) in _effects().items()
        }
    return {"details": compare(items, outcomes), "effects": effects}


def _effects() -> dict[str, tuple[str, str]]:
    """What is changed: (the label with, the label without)."""
    (new_score, old_score), (new_sizes, old_sizes) = SCORES, ALLOCATIONS
    return {
        **{
            f"score, under {sizes}": (f"{new_score}, {sizes}", f"{old_score}, {sizes}")
            for sizes in ALLOCATIONS
        },
        **{
            f"allocation, under {score}": (f"{score}, {new_sizes}", f"{score}, {old_sizes}")
            for score in SCORES
        },
    }


def section(result: Result) -> str:
    """The part of docs/accuracy.md."""
    labels = [", ".join(pair) for pair in PAIRS]
    rows, effects = [], []
    for budget, changed in result["effects"].items():
        for task, of_task in result["details"].items():
            found = [scored(of_task[label][budget]) for label in labels]
            rows.append([task, budget_of(budget), scored(of_task[FULL]["1.0"]), *found])
            found = [change(changed[name][task]) for name in _effects()]
            effects.append([task, budget_of(budget), *found])
    return "\n\n".join(
        [
            made_by(result),
            "Two token scores (attention of the rows after the picture, of all rows of the prompt) "
            "with two layer allocations (by the sparsity of the post-vision attention, equal). All "
            "else is VL-Cache's, so that 'post-vision, sparsity' is VL-Cache itself.",
            table(["task", "budget", "full cache", *labels], rows),
            "What each axis changes, item by item: the post-vision score in place of the full "
            "prompt's, and the allocation by sparsity in place of the equal one.",
            table(["task", "budget", *_effects()], effects),
        ]
    )
