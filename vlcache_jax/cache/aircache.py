"""AirCache (Huang et al., ICCV 2025, arXiv 2503.23956): a few rows speak for the question.

    text behind the pictures ─► elite rows ─► their attention among visual and elite keys ─► scores
                                              strength and skewness of these ─► layers

All text is kept, as far as half of a layer's budget has room (`keep_text`), and visual tokens are
ranked for what is left. There is no official code; what the paper leaves open is marked as a choice
of this library.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.window_scores import window_scores
from vlcache_jax.cache.allocate import Allocation, parts
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.score import Layer, Score, summed
from vlcache_jax.cache.select import last_marked
from vlcache_jax.cache.windows import PostVisionRows
from vlcache_jax.distributed.collectives import HEADS, mean, total


@dataclass(frozen=True)
class EliteRows(Score):
    """What visual tokens are worth to the rows that the end of the question attends to most.

    The last row's attention among the text tokens, the mean over the query heads, names the elite:
    rows that have at least `share` of the largest, and the last row itself. A visual token's score
    is the mean over the elite of their attention to it, in a softmax over the visual and the elite
    tokens alone. Text has score 0.

    Choices of this library: only text behind the last visual token may be elite, of a long question
    the last 512 rows; a prompt's first token, a sink, does not count for the largest; where no text
    follows, the last row alone is looked from; the score of a kv head is the sum over its query
    heads.

    Attributes:
        share: of the largest attention, from which on a row is elite.

    Raises:
        ValueError: it is not above 0 and at most 1.
    """

    share: float = 0.9

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1")

    def reach(self, length: int, last_visual: int) -> int:
        """The rows that may be elite, and the last one."""
        return max(1, min(PostVisionRows().maximum, length - 1 - last_visual))

    def elite(self, layer: Layer) -> jax.Array:
        """Which tokens are elite, bool [B, T]."""
        prompt, (batch, rows, heads, _) = layer.prompt, layer.k.shape
        position = jnp.arange(rows, dtype=jnp.int32)
        last = layer.queries(prompt.length[:, None] - 1).astype(jnp.float32)
        last = last.reshape(batch, heads, -1, last.shape[-1])
        precision = jax.lax.Precision.HIGHEST
        logits = jnp.einsum(
            "bkgh,btkh->bkgt", last, layer.k.astype(jnp.float32), precision=precision
        )
        logits *= layer.k.shape[-1] ** -0.5
        text = prompt.text[:, None, None, :]
        weights = jax.nn.softmax(jnp.where(text, logits, -1e30), axis=-1)
        weights = jnp.where(prompt.text, mean(jnp.mean(weights, axis=(1, 2))), 0.0)
        last_visual = jnp.max(jnp.where(prompt.visual, position, -1), axis=1, keepdims=True)
        most, end = PostVisionRows().most(prompt), prompt.length[:, None]
        behind = prompt.text & (position > last_visual) & (position >= end - most)
        largest = jnp.max(jnp.where(behind & (position > 0), weights, 0.0), axis=1, keepdims=True)
        return behind & ((weights >= self.share * largest) | (position == end - 1))

    def __call__(self, layer: Layer) -> jax.Array:
        """See the class."""
        prompt, elite = layer.prompt, self.elite(layer)
        # With the visual keys in front and the elite behind them, the elite are a window's rows.
        kind = jnp.where(prompt.visual, 0, jnp.where(elite, 1, 2))
        order = jnp.argsort(kind, axis=1, stable=True)
        visual, rows = (jnp.sum(each, axis=1, dtype=jnp.int32) for each in (prompt.visual, elite))
        start = visual - (rows == 0)  # the last row is a visual one
        most = min(PostVisionRows().most(prompt), layer.q.shape[1])
        place = start[:, None] + jnp.arange(most, dtype=jnp.int32)
        at = jnp.take_along_axis(order, jnp.minimum(place, prompt.rows - 1), axis=1)
        seen = summed(
            window_scores(
                layer.queries(at),
                jnp.take_along_axis(layer.k, order[:, :, None, None], axis=1),
                start,
                visual + rows,
                backend=layer.backend,
            )
        )
        rank = jnp.argsort(order, axis=1)
        scores = jnp.take_along_axis(seen.scores, rank[:, None, :], axis=2)
        return jnp.where(prompt.visual[:, None], scores / jnp.maximum(rows, 1)[:, None, None], 0.0)


@dataclass(frozen=True)
class StrengthAndSkewness(Allocation):
    """AirCache's rule: layers that look at visual tokens strongly, and at few of them, have more.

    Of the scores I of a layer's N visual tokens, summed over its heads, the strength is the sum and
    the skewness N / ((N - 1) (N - 2)) * sum(((I - mean) / std)^3). Beside the text, a layer's size
    is the visual tokens' even share times the mean of both, each divided by its mean over the
    layers. Choices of this library: negative skewness counts as 0, as does that of fewer than three
    tokens or of equal ones; std is that of a sample; where all layers have 0, they are equal.
    """

    by_scores: ClassVar[bool] = True

    def sizes(self, prompt: Prompt, measured: jax.Array) -> jax.Array:
        """See the class."""
        visual = prompt.visual[:, None, :]
        n = jnp.sum(visual, axis=-1).astype(jnp.float32)  # [B, 1]
        worth = total(jnp.sum(measured, axis=2), HEADS)
        worth = jnp.where(visual, worth, 0.0)  # [B, L, T]
        strength = jnp.sum(worth, axis=-1)
        apart = jnp.where(visual, worth - (strength / jnp.maximum(n, 1))[..., None], 0.0)
        deviation = jnp.sqrt(jnp.sum(apart**2, axis=-1) / jnp.maximum(n - 1, 1))
        spread = deviation > 1e-6 * strength / jnp.maximum(n, 1)
        scaled = apart / jnp.where(spread, deviation, 1.0)[..., None]
        skewness = n * jnp.sum(scaled**3, axis=-1) / jnp.maximum((n - 1) * (n - 2), 1)
        skewness = jnp.where(spread & (n > 2), jnp.maximum(skewness, 0.0), 0.0)
        even = prompt.budget.even_rows(prompt.length)[:, None]
        text = last_marked(prompt.text, jnp.maximum(even // 2, 1))
        text = jnp.sum(text, axis=-1).astype(jnp.float32)
        rate = (parts(strength) + parts(skewness)) / 2 * prompt.layers
        return text + (even.astype(jnp.float32) - text) * rate


@dataclass(frozen=True)
class AirCache(CacheMethod):
    """AirCache (Huang et al., 2025): text first, then what the question's elite rows look at.

    Attributes:
        share: of the largest attention, from which on a row is elite.
    """

    name: ClassVar[str] = "aircache"

    share: float = 0.9
    keep_text: bool = field(default=True, kw_only=True)

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        return EliteRows(self.share), StrengthAndSkewness()
