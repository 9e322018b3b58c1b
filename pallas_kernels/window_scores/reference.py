"""Dense version in float64, for tests only."""

import numpy as np


def window_scores(
    q: np.ndarray,
    k: np.ndarray,
    start: np.ndarray,
    lengths: np.ndarray,
    *,
    threshold: float,
    scale: float,
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row by row and head by head, with whole rows of the attention matrix.

    Returns:
        The fields of the package's `WindowScores`.
    """
    batch, rows, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    scores, maxima = np.zeros((2, batch, kv_heads, keys))
    zeroed = np.zeros((batch, heads), int)
    visible = np.zeros((batch, heads), int)
    counts = np.ones((batch, 1, rows)) if weights is None else weights
    counts = np.broadcast_to(counts, (batch, kv_heads, rows))
    positions = start[:, None] + np.arange(rows) if start.ndim == 1 else start
    for b in range(batch):
        for n in range(heads):
            group = n // (heads // kv_heads)
            largest = np.zeros(keys)
            for i in np.flatnonzero(positions[b] < lengths[b]):
                seen = int(positions[b, i]) + 1
                logits = k[b, :seen, group].astype(np.float64) @ q[b, i, n].astype(np.float64)
                shares = np.exp(scale * (logits - logits.max()))
                entries = counts[b, group, i] * shares / shares.sum()
                scores[b, group, :seen] += entries
                largest[:seen] = np.maximum(largest[:seen], entries)
                zeroed[b, n] += (shares < threshold).sum()
                visible[b, n] += seen
            maxima[b, group] += largest
    return scores, zeroed, visible, maxima
