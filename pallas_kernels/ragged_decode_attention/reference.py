"""Dense float32 version, one sequence at a time, for tests only."""

import jax
import numpy as np

Array = jax.Array | np.ndarray


def ragged_decode_attention(
    q: Array,
    pool_k: Array,
    pool_v: Array,
    offset: Array,
    length: Array,
    tail_k: Array,
    tail_v: Array,
    fill: Array,
    *,
    scale: float,
) -> np.ndarray:
    """Cut the two segments out, join them, and attend; float64 inside."""
    batch, heads, head_dim = q.shape
    kv_heads = pool_k.shape[1]
    out = np.zeros((batch, kv_heads, heads // kv_heads, head_dim))
    for b in range(batch):
        rows = slice(int(offset[b]), int(offset[b] + length[b]))
        new = slice(0, int(fill[b]))
        k, v = (
            np.concatenate([pool[b, :, rows], tail[b, :, new]], axis=1).astype(np.float64)
            for pool, tail in ((np.asarray(pool_k), np.asarray(tail_k)),
                               (np.asarray(pool_v), np.asarray(tail_v)))
        )  # fmt: skip
        if k.shape[1] == 0:
            continue
        grouped = np.asarray(q[b]).astype(np.float64).reshape(kv_heads, -1, head_dim)
        logits = np.einsum("kgh,ksh->kgs", grouped, k) * scale
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[b] = np.einsum("kgs,ksh->kgh", weights, v)
    return out.reshape(batch, heads, head_dim)
