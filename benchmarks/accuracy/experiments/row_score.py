"""VL-Cache's score with every step of it as a setting.

It looks at the post-vision attention row by row and head by head, which VL-Cache has no need to:
for prompts of a few hundred tokens.

    attention [B, K, G, W, T] ─► rows, weighted ─► heads of a group ─► kv heads ─► neighbours
                                 sum or max        sum or max          own or max   mean
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.window_scores import average_pool
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.score import Layer, PostVisionRows, RecentScore
from vlcache_jax.cache.select import recent_rows


@dataclass(frozen=True)
class RowScore(RecentScore):
    """See the module; with its defaults it is VL-Cache's score.

    Attributes:
        rows: how a column's attention becomes one number.
        group: likewise over the query heads of a kv head.
        heads: "max" gives every kv head the largest score of all of them.
        last: so many of the last post-vision rows are looked from.
        half_life: a row counts half of one that stands so many rows behind it; None: all alike.
        pool: neighbours that a score is averaged over, an odd number.
        question: the post-vision tokens are kept, up to this share of a layer's budget.
        recent_ratio: as in `RecentScore`.

    Raises:
        ValueError: a setting is out of range.
    """

    rows: Literal["sum", "max"] = "sum"
    group: Literal["sum", "max"] = "sum"
    heads: Literal["own", "max"] = "own"
    last: int = 128
    half_life: float | None = None
    pool: int = 1
    question: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        PostVisionRows(maximum=self.last)
        if self.half_life is not None and self.half_life <= 0:
            raise ValueError(f"half_life={self.half_life} must be above 0")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd and at least 1")
        if not 0 <= self.question <= 1:
            raise ValueError(f"question={self.question} must be from 0 to 1")

    @property
    def window(self) -> PostVisionRows:
        """The rows behind the last picture."""
        return PostVisionRows(maximum=self.last)

    def __call__(self, layer: Layer) -> jax.Array:
        """See the class; `Layer.watch` would give a sum already."""
        weights, age = row_attention(layer, self.window)
        if self.half_life is not None:
            weight = 0.5 ** (jnp.maximum(age, 0) / self.half_life)  # [B, W]
            weights *= weight[:, None, None, :, None]
        scores = _reduce(_reduce(weights, self.rows, 3), self.group, 2)  # [B, K, T]
        if self.heads == "max":
            scores = jnp.broadcast_to(jnp.max(scores, axis=1, keepdims=True), scores.shape)
        return average_pool(scores, layer.prompt.length, self.pool) if self.pool > 1 else scores

    def always(self, rows: jax.Array, prompt: Prompt) -> tuple[jax.Array, jax.Array]:
        """The last tokens: the recent ones, or as much of the question as may be kept."""
        first, last = super().always(rows, prompt)
        if self.question:
            asked = PostVisionRows().rows(prompt)[:, None]
            last = jnp.maximum(last, jnp.minimum(recent_rows(rows, self.question), asked))
        return first, last


def row_attention(layer: Layer, window: PostVisionRows) -> tuple[jax.Array, jax.Array]:
    """The attention that each row of a window pays, and how many rows stand behind it.

    Returns:
        Attention, float32 [B, K, G, W, T], 0 for rows that are not there; ages, int32 [B, W].
    """
    prompt, (batch, keys, kv_heads, width) = layer.prompt, layer.k.shape
    start = prompt.length - window.rows(prompt)
    position = start[:, None] + jnp.arange(window.most(prompt))
    row = jnp.minimum(position, keys - 1)
    q = jnp.take_along_axis(layer.q, row[:, :, None, None], axis=1)
    q = q.reshape(batch, -1, kv_heads, layer.q.shape[2] // kv_heads, width)
    logits = jnp.einsum(
        "bwkgh,btkh->bkgwt",
        q.astype(jnp.float32),
        layer.k.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    ) / math.sqrt(width)
    seen = jnp.arange(keys) <= position[:, :, None]  # [B, W, T]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -jnp.inf), axis=-1)
    age = prompt.length[:, None] - 1 - position
    there = (age >= 0)[:, None, None, :, None]
    return jnp.where(there, weights, 0.0), age


def _reduce(values: jax.Array, how: Literal["sum", "max"], axis: int) -> jax.Array:
    return jnp.sum(values, axis) if how == "sum" else jnp.max(values, axis)
