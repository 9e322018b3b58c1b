"""What a better score could be: chosen on one set of seeds, reported on another.

Also, what VL-Cache's score is worth by the number of rows that it looks from.
"""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np

from benchmarks.accuracy.budgets import Bench, Refused
from benchmarks.accuracy.experiments.common import Experiment, compare
from benchmarks.accuracy.oracle import MostAttention, Oracle
from benchmarks.accuracy.packing import MARK, prompt_of
from benchmarks.accuracy.report import (
    FULL,
    Result,
    both,
    budget_of,
    columns_of,
    full_cache,
    per_cent,
    scored,
    told,
)
from benchmarks.accuracy.scene import Manner
from benchmarks.accuracy.scoring import rounded, rows_by_task
from benchmarks.accuracy.tasks import Item
from benchmarks.candidates import candidates
from benchmarks.documents import table
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import SnapKV, VLCache
from vlcache_jax.vlm import VLM

CHOSEN_ON = "tune"
BEST = 3
"""Candidates that are reported."""

MANNERS: tuple[Manner, ...] = get_args(Manner)[::-1]
"""From the shortest way of asking to the longest."""


def ceilings(budget: float) -> dict[str, CacheMethod]:
    """What the chosen ones are compared with."""
    return {
        "vl-cache": VLCache(budget),
        "snapkv": SnapKV(budget),
        "oracle": Oracle(budget),
        "oracle-layers": Oracle(budget, allocation=MostAttention()),
    }


def run(bench: Bench) -> Result:
    """Choose on the seeds for that, report on the plan's.

    Raises:
        Refused: these are the same.
    """
    plan = bench.plan
    if plan.split == CHOSEN_ON:
        raise Refused(f"scores are chosen on the split {CHOSEN_ON!r}: report on another one")
    tried = bench.cells(candidates)
    items = bench.items(split=CHOSEN_ON)
    tuned = compare(items, bench.run(items, tried, "choosing"))
    means = {
        label: float(np.mean([of[label][budget]["score"] for of in tuned.values()
                              for budget in map(str, plan.budgets)]))
        for label in candidates(1.0)
    }  # fmt: skip
    chosen = sorted(means, key=lambda label: -means[label])[:BEST]

    shown = bench.cells(ceilings) | {cell: tried[cell] for cell in tried if cell[0] in chosen}
    items = bench.items()
    reported = compare(items, bench.run(items, shown, "reporting"))
    manners = {}
    for manner in MANNERS:
        items = bench.items(variant="plain", manner=manner)
        rows = np.array([post_vision_rows(item, bench.vlm) for item in items])
        outcomes = bench.run(items, shown, f"{manner} questions")
        manners[manner] = {
            "rows": {
                task: rounded(np.mean(rows[own])) for task, own in rows_by_task(items).items()
            },
            "details": compare(items, outcomes),
        }
    return {
        "choice": {
            "split": CHOSEN_ON, "seed": plan.seed, "n": plan.n, "chosen": chosen,
            "means": {label: rounded(mean) for label, mean in means.items()}, "details": tuned,
        },
        "details": reported,
        "manners": manners,
    }  # fmt: skip


def post_vision_rows(item: Item, vlm: VLM) -> int:
    """tau: tokens behind the last picture of an item's prompt."""
    text = prompt_of(item, vlm.processor).rsplit(MARK, 1)[-1]
    return len(vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def section(result: Result) -> str:
    """The part of docs/accuracy.md."""
    choice, details, columns = result["choice"], result["details"], columns_of(result)
    labels = [label for label in next(iter(details.values())) if label != FULL]
    order = sorted(choice["means"], key=lambda label: -choice["means"][label])

    def rows(
        labels: list[str], details: Result, cell: Callable[[dict[str, Any]], str]
    ) -> list[list[str]]:
        return [
            [label, *(cell(details[task][label][budget]) for task, budget in columns.values())]
            for label in labels
        ]

    tried = [
        [label, per_cent(choice["means"][label]), *scores]
        for label, *scores in rows(order, choice["details"], lambda of: per_cent(of["score"]))
    ]
    parts, budget = [], result["budgets"][-1]
    for task in details:
        by_manner = {
            f"{manner} ({of['rows'][task]:.0f} rows)": of["details"][task]
            for manner, of in result["manners"].items()
        }
        found = [[FULL, *(scored(of[FULL]["1.0"]) for of in by_manner.values())]]
        found += [
            [label, *(f"{both(of[label][budget])}; {per_cent(of[label][budget]['answer_recall'])}"
                      for of in by_manner.values())]
            for label in labels
        ]  # fmt: skip
        parts += [f"**{task}** at {budget_of(budget)}", table(["method", *by_manner], found)]
    return told(
        result,
        f"Chosen on the split `{choice['split']}`: {choice['n']:,} items of each task, seeds "
        f"from {choice['seed']}. {len(tried)} candidates: parts of the library, combined "
        "([candidates.py](../benchmarks/candidates.py) says what each is). Where it does not say "
        "otherwise all layers have the same budget. The best "
        f"{len(choice['chosen'])} by the mean over tasks and budgets are reported: "
        f"{'; '.join(choice['chosen'])}. 'sum; layers by sparsity' is VL-Cache.",
        table(["chosen among, by mean", "mean", *columns], tried),
        f"Reported on the split `{result['split']}`, which nothing was chosen on. The oracle "
        "keeps what the full cache's answer really attends to, with equal layers and with the "
        "layer sizes that keep most of it. Each cell has the score, and the difference to the "
        f"full cache. {full_cache(details)}",
        table(["method", *columns], rows(labels, details, both)),
        "By the length of the question, plain prompts only: the mean number of rows behind the "
        "picture stands beside how it was put. Terse questions only name what is asked for. "
        "How often each manner was trained on is in the recipe: compare with the full cache. "
        "Each cell has the score, the difference to it, and the share of its answer's "
        "attention that is kept.",
        *parts,
    )


SCORING = Experiment(
    "Other scores than VL-Cache's: chosen on the split 'tune', reported beside VL-Cache and "
    "the oracle on --split; and scores by the length of the question.",
    budgets=(0.05, 0.1),
    section=section,
    run=run,
)
