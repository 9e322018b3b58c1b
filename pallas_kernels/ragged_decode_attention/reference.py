"""Dense version in float64, one sequence at a time, for tests only."""

from typing import Any

import numpy as np

from pallas_kernels.rows import Segment, Tail


def ragged_decode_attention(q: Any, pool: Segment, tail: Tail, *, scale: float) -> np.ndarray:
    """Cut the two segments out, join them, and attend: q [B, N, H] -> [B, N, H]."""
    return np.stack([attend(q[b], *segments(pool, tail, b), scale) for b in range(len(q))])


def segments(pool: Segment, tail: Tail, b: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A sequence's keys and its values, of the pool and of the tail: [K, rows, H] each."""
    own = slice(int(pool.offset[b]), int(pool.offset[b] + pool.length[b]))
    new = slice(0, int(tail.fill[b]))
    k, v = (
        [np.asarray(x).astype(np.float64) for x in (old[b, :, own], grown[b, :, new])]
        for old, grown in ((pool.k, tail.k), (pool.v, tail.v))
    )
    return k, v


def attend(q: Any, k: list[np.ndarray], v: list[np.ndarray], scale: float) -> np.ndarray:
    """Attention of q [N, H] to parts [K, rows, H] of a sequence's rows; zeros if there is none."""
    keys, values = (np.concatenate(parts, axis=1) for parts in (k, v))
    if keys.shape[1] == 0:
        return np.zeros(q.shape)
    grouped = np.asarray(q).astype(np.float64).reshape(len(keys), -1, q.shape[-1])
    logits = np.einsum("kgh,ksh->kgs", grouped, keys) * scale
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("kgs,ksh->kgh", weights, values).reshape(q.shape)
