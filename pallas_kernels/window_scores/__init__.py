"""How much the last rows of a prompt attend to each key, and how sparsely."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backends import choose
from pallas_kernels.rows import LayerRows, check_heads
from pallas_kernels.window_scores import triton, xla

BACKENDS = {"triton": triton.window_scores, "xla": xla.window_scores}
"""In the order of preference."""


class WindowScores(NamedTuple):
    """Statistics of the attention of a window of rows.

    Attributes:
        scores: sum of a key's attention probabilities over the window's rows and over the query
            heads of its group, float32 [B, K, T]; 0 for keys that no row sees.
        zeroed: entries below `threshold` times the largest of their own row, int32 [B, N]; None
            where no threshold was given.
        visible: entries that the causal mask and the lengths leave, int32 [B, N]; None where no
            threshold was given.
        maxima: largest of a key's attention probabilities over the window's rows, summed over the
            query heads of its group, float32 [B, K, T]; 0 for keys that no row sees; None where
            they were not asked for.
    """

    scores: jax.Array
    zeroed: jax.Array | None
    visible: jax.Array | None
    maxima: jax.Array | None


def window_scores(
    q: jax.Array,
    k: jax.Array | LayerRows,
    start: jax.Array,
    lengths: jax.Array,
    *,
    weights: jax.Array | None = None,
    threshold: float | None = None,
    maxima: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> WindowScores:
    """Column sums, column maxima and sparsity of softmax(q k^T * scale), for a window of rows.

        keys     0 . . . . . . . . . start . . . lengths . . T
        window                       row 0 . . . |    rows beyond the length are not there

    The window's row i stands at position start[b] + i and sees the keys 0..start[b] + i; or rows
    stand at positions of their own, `start[b, i]`, and see the keys up to there. The matrix
    is made block by block, so that all rows of a long prompt can be the window (start 0, W = T).
    What stands beyond the lengths is never read into a result. (VL-Cache, section 4.1 and 4.3:
    post-vision attention, its sparsity, and the accumulated score.)

    Args:
        q: queries of the window's rows [B, W, N, H].
        k: keys of the whole prompt [B, T, K, H], N a multiple of K; or a layer in the prefill's
            buffer, whose keys are read in place: then T is `k.rows`.
        start: position of the window's first row, int32 [B]; or of each row, ascending, int32
            [B, W], where rows at or beyond the length are not there.
        lengths: true length of each prompt, int32 [B].
        weights: how often each row's attention counts in the sums and the maxima, finite and not
            below 0, float32 [B, 1, W], or [B, K, W] for each kv head; once where it is None.
        threshold: p, the share of its row's maximum below which an entry counts as zeroed; None
            to count nothing.
        maxima: also give the largest entry of each column, head by head.
        scale: factor of the logits; 1 / sqrt(H) by default.
        backend: "triton", "xla", or None for the best that supports the case on the device.

    Raises:
        ValueError: the shapes do not fit each other.
        NotImplementedError: there is no such backend, or W * T is beyond what the counts hold.
    """
    batch, rows, heads, head_dim = q.shape
    if isinstance(k, LayerRows):
        k.check(q.shape)
        keys, kv_heads = k.rows, k.k.shape[1]
    else:
        if k.shape[0] != batch or k.shape[3] != head_dim:
            raise ValueError(f"{q.shape=}, {k.shape=}: expected [B, W, N, H] and [B, T, K, H]")
        keys, kv_heads = k.shape[1:3]
        check_heads(heads, kv_heads)
    if start.shape not in ((batch,), (batch, rows)) or lengths.shape != (batch,):
        raise ValueError(
            f"{start.shape=}, {lengths.shape=} must be {(batch,)}, or {(batch, rows)} of the start"
        )
    if weights is not None and weights.shape not in ((batch, 1, rows), (batch, kv_heads, rows)):
        raise ValueError(f"{weights.shape=}: expected [B, 1, W] or [B, K, W], of {q.shape=}")
    if threshold is not None and rows * keys >= 2**31:
        raise NotImplementedError(
            f"{rows} window rows of {keys} keys cannot be counted in 32 bits: use fewer "
            "rows, or no threshold"
        )
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    arrays = q, k, start, lengths
    settings = {"weights": weights, "threshold": threshold, "maxima": maxima, "scale": scale}
    scores, zeroed, highest = choose("window_scores", backend, BACKENDS, *arrays, **settings)
    if zeroed is None:
        return WindowScores(scores, None, None, highest)
    if start.ndim == 2:
        visible = jnp.where(start < lengths[:, None], start + 1, 0).sum(axis=1, dtype=jnp.int32)
    else:
        there = jnp.clip(lengths - start, 0, rows)  # rows, of which row i sees start + i + 1 keys
        visible = there * start + there * (there + 1) // 2
    return WindowScores(scores, zeroed, jnp.broadcast_to(visible[:, None], zeroed.shape), highest)


def average_pool(scores: jax.Array, last: jax.Array, kernel: int = 5) -> jax.Array:
    """SnapKV's smoothing: the mean over `kernel` neighbours, zeros counted at both ends.

    Args:
        scores: float32 [B, K, T].
        last: keys that take part, the first `last[b]` of each row, int32 [B]; the others become 0.
        kernel: odd number of neighbours.

    Raises:
        ValueError: `kernel` is even or below 1.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{kernel=} must be odd and at least 1")
    inside = jnp.arange(scores.shape[-1], dtype=jnp.int32) < last[:, None, None]
    scores = jnp.where(inside, scores, 0.0)
    side = (0, 0), (0, 0), (kernel // 2, kernel // 2)
    total = lax.reduce_window(scores, 0.0, lax.add, (1, 1, kernel), (1, 1, 1), side)
    return jnp.where(inside, total / kernel, 0.0)
