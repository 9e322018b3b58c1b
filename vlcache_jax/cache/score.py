"""What each prompt token is worth, by the attention that the prompt itself pays to it.

A score is called once for every layer while the prompt runs, with a `Layer`: its queries, keys and
values. Most scores watch a window of rows: the attention that those rows pay to each key, summed
block by block, never as a T x T matrix. A method observes each window of its rules once, and hands
what was seen to the score and to the allocation.

    keys     0 . . . . . . . . . . . . . m      a window is the last rows of a prompt:
    window                  [ - - - - - ]       how many is data, the most there may be is static
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.window_scores import WindowScores, average_pool, window_scores
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.select import recent_rows
from vlcache_jax.errors import whole_number


class Window:
    """The last rows of each prompt, which a score watches. Subclasses are frozen dataclasses.

    Attributes:
        maximum: the most rows of a prompt that it can have; None for all of them.
    """

    maximum: int | None = None

    def most(self, prompt: Prompt) -> int:
        """The most rows that a prompt of this bucket can have in the window: static."""
        return min(self.maximum or prompt.rows, prompt.rows)

    def rows(self, prompt: Prompt) -> jax.Array:
        """How many rows each prompt has in the window, int32 [B], from 1 to m."""
        return prompt.length


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


@dataclass(frozen=True)
class AllRows(Window):
    """Every row of the prompt."""


class Look(NamedTuple):
    """What is to be observed of a window's attention, beside its column sums.

    Attributes:
        window: the rows.
        threshold: the entries below that share of their row's maximum are counted; None for none.
        maxima: each column's largest entry too.
    """

    window: Window
    threshold: float | None = None
    maxima: bool = False


@dataclass(frozen=True)
class Layer:
    """One decoder layer of the running prompt, after RoPE.

    Attributes:
        index: which layer it is.
        q: queries [B, T, N, H].
        k: keys [B, T, K, H]; query head n reads kv head n // (N // K).
        v: values [B, T, K, H].
        prompt: the prompts; what stands beyond their lengths has no meaning.
        backend: backend of the window scores.
        entering: the residual stream in front of the layer, [B, T, D].
        seen: what was observed beforehand: threshold and scores, by window.
    """

    index: int
    q: jax.Array
    k: jax.Array
    v: jax.Array
    prompt: Prompt
    backend: str | None = None
    entering: jax.Array | None = None
    seen: Mapping[Window, tuple[float | None, WindowScores]] = field(default_factory=dict)

    def seeing(self, looks: Iterable[Look]) -> "Layer":
        """This layer with windows observed beforehand, each once for all that will `watch` it.

        Args:
            looks: what will be asked for; of several thresholds for a window, the first is counted.
        """
        wanted: dict[Window, Look] = {}
        for look in looks:
            old = wanted.get(look.window, look)
            threshold = look.threshold if old.threshold is None else old.threshold
            wanted[look.window] = Look(look.window, threshold, old.maxima or look.maxima)
        seen = {
            window: (look.threshold, self.watch(*look))
            for window, look in wanted.items()
            if window not in self.seen
        }
        return replace(self, seen={**self.seen, **seen})

    def watch(
        self, window: Window, threshold: float | None = None, maxima: bool = False
    ) -> WindowScores:
        """The attention that a window's rows pay to each token.

        Args:
            window: the rows.
            threshold: also count the entries below that share of their row's maximum.
            maxima: also give each column's largest entry.
        """
        counted, found = self.seen.get(window, (None, None))
        known = threshold in (counted, None)
        if found is not None and known and not (maxima and found.maxima is None):
            return found
        prompt, q = self.prompt, self.q
        start = prompt.length - window.rows(prompt)
        if window.maximum is not None:
            row = jnp.minimum(
                start[:, None] + jnp.arange(window.most(prompt), dtype=jnp.int32), prompt.rows - 1
            )
            q = jnp.take_along_axis(q, row[:, :, None, None], axis=1)  # [B, W, N, H]
        settings = {"threshold": threshold, "maxima": maxima, "backend": self.backend}
        return window_scores(q, self.k, start, prompt.length, **settings)


class Score:
    """A rule of what each token is worth. Subclass it as a frozen dataclass, or write a function.

    Attributes:
        window: the rows that the score watches; None where it watches none.
        maxima: it asks for the largest attention to each token, not for the sum alone.
    """

    window: Window | None = None
    maxima: bool = False

    def __call__(self, layer: Layer) -> jax.Array | None:
        """The score of each token, float32 [B, K, T]; None where position alone decides.

        By default it is the attention that the rows of the window pay to each token, summed.
        """
        return None if self.window is None else layer.watch(self.window).scores

    def always(self, rows: jax.Array, prompt: Prompt) -> tuple[jax.Array, jax.Array]:
        """How many of the `rows` [B, L] that layers keep are a prompt's first and its last ones."""
        return jnp.zeros_like(rows), jnp.zeros_like(rows)


@dataclass(frozen=True, kw_only=True)
class RecentScore(Score):
    """A score beside which a share of each layer's budget goes to the prompt's last tokens.

    Attributes:
        recent_ratio: that share, 0 to 1.

    Raises:
        ValueError: it is not from 0 to 1.
    """

    recent_ratio: float = 0.1

    def __post_init__(self):
        if not 0 <= self.recent_ratio <= 1:
            raise ValueError(f"recent_ratio={self.recent_ratio} must be from 0 to 1")

    def always(self, rows: jax.Array, prompt: Prompt) -> tuple[jax.Array, jax.Array]:
        """The last tokens."""
        return jnp.zeros_like(rows), recent_rows(rows, self.recent_ratio)


@dataclass(frozen=True)
class ColumnSum(RecentScore):
    """The attention that a window of rows pays to each token, summed.

    With `PostVisionRows` it is VL-Cache's accumulated score (section 4.3), with `AllRows` that of
    H2O at the end of a prefill. The score of a kv head is the sum over its query heads (a choice of
    this library); image and text tokens compete in one ranking.

    Attributes:
        window: the rows.
    """

    window: Window = PostVisionRows()


@dataclass(frozen=True)
class RowMaximum(RecentScore):
    """The largest attention that any row of a window pays to each token, averaged over neighbours.

    A sum forgets the one row that looked for a token; what stands beside a token that was looked at
    is likely to be read next. It is this library's own score (docs/accuracy.md). That of a kv head
    is the sum of its query heads' maxima; image and text tokens compete in one ranking.

    Attributes:
        window: the rows.
        kernel: neighbours of the average, an odd number; beyond a prompt's ends there are zeros.

    Raises:
        ValueError: `kernel` is out of range.
    """

    window: Window = PostVisionRows()
    kernel: int = 9
    maxima = True

    def __post_init__(self):
        super().__post_init__()
        _check_kernel(self.kernel)

    def __call__(self, layer: Layer) -> jax.Array:
        """See the class."""
        maxima = layer.watch(self.window, maxima=True).maxima
        assert maxima is not None  # they were asked for
        return average_pool(maxima, layer.prompt.length, self.kernel)


@dataclass(frozen=True)
class PooledWindow(Score):
    """SnapKV's score: the attention of the last rows, averaged over neighbouring tokens.

    The columns before the window are summed over the window's rows and the heads of a group, then
    averaged; the window's own tokens are always kept.

    Attributes:
        window: the rows.
        kernel: neighbours of the average, an odd number.

    Raises:
        ValueError: `kernel` is out of range.
    """

    window: Window = LastRows()
    kernel: int = 5

    def __post_init__(self):
        _check_kernel(self.kernel)

    def __call__(self, layer: Layer) -> jax.Array:
        """See the class."""
        before = layer.prompt.length - self.window.rows(layer.prompt)
        return average_pool(layer.watch(self.window).scores, before, self.kernel)

    def always(self, rows: jax.Array, prompt: Prompt) -> tuple[jax.Array, jax.Array]:
        """The window."""
        return jnp.zeros_like(rows), jnp.minimum(rows, self.window.rows(prompt)[:, None])


@dataclass(frozen=True)
class Ends(Score):
    """StreamingLLM: the first tokens and the last ones, whatever the attention.

    Attributes:
        sinks: first tokens; half of the budget where that is less.

    Raises:
        ValueError: it is negative.
    """

    sinks: int = 4

    def __post_init__(self):
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must not be negative")

    def always(self, rows: jax.Array, prompt: Prompt) -> tuple[jax.Array, jax.Array]:
        """The sinks, and the rest of the budget at the end."""
        first = jnp.minimum(self.sinks, rows // 2)
        return first, rows - first


@dataclass(frozen=True)
class Noise(RecentScore):
    """Random scores in [0, 1): the control of every comparison.

    The draw depends on the layer, the head and the position alone, so that a prompt keeps the same
    tokens in any batch and any bucket.

    Attributes:
        seed: of the draws, an integer; taken modulo 2**32.

    Raises:
        ValueError: it is no integer.
    """

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        whole_number(self.seed, "seed")

    def __call__(self, layer: Layer) -> jax.Array:
        """See the class."""
        batch, rows, heads, _ = layer.k.shape
        # The seed's type is given: that of a Python number depends on how JAX is set.
        key = jax.random.fold_in(jax.random.key(np.uint32(self.seed % 2**32)), layer.index)
        keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(
            jnp.arange(rows, dtype=jnp.int32)
        )
        draws = jax.vmap(lambda key: jax.random.uniform(key, (heads,), jnp.float32))(keys)  # [T, K]
        return jnp.broadcast_to(draws.T, (batch, heads, rows))


@dataclass(frozen=True)
class ScoreFunction(RecentScore):
    """A user's score.

    Attributes:
        function: of a `Layer`; gives scores [B, K, T], the higher the better.
    """

    function: Callable[[Layer], jax.Array]

    def __call__(self, layer: Layer) -> jax.Array:
        """What the function says of the layer."""
        batch, rows, heads, _ = layer.k.shape
        scores = self.function(layer)
        if scores.shape != (batch, heads, rows):
            raise ValueError(
                f"the score has shape {scores.shape}, expected [B, K, T] = {(batch, heads, rows)}"
            )
        return scores.astype(jnp.float32)


def _check_kernel(kernel: int) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{kernel=} must be odd and at least 1")


SCORES: dict[str, Score] = {
    "post-vision": ColumnSum(PostVisionRows()),
    "row-maximum": RowMaximum(),
    "h2o": ColumnSum(AllRows(), recent_ratio=0.5),
    "snapkv": PooledWindow(),
    "streaming-llm": Ends(),
    "random": Noise(),
}
"""The scores by the name that `Custom` takes."""
