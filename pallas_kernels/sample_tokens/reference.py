"""Float64, row by row, for tests only."""

from itertools import product

import numpy as np


def sample_tokens(
    logits: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    uniform: np.ndarray,
) -> np.ndarray:
    """Only the comparisons of logits, and what makes a row greedy, are float32's."""
    rows = zip(logits, temperature, top_k, top_p, uniform, strict=True)
    return np.array([_token(*row) for row in rows], np.int32)


def near(
    logits: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    uniform: np.ndarray,
    *,
    error: float = 2e-5,
) -> np.ndarray:
    """What sums that are off by a share of themselves may draw, [9, B]; the exact tokens first."""
    below_one = np.nextafter(np.float32(1), np.float32(0))
    return np.stack(
        [
            sample_tokens(
                logits,
                temperature,
                top_k,
                np.where(top_p < 1, top_p * (1 + of_p), top_p),
                np.clip(uniform + of_uniform, 0, below_one),
            )
            for of_p, of_uniform in product((0, error, -error), repeat=2)
        ]
    )


def _token(
    logits: np.ndarray, temperature: np.float32, top_k: int, top_p: float, uniform: float
) -> int:
    greedy = int(np.argmax(logits))
    with np.errstate(all="ignore"):
        finite = np.isfinite(logits[greedy] / temperature)
    if temperature < np.finfo(np.float32).tiny or not finite:
        return greedy
    mass = np.exp((logits.astype(np.float64) - logits[greedy]) / temperature)
    if 0 < top_k < logits.size:
        mass[logits < np.sort(logits)[-top_k]] = 0.0
    order = np.argsort(-logits, kind="stable")  # of equals the lower id first
    before = np.cumsum(mass[order]) - mass[order]
    gone = (before > 0) & (before >= top_p * mass.sum()) & (top_p < 1)
    mass[order[gone]] = 0.0
    reached = np.cumsum(mass)
    kept = np.flatnonzero(mass)
    beyond = kept[reached[kept] > uniform * reached[-1]]
    return int(beyond[0] if beyond.size else kept[-1])
