"""How many prompt tokens each layer keeps.

An allocation is two steps. A rule gives every layer a real-valued size x[l]: `Sparsity` for
VL-Cache, `Uniform`, `Pyramid`, `GlobalBest`, or a function of the user's own. `allocate` turns the
sizes into whole numbers k[l] whose sum never exceeds what the pool was made for; for a budget in
tokens it is exactly that. All of it is float32 and int32 data: the same program serves every
prompt.

Shapes: sizes and budgets [B, L]; m, the true prompt lengths, int32 [B].
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from vlcache_jax.cache.blended import normalized
from vlcache_jax.cache.budget import Limits, Prompt
from vlcache_jax.cache.score import Layer, PostVisionRows, Window
from vlcache_jax.cache.select import largest
from vlcache_jax.distributed.collectives import HEADS, mean

_MOST = 2**23  # sizes beyond any prompt's length; whole numbers up to here are exact in float32


class Allocation:
    """A rule that gives every layer a size. Subclass it as a frozen dataclass, or write a function.

    Attributes:
        window: the rows whose attention is measured; None where nothing is.
        threshold: p, the share of its row's maximum below which an entry counts as zeroed; None
            where nothing is counted.
        by_scores: whether the rule is shown the method's scores in place of measures.
    """

    window: Window | None = None
    threshold: float | None = 0.01
    by_scores: ClassVar[bool] = False

    def measure(self, layer: Layer) -> jax.Array | None:
        """The sparsity gamma' of a layer of the running prompt, float32 [B]; None without a window.

        The share of zeroed entries among the visible ones, the mean over the query heads.
        """
        if self.window is None:
            return None
        seen = layer.watch(self.window, self.threshold)
        assert seen.zeroed is not None  # a threshold was given
        assert seen.visible is not None
        share = seen.zeroed / jnp.maximum(seen.visible, 1)
        return mean(jnp.mean(share, axis=-1, dtype=jnp.float32))

    def sizes(self, prompt: Prompt, measured: jax.Array | None) -> jax.Array:
        """The layers' sizes in tokens, float32 [B, L].

        Args:
            prompt: the prompts.
            measured: the measures of all layers, float32 [B, L], or of a rule `by_scores` what each
                token is worth, float32 [B, L, K, T]; None where there are none.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say sizes")


@dataclass(frozen=True)
class Sparsity(Allocation):
    """VL-Cache's rule: a layer whose post-vision attention is denser is given more (section 4.2).

    beta[l] = clip((1 - gamma'[l]) / sum_k (1 - gamma'[k]) * alpha * L, 0.01, 1). The paper does not
    say what happens when all layers are wholly sparse; here each is then given the same.

    The paper's budgets are shares. Of one in tokens, N of a prompt of m, the floor is
    min(0.01, 0.1 * N / m), and what the clip adds is always taken back (choices of this library).

    Attributes:
        renormalize: hand out again what the clip cut off, so that the shares add up to alpha * L
            (not in the paper).

    Raises:
        ValueError: the threshold is out of range.
    """

    renormalize: bool = False
    window: Window = field(default=PostVisionRows())
    threshold: float = 0.01

    def __post_init__(self):
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must be between 0 and 1")

    def beta(self, prompt: Prompt, measured: jax.Array) -> jax.Array:
        """Each layer's share of the prompt, float32 [B, L], from the sparsity gamma' [B, L]."""
        part, budget, m = parts(1.0 - measured.astype(jnp.float32)), prompt.budget, prompt.length
        floor, wanted = budget.floor(m)[:, None], budget.shares(m)[:, None] * prompt.layers
        again = (budget.tokens > 0) | self.renormalize
        return _where_any(
            jnp.broadcast_to(again, m.shape)[:, None],
            lambda: _renormalized(part, wanted, floor, 1.0),
            jnp.clip(part * wanted, floor, 1.0),
        )

    def sizes(self, prompt: Prompt, measured: jax.Array) -> jax.Array:
        """The shares times m."""
        return self.beta(prompt, measured) * prompt.length[:, None].astype(jnp.float32)


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same size for every layer."""

    def sizes(self, prompt: Prompt, measured: jax.Array | None) -> jax.Array:
        """C everywhere."""
        size = prompt.budget.even_rows(prompt.length).astype(jnp.float32)
        return jnp.broadcast_to(size[:, None], (*size.shape, prompt.layers))


@dataclass(frozen=True)
class Pyramid(Allocation):
    """PyramidKV's rule: sizes that fall linearly from the first layer to the last, plus the window.

    With B = C - w: min = B // slope, max = 2 B - min; the mean over the layers is C. Choices of
    this library: w shrinks with the budget (`Limits.window`); a max beyond the m - w rows that
    there are is cut, and min raised so that the mean stays C; a single layer is given C.

    Attributes:
        always: w, last rows that are always kept, on top of the pyramid.
        slope: PyramidKV's beta: the last layer's size is the mean divided by it.

    Raises:
        ValueError: one of them is below 1.
    """

    always: int = 32
    slope: int = 20

    def __post_init__(self):
        if self.always < 1 or self.slope < 1:
            raise ValueError(f"window={self.always} and slope={self.slope} must be at least 1")

    def sizes(self, prompt: Prompt, measured: jax.Array | None) -> jax.Array:
        """See the class."""
        size, layers = prompt.budget.even_rows(prompt.length), prompt.layers
        if layers == 1:
            return size[:, None].astype(jnp.float32)
        kept = prompt.budget.window(prompt.length, self.always)
        rest = size - kept
        most = jnp.minimum(2 * rest - rest // self.slope, prompt.length - kept)
        least = 2 * rest - most
        # Whole numbers, then one division: rounded alike whatever XLA fuses it with, in any batch.
        fall = (most - least)[:, None] * jnp.arange(layers, dtype=jnp.int32)
        return ((most + kept)[:, None] * (layers - 1) - fall).astype(jnp.float32) / (layers - 1)


@dataclass(frozen=True)
class GlobalBest(Allocation):
    """AdaReTaKe's rule: a layer is given as many tokens as it has of the best of all layers.

    A token's worth in a layer is the mean over the kv heads of its share of the score
    (`normalized`). Of the L * m of them the alpha * L * m largest are taken, and counted by layer.
    `allocate` raises a layer to the floor and takes that from the others. Choices of this library:
    of equal worth the lower position comes first, in the lower layer, so that layers that are alike
    are given the same; it is the method's own score that is compared.
    """

    by_scores: ClassVar[bool] = True

    def sizes(self, prompt: Prompt, measured: jax.Array | None) -> jax.Array:
        """How many of the best tokens each layer has.

        Raises:
            ValueError: the score says nothing of what tokens are worth.
        """
        if measured is None:
            raise ValueError(
                "GlobalBest compares the scores of all layers, and this score has none: choose "
                "another score, or another allocation"
            )
        worth = normalized(measured, prompt.inside[:, None, None, :])
        worth = mean(jnp.mean(worth, axis=2), HEADS)  # [B, L, T]
        every = prompt.length * prompt.layers
        taken = prompt.budget.shares(prompt.length) * every.astype(jnp.float32)
        taken = jnp.floor(taken + 0.5).astype(jnp.int32)
        row = worth.swapaxes(1, 2).reshape(len(every), -1)  # position by position
        inside = jnp.repeat(prompt.inside, prompt.layers, axis=1)
        best = largest(row, inside, taken).reshape(len(every), -1, prompt.layers)
        return jnp.sum(best, axis=1, dtype=jnp.float32)


@dataclass(frozen=True)
class AllocationFunction(Allocation):
    """A user's rule, which is shown the sparsity as VL-Cache measures it.

    Attributes:
        function: of (prompt, sparsity [B, L]); gives sizes in tokens [B, L], of which `allocate`
            makes whole numbers that fit the budget's pool, and add up to a budget in tokens.
    """

    function: Callable[[Prompt, jax.Array], jax.Array]
    window = PostVisionRows()

    def sizes(self, prompt: Prompt, measured: jax.Array) -> jax.Array:
        """What the function says."""
        sizes = self.function(prompt, measured)
        expected = (*prompt.length.shape, prompt.layers)
        if sizes.shape != expected:
            raise ValueError(
                f"the allocation gave sizes of shape {sizes.shape}, expected [B, L] = {expected}"
            )
        return sizes


ALLOCATIONS: dict[str, Allocation] = {
    "sparsity": Sparsity(),
    "uniform": Uniform(),
    "pyramid": Pyramid(),
    "global-best": GlobalBest(),
}
"""The rules by the name that `Custom` takes."""


def parts(sizes: jax.Array) -> jax.Array:
    """Sizes [B, L] as parts of their sum; equal ones where all are 0."""
    total = jnp.sum(sizes, axis=-1, keepdims=True)
    fair = jnp.full_like(sizes, 1.0 / sizes.shape[-1])
    return jnp.where(total > 0, sizes / jnp.where(total > 0, total, 1.0), fair)


def _renormalized(
    part: jax.Array, wanted: jax.Array, least: jax.Array, most: jax.Array | float
) -> jax.Array:
    """clip(part * scale, least, most) with the scale, found by bisection, that adds up to `wanted`.

    Bounds and `wanted` are [B, 1]. Where no scale does, as some parts are 0, it is a large one.
    """
    wanted = jnp.maximum(wanted, least * part.shape[-1])

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        reached = jnp.sum(jnp.clip(part * middle, least, most), axis=-1, keepdims=True) >= wanted
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    # The scale at which even the smallest part fills its layer is enough for any total.
    high = most / jnp.maximum(jnp.min(part, axis=-1, keepdims=True), 1e-6)
    _, scale = lax.fori_loop(0, 60, halve, (jnp.zeros_like(high), high))
    return jnp.clip(part * scale, least, most)


def _where_any(rows: jax.Array, new: Callable[[], jax.Array], old: jax.Array) -> jax.Array:
    """`new()` for some rows [B, 1] of a batch, `old` [B, L] for others; not run where it is none's.

    A loop of small steps takes its time on a GPU; most budgets are shares, and do without. For them
    `old` does not pass through the branch, in front of which XLA would round it.
    """
    found = lax.cond(jnp.any(rows), new, lambda: jnp.zeros_like(old))
    return jnp.where(rows, found, old)


def mixed(sizes: jax.Array, uniform_share: float, budget: Limits, m: jax.Array) -> jax.Array:
    """Sizes between a rule's and even ones: u * C + (1 - u) * x, float32 [B, L].

    Args:
        sizes: x, float32 [B, L].
        uniform_share: u, from 0 to 1.
        budget: gives C, the size of all layers if they had the same.
        m: true prompt lengths, int32 [B].
    """

    def part(share: float, sizes: jax.Array) -> jax.Array:
        # Clipped before they are added, which keeps XLA from fusing product and sum: they are
        # rounded alike in any batch.
        return jnp.clip(jnp.nan_to_num(share * sizes.astype(jnp.float32)), 0, _MOST)

    return part(uniform_share, budget.even_rows(m)[:, None]) + part(1 - uniform_share, sizes)


def allocate(sizes: jax.Array, budget: Limits, m: jax.Array) -> jax.Array:
    """Whole-number budgets that add up to the sizes' rounded sum and fit the pool.

    k[l] = clip(floor(x[l]), lo, m); then, one at a time, the layer with the largest x - k below m
    gains a token, or the one with the smallest x - k above lo loses one, until the sum is right.
    Ties go to the lower layer. (The paper leaves the rounding open.) A sequence whose share is 1
    keeps everything.

    For N tokens per layer the sum is L * min(N, m) whatever the sizes add up to: they are scaled to
    that, within lo and m, where they add up to anything else.

    Args:
        sizes: x, float32 [B, L].
        budget: what may be kept: gives lo and the most rows.
        m: true prompt lengths, int32 [B].

    Returns:
        k, int32 [B, L]; 1 <= k <= m, and a row's sum is at most L * `budget.most(m)`, for a budget
        in tokens exactly that.
    """
    layers = sizes.shape[-1]
    x = jnp.clip(jnp.nan_to_num(sizes.astype(jnp.float32)), 0, _MOST)
    exact = jnp.broadcast_to(budget.tokens > 0, m.shape)[:, None]
    lo, most, whole, m = (
        each[:, None] for each in (budget.least(m), budget.most(m), budget.shares(m) >= 1, m)
    )
    # To the nearest whole number; a half that the sum's own rounding made smaller is one still.
    asked = jnp.sum(x, axis=-1, keepdims=True)
    total = jnp.floor(asked + jnp.float32(0.501))
    total = jnp.maximum(layers * lo, total.astype(jnp.int32))
    total = jnp.where(exact, layers * most, jnp.minimum(total, layers * most))
    # Sizes that add up to that but for roundings stay as they are, to the last bit.
    far = exact & (jnp.abs(asked - _real(total)) > 0.5 + 1e-5 * _real(total))
    x = _where_any(far, lambda: _renormalized(parts(x), *map(_real, (total, lo, m))), x)
    k = jnp.clip(jnp.floor(x).astype(jnp.int32), lo, m)
    missing = total - _count(k)
    k = _hand_out(x, k, m, missing)
    # Taking from the smallest x - k down to lo is giving to the largest (-x) - (-k) up to -lo.
    k = -_hand_out(-x, -k, -lo, -missing)
    return jnp.where(whole, m, k)


def _real(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _count(tokens: jax.Array) -> jax.Array:
    """Tokens of all layers together: int32 [B, L] -> [B, 1]."""
    return jnp.sum(tokens, axis=-1, keepdims=True, dtype=jnp.int32)


def _hand_out(x: jax.Array, k: jax.Array, limit: jax.Array, count: jax.Array) -> jax.Array:
    """Give `count` tokens, one at a time, to the largest x - k with k < limit; ties: lower layer.

    Without a loop over tokens: layer l would receive its tokens at the values x - k, x - k - 1, ...
    Every value interval (s - 1, s] holds one token of each layer. So all tokens above the right
    whole number s are given at once, and the rest, at most one per layer, by one sort. x and k are
    [B, L], `limit` and `count` [B, 1]; nothing is given where the latter is 0 or less.
    """
    above = jnp.ceil(x).astype(jnp.int32)

    def given(s: jax.Array) -> jax.Array:
        """Tokens that each layer receives at values above s."""
        return jnp.clip(above - s - k, 0, limit - k)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # too many tokens above `low`, not too many above `high`
        middle = (low + high) // 2
        fits = _count(given(middle)) <= count
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    bounds = jnp.full_like(count, -2 * _MOST), jnp.full_like(count, 2 * _MOST)
    _, s = lax.fori_loop(0, 26, halve, bounds)
    left = count - _count(given(s))
    more = given(s - 1) > given(s)
    order = jnp.argsort(jnp.where(more, above.astype(jnp.float32) - x, jnp.inf), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return k + given(s) + (more & (rank < left))
