"""Kinds of prompts: the question before the picture, two pictures, several turns."""

from benchmarks.accuracy.evaluate import FULL
from benchmarks.accuracy.experiments.common import Bench, compare
from benchmarks.accuracy.experiments.text import both, budget_of, made_by
from benchmarks.accuracy.report import Result, scored
from benchmarks.accuracy.tasks import VARIANTS
from benchmarks.documents import table


def run(bench: Bench) -> Result:
    """Scores of all methods on each kind of prompt."""
    cells = bench.methods()
    variants = {}
    for variant in VARIANTS:
        items = bench.items(variant=variant)
        variants[variant] = compare(items, bench.run(items, cells, variant))
    return {"variants": variants}


def section(result: Result) -> str:
    """The part of docs/accuracy.md."""
    variants, parts = result["variants"], []
    for task in result["metric"]:
        labels = variants["plain"][task]
        rows = [[FULL, "100 %", *(scored(of[task][FULL]["1.0"]) for of in variants.values())]]
        for budget in result["budgets"]:
            rows += [
                [name, budget_of(budget), *(both(of[task][name][budget]) for of in
                                            variants.values())]
                for name in labels
                if name != FULL
            ]  # fmt: skip
        parts += [f"Task {task}:", table(["method", "budget", *variants], rows)]
    return "\n\n".join(
        [
            made_by(result),
            "Plain prompts have one picture and then the question; of several turns, the pictures "
            "are in the first. Where the question comes first, only the end of the user's turn "
            "stands behind the picture: these few rows are then VL-Cache's window. Each cell has "
            "the score, and the difference to the full cache on the same prompts.",
            *parts,
        ]
    )
