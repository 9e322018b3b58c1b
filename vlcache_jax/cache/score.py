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
from jax import lax

from pallas_kernels.rows import LayerRows
from pallas_kernels.window_scores import WindowScores, average_pool, window_scores
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.select import recent_rows
from vlcache_jax.cache.windows import AllRows, LastRows, PostVisionRows, Window
from vlcache_jax.distributed import collectives
from vlcache_jax.errors import whole_number


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

    def reach(self, length: int, last_visual: int) -> int | None:
        """The window's; maxima are not continued, as they are told of a group's heads together."""
        if self.maxima and self.window.continues:
            return None
        return self.window.reach(length, last_visual)


def furthest(reaches: Iterable[int | None]) -> int | None:
    """The most rows that have to be run together, 1 at least; None, all of them, is the most."""
    found = list(reaches)
    return None if None in found else max((reach or 1 for reach in found), default=1)


def merged(looks: Iterable[Look]) -> tuple[Look, ...]:
    """One look for each window; of several thresholds the first."""
    wanted: dict[Window, Look] = {}
    for look in looks:
        old = wanted.get(look.window, look)
        threshold = look.threshold if old.threshold is None else old.threshold
        wanted[look.window] = Look(look.window, threshold, old.maxima or look.maxima)
    return tuple(wanted.values())


class Part(NamedTuple):
    """Where a layer runs some of a prompt's rows, behind rows that were run before.

        rows   0 . . . . . . start . . counted . . . . . until . . T
                             [ queries:     [ not seen before ] ]

    Attributes:
        keys: all rows of the layer up to the last of these.
        start: position of the first one, int32 [B].
        counted: how many rows of the prompt were seen before, int32 [B].
        until: where the rows end that are to be seen now, int32 [B].
        before: what was seen of windows that continue.
        salience: largest activation of each token seen before, float32 [B, T].
    """

    keys: LayerRows
    start: jax.Array
    counted: jax.Array
    until: jax.Array
    before: Mapping[Window, WindowScores]
    salience: jax.Array


@dataclass(frozen=True)
class Layer:
    """One decoder layer of the running prompt, after RoPE.

    Attributes:
        index: which layer it is.
        q: queries [B, T, N, H]; fewer where a `part` of the prompt is run.
        k: keys [B, T, K, H]; query head n reads kv head n // (N // K).
        v: values [B, T, K, H].
        prompt: the prompts; what stands beyond their lengths has no meaning.
        backend: backend of the window scores.
        entering: the residual stream in front of the layer, [B, T, D].
        seen: what was observed beforehand: threshold and scores, by window.
        part: which rows run now; None for all of them.
    """

    index: int
    q: jax.Array
    k: jax.Array
    v: jax.Array
    prompt: Prompt
    backend: str | None = None
    entering: jax.Array | None = None
    seen: Mapping[Window, tuple[float | None, WindowScores]] = field(default_factory=dict)
    part: Part | None = None

    def seeing(self, looks: Iterable[Look]) -> "Layer":
        """This layer with windows observed beforehand, each once for all that will `watch` it.

        Args:
            looks: what will be asked for; of several thresholds for a window, the first is counted.
        """
        seen = {
            look.window: (look.threshold, self.watch(*look))
            for look in merged(looks)
            if look.window not in self.seen
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
        return window.watch(self, threshold, maxima)

    def queries(self, position: jax.Array) -> jax.Array:
        """Queries of the rows at some positions [B, W], any where there is no row: [B, W, N, H]."""
        if self.part is not None:
            position = position - self.part.start[:, None]
        row = jnp.clip(position, 0, self.q.shape[1] - 1)
        return jnp.take_along_axis(self.q, row[:, :, None, None], axis=1)

    def salience(self) -> jax.Array:
        """Largest activation of each token in the stream that enters the layer, float32 [B, T].

        Raises:
            ValueError: the layer lacks the stream.
        """
        if self.entering is None:
            raise ValueError("pivots are found by the stream that enters a layer: give it")
        own, part = jnp.max(jnp.abs(self.entering), axis=-1).astype(jnp.float32), self.part
        if part is None:
            return own
        position = jnp.arange(self.prompt.rows, dtype=jnp.int32)
        here = position - part.start[:, None]  # [B, T]
        now = (position >= part.counted[:, None]) & (here < own.shape[1])
        here = jnp.clip(here, 0, own.shape[1] - 1)
        return jnp.where(now, jnp.take_along_axis(own, here, axis=1), part.salience)

    def attention(
        self,
        q: jax.Array,
        start: jax.Array,
        threshold: float | None = None,
        maxima: bool = False,
        weights: jax.Array | None = None,
    ) -> WindowScores:
        """What rows with these queries attend to; see `window_scores`."""
        settings = {"threshold": threshold, "maxima": maxima, "weights": weights}
        keys = self.k if self.part is None else self.part.keys
        arrays = q, keys, start, self.prompt.length
        return summed(window_scores(*arrays, **settings, backend=self.backend))


def summed(seen: WindowScores) -> WindowScores:
    """What was seen by all query heads of a group, where several devices share them."""
    scores = collectives.total(seen.scores, collectives.GROUP)
    maxima = seen.maxima
    if maxima is not None:
        maxima = collectives.total(maxima, collectives.GROUP)
    return seen._replace(scores=scores, maxima=maxima)


class Score:
    """A rule of what each token is worth. Subclass it as a frozen dataclass, or write a function.

    Attributes:
        window: the rows that the score watches; None where it watches none, or several windows.
        maxima: it asks for the largest attention to each token, not for the sum alone.
    """

    window: Window | None = None
    maxima: bool = False

    @property
    def looks(self) -> tuple[Look, ...]:
        """All windows of rows that the score watches, and what it asks of them."""
        return () if self.window is None else (Look(self.window, maxima=self.maxima),)

    def reach(self, length: int, last_visual: int) -> int | None:
        """How many of a prompt's last rows have to be run together; see `Window.reach`."""
        return furthest(look.reach(length, last_visual) for look in self.looks)

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

    window: Window = field(default=PostVisionRows())


def check_kernel(kernel: int) -> None:
    """Refuse a number of neighbours that has no middle.

    Raises:
        ValueError: it is even or below 1.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{kernel=} must be odd and at least 1")


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

    window: Window = field(default=PostVisionRows())
    kernel: int = 9
    maxima = True

    def __post_init__(self):
        super().__post_init__()
        check_kernel(self.kernel)

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

    window: Window = field(default=LastRows())
    kernel: int = 5

    def __post_init__(self):
        check_kernel(self.kernel)

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
        parts = collectives.shards(collectives.HEADS)
        every = parts * heads  # of all devices: a head draws what it does on one
        draws = jax.vmap(lambda key: jax.random.uniform(key, (every,), jnp.float32))(keys)  # [T, K]
        if parts > 1:
            first = collectives.number(collectives.HEADS) * heads
            draws = lax.dynamic_slice_in_dim(draws, first, heads, axis=1)
        return jnp.broadcast_to(draws.T, (batch, heads, rows))


@dataclass(frozen=True)
class ScoreFunction(RecentScore):
    """A user's score.

    Attributes:
        function: of a `Layer`; gives scores [B, K, T], the higher the better.
    """

    function: Callable[[Layer], jax.Array]

    def reach(self, length: int, last_visual: int) -> None:
        """It may look at any row."""

    def __call__(self, layer: Layer) -> jax.Array:
        """What the function says of the layer."""
        batch, rows, heads, _ = layer.k.shape
        scores = self.function(layer)
        if scores.shape != (batch, heads, rows):
            raise ValueError(
                f"the score has shape {scores.shape}, expected [B, K, T] = {(batch, heads, rows)}"
            )
        return scores.astype(jnp.float32)


SCORES: dict[str, Score] = {
    "post-vision": ColumnSum(PostVisionRows()),
    "row-maximum": RowMaximum(),
    "h2o": ColumnSum(AllRows(), recent_ratio=0.5),
    "snapkv": PooledWindow(),
    "streaming-llm": Ends(),
    "random": Noise(),
}
"""The scores by the name that `Custom` takes."""
