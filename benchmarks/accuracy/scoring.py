"""Answers to numbers: scores with their intervals, differences to the full cache, agreement."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.accuracy.evaluate import MEASURES, WHOLE, Cell, Outcome
from benchmarks.accuracy.metrics import Interval, mean_interval, paired_difference, score
from benchmarks.accuracy.tasks import IMAGE, VARIANTS, Item

BY_LAYER = ("kept", "hit_rate", "answer_recall")
"""Measures that are told of every layer, too."""


def variant_of(item: Item) -> str:
    """Which of `tasks.VARIANTS` an item is."""
    if item.turns:
        return "multi-turn"
    if len(item.images) > 1:
        return "two pictures"
    return "plain" if item.prompt.startswith(IMAGE) else "question first"


def rows_by_task(items: Sequence[Item]) -> dict[str, list[int]]:
    """Where the items of each task are."""
    found: dict[str, list[int]] = {}
    for row, item in enumerate(items):
        found.setdefault(item.task, []).append(row)
    return found


def scores_of(items: Sequence[Item], outcome: Outcome) -> dict[str, np.ndarray]:
    """Scores of the items of each task by its metric, float64 [n]."""
    return {
        task: score(task, [outcome.answers[row] for row in rows], [items[r].answer for r in rows])
        for task, rows in rows_by_task(items).items()
    }


def summarise(items: Sequence[Item], outcomes: Mapping[Cell, Outcome]) -> dict[str, Any]:
    """What there is to say of each task and each method, as plain values for JSON.

    The outcomes are those of `Evaluation.run`, the full cache's among them.

    Returns:
        {task: {label: {budget: facts}}}. The facts are those of `facts_of`, "agreement" ("answers":
        share of the items whose tokens are those of the full cache; "tokens": share of the tokens
        that stand where the full cache has them), the means of the measures of an `Outcome`, some
        of them "by_layer", "new_tokens" (mean length of the answers), and `facts_of` each variant.
    """
    scores = {cell: scores_of(items, outcome) for cell, outcome in outcomes.items()}
    found = {}
    for task, rows in rows_by_task(items).items():
        own, full = [items[row] for row in rows], scores[WHOLE][task]
        found[task] = nested(
            {
                cell: _facts(own, scores[cell][task], full, outcome, outcomes[WHOLE], rows)
                for cell, outcome in outcomes.items()
            }
        )
    return found


def nested(facts: Mapping[Cell, Any]) -> dict[str, dict[str, Any]]:
    """{label: {budget: facts}}."""
    found: dict[str, dict[str, Any]] = {}
    for (label, budget), value in facts.items():
        found.setdefault(label, {})[budget] = value
    return found


def _facts(
    items: list[Item],
    scores: np.ndarray,
    full_scores: np.ndarray,
    outcome: Outcome,
    full: Outcome,
    rows: list[int],
) -> dict[str, Any]:
    """The facts of one label about the items of one task, `rows` of the outcomes."""
    measures = {name: getattr(outcome, name)[rows] for name in MEASURES}
    tokens, right = ([each.tokens[row] for row in rows] for each in (outcome, full))
    variants = np.array([variant_of(item) for item in items])
    return {
        **facts_of(scores, full_scores),
        "agreement": {
            "answers": rounded(np.mean([a == b for a, b in zip(tokens, right, strict=True)])),
            "tokens": rounded(np.mean(list(map(agreement, tokens, right)))),
        },
        **{name: rounded(values.mean()) for name, values in measures.items()},
        "by_layer": {name: rounded(measures[name].mean(0)) for name in BY_LAYER},
        "new_tokens": rounded(np.mean(list(map(len, tokens)))),
        "variants": {
            variant: facts_of(scores[variants == variant], full_scores[variants == variant])
            for variant in VARIANTS
            if variant in variants
        },
    }


def agreement(tokens: Sequence[int], others: Sequence[int]) -> float:
    """Share of the tokens, of the longer of the two answers, that are the same at their place."""
    longer = max(len(tokens), len(others))
    same = sum(a == b for a, b in zip(tokens, others, strict=False))
    return same / longer if longer else 1.0


def facts_of(scores: np.ndarray, full: np.ndarray) -> dict[str, Any]:
    """How many scores [n], their mean, its interval, and the difference to the full cache's."""
    mean, *interval = mean_interval(scores)
    return {
        "n": scores.size,
        "score": rounded(mean),
        "interval": rounded(interval),
        "difference": difference(scores, full),
    }


def difference(scores: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """The mean of score minus baseline, item by item, with its interval of 95 %."""
    return plain(paired_difference(scores, baseline))


def plain(interval: Interval) -> dict[str, float]:
    """An interval as a file has it."""
    return {name: rounded(value) for name, value in interval._asdict().items()}


def rounded(values: Any) -> Any:
    """Numbers as a file has them."""
    return np.round(np.asarray(values, np.float64), 5).tolist()
