"""Scores made of other scores.

    Blend(a, b, weight)      (1 - weight) * a + weight * b, each as shares of its sum
    PowerMean(terms, power)  the mean of any number of them, of such shares
    ValueNorm(score)         times the norm of the token's value
    Pooled(score, kernel)    the mean over neighbouring tokens
    Diverse(score)           mixed with how little a token's key is like the others

Each takes any score, one of these among them: `Pooled(Blend(ColumnSum(), Blend(a, b)))`. Every
window of rows that one of the terms watches is observed once.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.window_scores import average_pool
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.score import (
    Layer,
    Look,
    RecentScore,
    Score,
    Window,
    check_kernel,
    furthest,
)

_LEAST, _LARGEST = np.float32(2.0**-120), np.float32(2.0**120)
"""Sums that a score is divided by: XLA multiplies by the inverse, which must be a normal number."""


def normalized(scores: jax.Array, inside: jax.Array) -> jax.Array:
    """Scores as shares of their sum over a prompt's tokens; the same for all where all are alike.

    Where some are negative the least of them becomes 0: the order stays. What is minus infinity or
    NaN is worth 0 too, and beside infinity nothing else is worth anything.

    Args:
        scores: real [..., T].
        inside: which of them are tokens, bool, broadcast to the scores.

    Returns:
        Float32 in their shape, 0 beyond the prompt's end. (That negative scores are shifted and
        equal ones are made equal shares are choices of this library.)
    """
    most = _LARGEST / scores.shape[-1]
    there = inside & (scores > -jnp.inf)
    worth = jnp.where(there, jnp.clip(scores.astype(jnp.float32), -most, most), 0.0)
    least = jnp.min(worth, axis=-1, keepdims=True)
    worth = jnp.where(there, worth - jnp.minimum(least, 0.0), 0.0)
    total = jnp.sum(worth, axis=-1, keepdims=True)
    even = inside / jnp.sum(inside, axis=-1, keepdims=True, dtype=jnp.float32)
    differ = total > _LEAST
    return jnp.where(differ, worth / jnp.where(differ, total, 1.0), even)


def scores_of(score: Score, layer: Layer) -> jax.Array:
    """A score's numbers, float32 [B, K, T].

    Raises:
        ValueError: it has none, as position alone decides.
    """
    found = score(layer)
    if found is None:
        raise ValueError(
            f"{type(score).__name__} keeps tokens by their position alone: give a score that says "
            "what each is worth"
        )
    return found


class Several(RecentScore):
    """A score of several others, each `normalized` first, so that it has sum 1 over the prompt.

    What the terms themselves always keep is not kept for that: `recent_ratio` is its own.
    """

    terms: tuple[Score, ...]

    @property
    def looks(self) -> tuple[Look, ...]:
        """Those of all terms."""
        return tuple(dict.fromkeys(look for term in self.terms for look in term.looks))

    @property
    def window(self) -> Window | None:
        """The window of all terms, where it is one."""
        windows = {look.window for look in self.looks}
        return windows.pop() if len(windows) == 1 else None

    def reach(self, length: int, last_visual: int) -> int | None:
        """The furthest of all terms."""
        return furthest(term.reach(length, last_visual) for term in self.terms)

    def shares(self, layer: Layer) -> list[jax.Array]:
        """What each term gives each token, float32 [B, K, T]."""
        inside = layer.prompt.inside[:, None, :]
        return [normalized(scores_of(term, layer), inside) for term in self.terms]


@dataclass(frozen=True)
class Blend(Several):
    """Two scores as one: (1 - weight) * a + weight * b, per kv head.

    Attributes:
        a: the first score.
        b: the second one; either may be a blend itself.
        weight: share of the second one, 0 to 1.
        recent_ratio: as in `RecentScore`.

    Raises:
        ValueError: the weight or the ratio is not from 0 to 1.
    """

    a: Score
    b: Score
    weight: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight} must be from 0 to 1")

    @property
    def terms(self) -> tuple[Score, ...]:
        """Both."""
        return self.a, self.b

    def __call__(self, layer: Layer) -> jax.Array:
        """See the class."""
        a, b = self.shares(layer)
        return (1 - self.weight) * a + self.weight * b


@dataclass(frozen=True)
class PowerMean(Several):
    """Several scores as one: (weighted mean of share ** power) ** (1 / power), per kv head.

    With a power below 1 a token that all terms find good comes before one that a single term finds
    very good: agreement counts. With 1 it is the mean. (A choice of this library.)

    Attributes:
        terms: the scores.
        power: above 0.
        weights: of the terms, above 0; all alike where there are none.
        recent_ratio: as in `RecentScore`.

    Raises:
        ValueError: there are no terms, not as many weights, or a number is out of range.
    """

    terms: tuple[Score, ...]
    power: float = 0.5
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not self.terms:
            raise ValueError("terms must be one score or more")
        if not 0 < self.power < float("inf"):
            raise ValueError(f"power={self.power} must be above 0")
        if self.weights and len(self.weights) != len(self.terms):
            raise ValueError(f"{len(self.weights)} weights for {len(self.terms)} terms")
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"weights={self.weights} must be above 0")

    def __call__(self, layer: Layer) -> jax.Array:
        """See the class."""
        weights = self.weights or (1.0,) * len(self.terms)
        parts = [
            weight / sum(weights) * share**self.power
            for weight, share in zip(weights, self.shares(layer), strict=True)
        ]
        return sum(parts[1:], parts[0]) ** (1 / self.power)


@dataclass(frozen=True)
class Changed(Score):
    """A score that changes another one's numbers: it watches and always keeps what that one does.

    Attributes:
        score: the other one.
    """

    score: Score

    @property
    def looks(self) -> tuple[Look, ...]:
        """The other one's."""
        return self.score.looks

    @property
    def window(self) -> Window | None:
        """The other one's."""
        return self.score.window

    def reach(self, length: int, last_visual: int) -> int | None:
        """The other one's."""
        return self.score.reach(length, last_visual)

    def always(self, rows: jax.Array, prompt: Prompt) -> tuple[jax.Array, jax.Array]:
        """What the other one always keeps."""
        return self.score.always(rows, prompt)


@dataclass(frozen=True)
class ValueNorm(Changed):
    """A score times the norm of each token's value, per kv head: what attention hands on.

    For scores that are not negative.
    """

    def __call__(self, layer: Layer) -> jax.Array:
        """See the class."""
        norm = jnp.linalg.norm(layer.v.astype(jnp.float32), axis=-1)  # [B, T, K]
        return scores_of(self.score, layer) * norm.swapaxes(1, 2)


@dataclass(frozen=True)
class Pooled(Changed):
    """A score averaged over neighbouring tokens, as SnapKV's: zeros counted at the prompt's ends.

    Attributes:
        kernel: neighbours of the average, the token among them, an odd number.

    Raises:
        ValueError: `kernel` is out of range.
    """

    kernel: int = 5

    def __post_init__(self):
        check_kernel(self.kernel)

    def __call__(self, layer: Layer) -> jax.Array:
        """See the class."""
        return average_pool(scores_of(self.score, layer), layer.prompt.length, self.kernel)


@dataclass(frozen=True)
class Diverse(Changed):
    """MixKV (arXiv 2510.20707): a score, and how little a token's key is like the other keys.

    Per kv head (1 - r) * importance + r * diversity. The importance is the score times the norm of
    the value, the diversity -(k_hat . mean of k_hat) with k_hat = k / |k|; both are scaled to 0..1
    over the prompt's tokens (all 0 where they are alike). r is the mean cosine of two keys, so that
    diversity counts most where keys are alike. Choices of this library: r is at least 0, and 0 for
    a single token; keys are those after RoPE.
    """

    def __call__(self, layer: Layer) -> jax.Array:
        """See the class."""
        inside, m = layer.prompt.inside, layer.prompt.length.astype(jnp.float32)[:, None]
        keys = jnp.where(inside[:, :, None, None], layer.k.astype(jnp.float32), 0.0)
        norm = jnp.linalg.norm(keys, axis=-1, keepdims=True)
        keys = keys / jnp.where(norm > 0, norm, 1.0)  # [B, T, K, H]
        mean = jnp.sum(keys, axis=1) / m[..., None]  # [B, K, H]
        alike = jnp.einsum("btkh,bkh->bkt", keys, mean, precision=jax.lax.Precision.HIGHEST)
        cosine = (m * jnp.sum(mean**2, axis=-1) - 1) / jnp.maximum(m - 1, 1)
        r = jnp.where(m > 1, jnp.clip(cosine, 0.0, 1.0), 0.0)[..., None]
        inside = inside[:, None, :]
        importance = _unit(ValueNorm(self.score)(layer), inside)
        return (1 - r) * importance + r * _unit(-alike, inside)


def _unit(scores: jax.Array, inside: jax.Array) -> jax.Array:
    """Scores of tokens scaled to 0..1, all 0 where they are alike; 0 beyond a prompt's end."""
    least = jnp.min(jnp.where(inside, scores, jnp.inf), axis=-1, keepdims=True)
    span = jnp.max(jnp.where(inside, scores, -jnp.inf), axis=-1, keepdims=True) - least
    return jnp.where(inside & (span > 0), (scores - least) / jnp.where(span > 0, span, 1.0), 0.0)
