"""Scores of answers, and how sure they are. Every score is between 0 and 1.

The tasks' own: ANLS of `document`, exact match of `reading` and `reasoning`, a CIDEr-like score of
`caption`.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

METRICS = {
    "document": ("anls", "exact"),
    "reading": ("exact", "anls"),
    "reasoning": ("exact", "anls"),
    "caption": ("cider_like", "f1", "exact"),
}
"""The metrics of each task; the first is the task's score.

The answers of other items score 0 to 1 % by those of the first three tasks, but captions share many
words: a fifth by their CIDEr-like score, which weighs rare words more, and a half by F1.
"""

Z = 1.959963984540054
"""Standard errors on either side of a 95 % interval."""


@dataclass(frozen=True)
class Interval:
    """A mean (or a difference of means) and its 95 % interval."""

    mean: float
    low: float
    high: float


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0 if it is below the threshold.

    As DocVQA's evaluation computes it: upper and lower case and runs of spaces are alike, and a
    similarity of exactly the threshold counts (in the paper's formula it does not).
    Source: Biten et al. 2019, "Scene Text Visual Question Answering", equation 1.
    """

    def similarity(answer: str) -> float:
        a, b = _plain(prediction), _plain(answer)
        return 1 - _levenshtein(a, b) / max(len(a), len(b), 1)

    best = max(map(similarity, answers))
    return best if best >= threshold else 0.0


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, upper and lower case and runs of spaces alike."""
    return float(_plain(prediction) in map(_plain, answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the words in common with the nearest answer; articles and punctuation do not count.

    As SQuAD's evaluation computes it (Rajpurkar et al. 2016). The order of words plays no part.
    """

    def f1(answer: str) -> float:
        a, b = Counter(_words(prediction)), Counter(_words(answer))
        if not a or not b:
            return float(a == b)
        return 2 * (a & b).total() / (a.total() + b.total())

    return max(map(f1, answers))


def cider_like(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """A score like CIDEr (Vedantam et al. 2015) for all items at once, float64 `[n]`.

    The mean over n-grams of 1 to 4 words of the cosine between the tf-idf vectors of prediction
    and answer, averaged over an item's answers. Like CIDEr, it weighs a rare word more than one
    that is in every answer. Not CIDEr, and not comparable with published figures: the inverse
    document frequency is log((1 + items) / items with it), so that few items do not make it zero;
    lengths that the answer is too short for are left out, so that the right answer scores 1; there
    is no factor of 10, no stemming and no length penalty.
    """
    grams = [[_ngrams(answer) for answer in of_item] for of_item in answers]
    found: Counter[tuple[str, ...]] = Counter()
    for of_item in grams:
        found.update({gram for counts in of_item for n in counts for gram in n})

    def vector(counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        weight = len(answers) + 1
        return {gram: k * math.log(weight / max(1, found[gram])) for gram, k in counts.items()}

    def similarity(prediction: list[Counter], answer: list[Counter]) -> float:
        pairs = [
            (vector(p), vector(a)) for p, a in zip(prediction, answer, strict=True) if a.total()
        ]
        return float(np.mean([_cosine(p, a) for p, a in pairs])) if pairs else 0.0

    return np.array(
        [
            np.mean([similarity(_ngrams(prediction), answer) for answer in of_item])
            for prediction, of_item in zip(predictions, grams, strict=True)
        ]
    )


def score(task: str, predictions: Sequence[str], answers: Sequence[str]) -> dict[str, np.ndarray]:
    """Scores of every item by each metric of a task, float64 `[n]`.

    Args:
        task: a key of `METRICS`.
        predictions: one for each item.
        answers: one for each item. The CIDEr-like score depends on all of them.
    """
    each: dict[str, Callable[[str, Sequence[str]], float]] = {
        "anls": anls,
        "exact": exact_match,
        "f1": token_f1,
    }
    found = {}
    for name in METRICS[task]:
        if name == "cider_like":
            found[name] = cider_like(predictions, [[answer] for answer in answers])
        else:
            pairs = zip(predictions, answers, strict=True)
            found[name] = np.array([each[name](p, [answer]) for p, answer in pairs])
    return found


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


def _words(text: str) -> list[str]:
    """Words without case, punctuation and articles, as SQuAD's evaluation has them."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _levenshtein(a: str, b: str) -> int:
    """Fewest characters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _ngrams(text: str) -> list[Counter[tuple[str, ...]]]:
    """How often each sequence of 1, 2, 3 and 4 words occurs."""
    words = re.findall(r"\w+", text.lower())
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, 5)]


def _cosine(a: dict[tuple[str, ...], float], b: dict[tuple[str, ...], float]) -> float:
    norm = math.hypot(*a.values()) * math.hypot(*b.values())
    return sum(value * b.get(gram, 0.0) for gram, value in a.items()) / norm if norm else 0.0
