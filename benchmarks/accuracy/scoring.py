"""Answers to numbers: scores with their intervals, differences to the full cache, agreement."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.accuracy.evaluate import FULL, Measures, Outcome
from benchmarks.accuracy.metrics import METRICS, Interval, mean_interval, paired_difference, score
from benchmarks.accuracy.tasks import IMAGE, VARIANTS, Item

BY_LAYER = ("kept", "hit_rate", "answer_recall")
"""Measures that are told of every layer, too."""

DIGITS = 5


def variant_of(item: Item) -> str:
    """Which of `tasks.VARIANTS` an item is."""
    if item.turns:
        return "multi-turn"
    if len(item.images) > 1:
        return "two pictures"
    return "plain" if item.prompt.startswith(IMAGE) else "question first"


def summarise(
    items: Sequence[Item], outcomes: Mapping[str, Outcome]
) -> dict[str, dict[str, dict[str, Any]]]:
    """What there is to say of each task and each label, as plain values for JSON.

    The score is that of the task's first metric (`metrics.METRICS`), from 0 to 1; its difference to
    the full cache is taken item by item. Intervals are of 95 %.

    Args:
        items: what was run.
        outcomes: of `Evaluation.run`, "full" among them.

    Returns:
        {task: {label: facts}}. The facts are "n", "score", "interval", "difference", "metrics" (all
        of them), "agreement" ("answers": share of the items whose tokens are those of the full
        cache; "tokens": share of the tokens that stand where the full cache has them), the means
        of the measures of an `Outcome`, some of them "by_layer", "new_tokens" (mean length of the
        answers), and for each variant that there is "n", "score", "interval", "difference".
    """
    found = {}
    for task in dict.fromkeys(item.task for item in items):
        rows = [row for row, item in enumerate(items) if item.task == task]
        own = [items[row] for row in rows]
        scores = {
            label: score(task, [outcome.answers[row] for row in rows], [i.answer for i in own])
            for label, outcome in outcomes.items()
        }
        found[task] = {
            label: _facts(own, scores[label], scores[FULL], outcome, outcomes[FULL], rows)
            for label, outcome in outcomes.items()
        }
    return found


def _facts(
    items: list[Item],
    scores: dict[str, np.ndarray],
    full_scores: dict[str, np.ndarray],
    outcome: Outcome,
    full: Outcome,
    rows: list[int],
) -> dict[str, Any]:
    """The facts of one label about the items of one task, `rows` of the outcomes."""
    lead = METRICS[items[0].task][0]
    measures = {name: getattr(outcome, name)[rows] for name in Measures._fields}
    tokens, right = ([each.tokens[row] for row in rows] for each in (outcome, full))
    variants = np.array([variant_of(item) for item in items])
    return {
        **facts_of(scores[lead], full_scores[lead]),
        "metrics": {name: interval(mean_interval(values)) for name, values in scores.items()},
        "agreement": {
            "answers": rounded(np.mean([a == b for a, b in zip(tokens, right, strict=True)])),
            "tokens": rounded(np.mean(list(map(agreement, tokens, right)))),
        },
        **{name: rounded(values.mean()) for name, values in measures.items()},
        "by_layer": {name: rounded(measures[name].mean(0)) for name in BY_LAYER},
        "new_tokens": rounded(np.mean(list(map(len, tokens)))),
        "variants": {
            variant: facts_of(scores[lead][chosen], full_scores[lead][chosen])
            for variant in VARIANTS
            for chosen in [variants == variant]
            if chosen.any()
        },
    }


def agreement(tokens: Sequence[int], others: Sequence[int]) -> float:
    """Share of the tokens, of the longer of the two answers, that are the same at their place."""
    longer = max(len(tokens), len(others))
    same = sum(a == b for a, b in zip(tokens, others, strict=False))
    return same / longer if longer else 1.0


def facts_of(scores: np.ndarray, full: np.ndarray) -> dict[str, Any]:
    """A mean score, its interval of 95 %, and its difference to the full cache item by item."""
    found = mean_interval(scores)
    return {
        "n": scores.size,
        "score": rounded(found.mean),
        "interval": rounded([found.low, found.high]),
        "difference": difference(scores, full),
    }


def difference(scores: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """The mean of score minus baseline, item by item, with its interval of 95 %."""
    return interval(paired_difference(scores, baseline))


def interval(found: Interval) -> dict[str, float]:
    """An interval as a file has it."""
    return {"mean": rounded(found.mean), "low": rounded(found.low), "high": rounded(found.high)}


def rounded(values: Any) -> Any:
    """Numbers as a file has them."""
    return np.round(np.asarray(values, np.float64), DIGITS).tolist()
