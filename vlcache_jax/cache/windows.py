"""Windows of rows, whose attention to the prompt's tokens scores and allocations watch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.window_scores import WindowScores
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.errors import whole_number

if TYPE_CHECKING:
    from vlcache_jax.cache.score import Layer

_MOST_SAMPLED = 2**15  # its square is a number of 32 bits


class Window:
    """The last rows of each prompt, which a score watches. Subclasses are frozen dataclasses.

    Attributes:
        maximum: the most rows of a prompt that it can have; None for all of them.
        continues: whether what was seen of its first rows can be continued with the rows behind,
            where a prompt is run in parts.
    """

    maximum: int | None = None
    continues: ClassVar[bool] = False

    def most(self, prompt: Prompt) -> int:
        """The most rows that a prompt of this bucket can have in the window: static."""
        return min(self.maximum or prompt.rows, prompt.rows)

    def rows(self, prompt: Prompt) -> jax.Array:
        """How many rows each prompt has in the window, int32 [B], from 1 to m."""
        return prompt.length

    def reach(self, length: int, last_visual: int) -> int | None:
        """How many of a prompt's last rows have to be run together; None for all of them.

        Args:
            length: of the prompt, m.
            last_visual: position of its last visual token, -1 where there is none.
        """
        return None if self.maximum is None else min(self.maximum, length)

    def basis(self, length: int, last_visual: int) -> int:
        """What the positions of rows that continue depend on; see `reach`."""
        return 0

    def watch(self, layer: "Layer", threshold: float | None, maxima: bool) -> WindowScores:
        """The attention that the rows pay to each token; `Layer.watch` remembers it."""
        prompt, q = layer.prompt, layer.q
        start = prompt.length - self.rows(prompt)
        if self.maximum is not None:
            most = min(self.most(prompt), q.shape[1])
            q = layer.queries(start[:, None] + jnp.arange(most, dtype=jnp.int32))
        return layer.attention(q, start, threshold, maxima)


@dataclass(frozen=True)
class PostVisionRows(Window):
    """tau: the rows after the visual tokens (VL-Cache, section 4.1).

    Choices of this library: with several images, the rows after the last visual token of the
    prompt; where no text follows the image or there is none, the last `fallback` rows; of a long
    question the last `maximum` rows; never more than there are.

    Attributes:
        fallback: rows where no text follows the last visual token.
        maximum: the most rows.

    Raises:
        ValueError: one of them is below 1.
    """

    fallback: int = 32
    maximum: int = 512

    def __post_init__(self):
        if self.fallback < 1 or self.maximum < 1:
            raise ValueError(
                f"fallback window {self.fallback} and longest window {self.maximum} "
                "must be at least 1"
            )

    def rows(self, prompt: Prompt) -> jax.Array:
        """See the class."""
        position = jnp.arange(prompt.rows, dtype=jnp.int32)
        last = jnp.max(jnp.where(prompt.visual, position, -1), axis=-1)
        after = jnp.where(last < 0, 0, prompt.length - 1 - last)
        rows = jnp.where(after > 0, after, self.fallback)
        return jnp.minimum(jnp.minimum(rows, self.maximum), prompt.length)

    def reach(self, length: int, last_visual: int) -> int:
        """Of one prompt, the same as `rows`."""
        after = length - 1 - last_visual if last_visual >= 0 else 0
        return min(after or self.fallback, self.maximum, length)


@dataclass(frozen=True)
class LastRows(Window):
    """SnapKV's window: `maximum` last rows, fewer where the budget is small (`Limits.window`)."""

    maximum: int = 32

    def __post_init__(self):
        if self.maximum < 1:
            raise ValueError(f"window={self.maximum} must be at least 1")

    def rows(self, prompt: Prompt) -> jax.Array:
        """See the class."""
        return prompt.budget.window(prompt.length, self.maximum)


class ScatteredRows(Window):
    """Rows that need not stand beside one another."""

    def position(self, prompt: Prompt) -> jax.Array:
        """Where each stands, ascending, from T on where there are no more, int32 [B, W]."""
        raise NotImplementedError(f"{type(self).__name__} does not say positions")

    def watch(self, layer: "Layer", threshold: float | None, maxima: bool) -> WindowScores:
        """See the class."""
        position = self.position(layer.prompt)
        return layer.attention(layer.queries(position), position, threshold, maxima)


class ContinuedRows(ScatteredRows):
    """Rows anywhere, whose sums are continued where a prompt is run in parts; maxima are not.

    Where they stand must not depend on rows behind them, but for `basis`.
    """

    continues = True

    def weights(self, prompt: Prompt) -> jax.Array | None:
        """How often each row counts, float32 [B, W]; once where it is None."""
        return None

    def reach(self, length: int, last_visual: int) -> int:
        """See the class."""
        return 1

    def watch(self, layer: "Layer", threshold: float | None, maxima: bool) -> WindowScores:
        """See the class."""
        if layer.part is None:
            return super().watch(layer, threshold, maxima)
        return jax.tree.map(jnp.add, self.add(layer, threshold), layer.part.before[self])

    def add(self, layer: "Layer", threshold: float | None) -> WindowScores:
        """The attention of those of the rows that the layer's part counts."""
        prompt, part = layer.prompt, layer.part
        assert part is not None
        position, weights = self.position(prompt), self.weights(prompt)
        most = position.shape[1]
        first = jnp.sum(position < part.counted[:, None], axis=1, keepdims=True)
        at = first + jnp.arange(min(most, layer.q.shape[1]), dtype=jnp.int32)
        own = jnp.take_along_axis(position, jnp.minimum(at, most - 1), axis=1)
        own = jnp.where((at < most) & (own < part.until[:, None]), own, prompt.rows)
        if weights is not None:
            weights = jnp.take_along_axis(weights, jnp.minimum(at, most - 1), axis=1)[:, None]
        return layer.attention(layer.queries(own), own, threshold, weights=weights)


@dataclass(frozen=True)
class RowsInFront(ContinuedRows):
    """Rows in front of the question's (`PostVisionRows`): the last ones, and some of all before.

    In most prompts the last of them is the last visual token's. Half of the count are the last
    rows, the other half the ends of equal pieces of all rows before these; all rows where there are
    no more. (A choice of this library.)

    Attributes:
        count: how many rows; even.

    Raises:
        ValueError: the count is no even whole number from 2 to 32,768.
    """

    count: int = 256

    def __post_init__(self):
        if _sampled(self.count, "count") % 2:
            raise ValueError(f"count={self.count} must be even")

    def position(self, prompt: Prompt) -> jax.Array:
        """See the class."""
        half, index = self.count // 2, jnp.arange(min(self.count, prompt.rows), dtype=jnp.int32)
        n = (prompt.length - PostVisionRows().rows(prompt))[:, None]
        before = jnp.maximum(n - half, 0)
        some = jnp.minimum(before, half)
        row = jnp.where(index < some, piece_ends(index, before, some), before + index - some)
        return jnp.where(row < n, row, prompt.rows)

    def basis(self, length: int, last_visual: int) -> int:
        """How many rows are in front."""
        return length - PostVisionRows().reach(length, last_visual)


def piece_ends(index: jax.Array, n: jax.Array, pieces: jax.Array) -> jax.Array:
    """The last row of each of so many equal pieces of n rows: (index + 1) * n // pieces - 1."""
    each = jnp.maximum(pieces, 1)
    # The product may be beyond 32 bits.
    return (index + 1) * (n // each) + (index + 1) * (n % each) // each - 1


def _sampled(rows: int, name: str) -> int:
    """A number of rows, that many pieces of which fit 32 bits.

    Raises:
        ValueError: it is no whole number from 1 to 32,768.
    """
    if whole_number(rows, name, 1) > _MOST_SAMPLED:
        raise ValueError(f"{name}={rows} must be at most {_MOST_SAMPLED}")
    return rows


@dataclass(frozen=True)
class AllRows(ContinuedRows):
    """Every row of the prompt, or rows that stand for all of them.

    With a `sample`, the n rows up to the last visual token (or a context's) are cut into that many
    pieces that differ by one row at most, and the last row of each stands for its piece: what it
    attends to counts n / sample times, so that the sum over all keys is that of every row. All rows
    behind stay themselves. Which rows are taken depends on n alone, not on the question behind.
    With n no more than the sample every row is taken. Counts of zeroed entries and maxima
    are those of the rows taken. (Choices of this library.)

    Attributes:
        sample: rows taken up to the last visual token; None for all.

    Raises:
        ValueError: it is no whole number from 1 to 32,768.
    """

    sample: int | None = None

    def __post_init__(self):
        if self.sample is not None:
            _sampled(self.sample, "sample")

    def taken(self, prompt: Prompt) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The rows that are watched, where `sample` is given.

        Returns:
            Their positions, ascending, int32 [B, T], from the length on where there are no more;
            s, how many of them are up to the last visual token, int32 [B]; and n, int32 [B].
        """
        assert self.sample is not None
        index = jnp.arange(prompt.rows, dtype=jnp.int32)
        n = jnp.max(jnp.where(prompt.visual, index + 1, 0), axis=1, keepdims=True)
        s = jnp.minimum(n, self.sample)
        position = jnp.where(index < s, piece_ends(index, n, s), n - s + index)
        return position, s[:, 0], n[:, 0]

    def position(self, prompt: Prompt) -> jax.Array:
        """See the class."""
        if self.sample is not None:
            return self.taken(prompt)[0]
        return jnp.broadcast_to(jnp.arange(prompt.rows, dtype=jnp.int32), prompt.visual.shape)

    def weights(self, prompt: Prompt) -> jax.Array | None:
        """See the class."""
        if self.sample is None:
            return None
        _, s, n = self.taken(prompt)
        each = n / jnp.maximum(s, 1).astype(jnp.float32)
        index = jnp.arange(prompt.rows, dtype=jnp.int32)
        return jnp.where(index < s[:, None], each[:, None], 1.0)

    def basis(self, length: int, last_visual: int) -> int:
        """How many rows are sampled."""
        return 0 if self.sample is None else last_visual + 1

    def watch(self, layer: "Layer", threshold: float | None, maxima: bool) -> WindowScores:
        """See the class."""
        if layer.part is not None:
            return super().watch(layer, threshold, maxima)
        weights = self.weights(layer.prompt)
        if weights is None:
            return layer.attention(layer.q, jnp.zeros_like(layer.prompt.length), threshold, maxima)
        position = self.position(layer.prompt)
        q = layer.queries(position)
        seen = layer.attention(q, position, threshold, weights=weights[:, None])
        if not maxima:
            return seen
        return seen._replace(maxima=layer.attention(q, position, maxima=True).maxima)
