"""Scores of answers, and how sure they are. Every score is between 0 and 1."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.accuracy.pages.content import KINDS

METRICS = {
    "document": "anls", "reading": "exact",
    **dict.fromkeys(KINDS, "exact"), "copy": "anls",
}  # fmt: skip
"""The metric of each task. The answers of other items score 0 to 1 %."""

Z = 1.959963984540054
"""Standard errors on either side of a 95 % interval."""


class Interval(NamedTuple):
    """A mean (or a difference of means) and its 95 % interval."""

    mean: float
    low: float
    high: float


def anls(prediction: str, answer: str, threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the answer, 0 if it is below the threshold.

    As DocVQA's evaluation computes it: upper and lower case and runs of spaces are alike, and a
    similarity of exactly the threshold counts (in the paper's formula it does not).
    Source: Biten et al. 2019, "Scene Text Visual Question Answering", equation 1.
    """
    a, b = _plain(prediction), _plain(answer)
    similarity = 1 - _levenshtein(a, b) / max(len(a), len(b), 1)
    return similarity if similarity >= threshold else 0.0


def exact_match(prediction: str, answer: str) -> float:
    """1 if the prediction is the answer, upper and lower case and runs of spaces alike."""
    return float(_plain(prediction) == _plain(answer))


def score(task: str, predictions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Scores of every item by the task's metric, one of `METRICS`, float64 `[n]`.

    Raises:
        ValueError: there are not as many answers as predictions.
    """
    metric = {"anls": anls, "exact": exact_match}[METRICS[task]]
    return np.array([metric(*pair) for pair in zip(predictions, answers, strict=True)])


def mean_interval(scores: np.ndarray, seed: int = 0) -> Interval:
    """The mean of independent scores.

    Wilson's interval where all scores are 0 or 1 (it is right near the ends too, where a bootstrap
    of all-right answers would claim certainty), else the percentile bootstrap.
    """
    scores = _checked(scores)
    mean, n = float(scores.mean()), scores.size
    if not np.isin(scores, (0, 1)).all():
        return Interval(mean, *_bootstrap(scores, seed))
    middle = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(mean * (1 - mean) / n + (Z / (2 * n)) ** 2) / (1 + Z**2 / n)
    # The mean is within it; at 0 and 1 rounding may say otherwise.
    return Interval(mean, max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half)))


def paired_difference(scores: np.ndarray, baseline: np.ndarray, seed: int = 0) -> Interval:
    """The mean of score minus baseline, item by item.

    Agresti and Min's interval (2005) where all scores are 0 or 1 (half an item is added to each
    cell of the 2 x 2 table, so that no change at all is not taken for certainty), else the
    percentile bootstrap of the items.
    """
    scores, baseline = _checked(scores), _checked(baseline)
    if scores.shape != baseline.shape:
        raise ValueError(f"{scores.size} scores but {baseline.size} of the baseline")
    change = scores - baseline
    mean, n = float(change.mean()), change.size + 2
    if not (np.isin(scores, (0, 1)).all() and np.isin(baseline, (0, 1)).all()):
        return Interval(mean, *_bootstrap(change, seed))
    won, lost = float((change > 0).sum() + 0.5), float((change < 0).sum() + 0.5)
    middle = (won - lost) / n
    half = Z * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    return Interval(mean, max(-1.0, min(mean, middle - half)), min(1.0, max(mean, middle + half)))


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or not scores.size:
        raise ValueError(f"scores of shape {scores.shape}: one for each item, at least one")
    return scores


def _bootstrap(values: np.ndarray, seed: int, samples: int = 4000) -> tuple[float, float]:
    """Percentiles of the means of resampled items."""
    dice = np.random.default_rng(seed)
    means = [
        values[dice.integers(values.size, size=(samples // 20, values.size))].mean(1)
        for _ in range(20)  # in parts, to need little memory
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _levenshtein(a: str, b: str) -> int:
    """Fewest characters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
