"""How many prompt tokens each layer keeps.

An allocation is two steps. A rule gives every layer a real-valued size x[l] (`sparsity_sizes` for
VL-Cache, `uniform_sizes`, `pyramid_sizes`); `whole_sizes` turns them into whole numbers k[l] whose
sum never exceeds what the pool was made for. All of it is float32 and int32 data: the same program
serves every prompt.

Shapes: sizes [B, L]; m, the true prompt lengths, int32 [B].
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

FLOOR = 0.01
"""Least share of the prompt that a layer keeps (VL-Cache, section 4.2), and the room that the sum
of the budgets is given for it."""

_SLACK = 1e-4  # keeps a float32 product just above a whole number from counting as the next one
_ROUNDING = 0.5 + 1e-3


@dataclass(frozen=True)
class Budget:
    """What may be kept of the whole model's cache: a share of it, or tokens per layer.

    Attributes:
        share: alpha, above 0; at 1 or more everything is kept. None if `tokens` is given.
        tokens: tokens per layer on average, at least 1. None if `share` is given.

    Raises:
        ValueError: not exactly one of the two is given, or it is out of range.
    """

    share: float | None = None
    tokens: int | None = None

    def __post_init__(self):
        if (self.share is None) == (self.tokens is None):
            raise ValueError("a budget is either a share of the cache or tokens per layer")
        if self.share is not None and not 0 < self.share < math.inf:
            raise ValueError(f"budget share={self.share} must be above 0 (0.1 keeps 10 %)")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"budget tokens={self.tokens} must be at least 1")

    @classmethod
    def parse(cls, text: str | float) -> "Budget":
        """Read "0.1" or 0.1 (a share) or "256tok" (tokens per layer).

        Raises:
            ValueError: it is neither.
        """
        try:
            if isinstance(text, str) and text.endswith("tok"):
                return cls(tokens=int(text.removesuffix("tok")))
            return cls(share=float(text))
        except ValueError as error:
            raise ValueError(
                f"budget {text!r} must be a share such as 0.1 or tokens such as 256tok ({error})"
            ) from None

    @property
    def keeps_all(self) -> bool:
        """Whether this is the full cache."""
        return self.share is not None and self.share >= 1

    def layer_rows(self, prompt_rows: int) -> int:
        """Most rows per layer, on average, for a bucket of T prompt rows.

        The floor of 1 % can lift the sum of the budgets above the share asked for, by at most 1 %.
        """
        if self.share is not None:
            return min(prompt_rows, math.ceil((self.share + FLOOR) * prompt_rows) + 1)
        assert self.tokens is not None  # one of the two is given
        return min(prompt_rows, self.tokens + math.ceil(FLOOR * prompt_rows) + 1)

    def shares(self, m: jax.Array) -> jax.Array:
        """The share of each sequence, alpha, float32 [B]."""
        if self.share is not None:
            return jnp.full(m.shape, min(self.share, 1.0), jnp.float32)
        assert self.tokens is not None
        return jnp.minimum(1.0, jnp.float32(self.tokens) / m.astype(jnp.float32))

    def least(self, m: jax.Array) -> jax.Array:
        """Fewest rows of a layer, int32 [B]: 1 % of the prompt, at least one token."""
        rows = jnp.ceil(jnp.float32(FLOOR) * m.astype(jnp.float32) - jnp.float32(_SLACK))
        rows = jnp.maximum(rows.astype(jnp.int32), 1)
        return rows if self.tokens is None else jnp.minimum(rows, self.tokens)


def sparsity_sizes(
    sparsity: jax.Array, budget: Budget, m: jax.Array, *, renormalize: bool = False
) -> tuple[jax.Array, jax.Array]:
    """VL-Cache's sizes: a layer with denser attention is given more (paper, section 4.2).

    beta[l] = clip((1 - gamma'[l]) / sum_k (1 - gamma'[k]) * alpha * L, 0.01, 1). The paper does not
    say what happens when all layers are wholly sparse; here each is then given the same.

    Args:
        sparsity: gamma', float32 [B, L], 0 to 1.
        budget: what may be kept.
        m: true prompt lengths, int32 [B].
        renormalize: hand out again what the clip cut off, so that the betas add up to alpha * L
            (not in the paper).

    Returns:
        beta and the sizes beta * m, both float32 [B, L].
    """
    layers = sparsity.shape[-1]
    dense = 1.0 - sparsity.astype(jnp.float32)
    total = jnp.sum(dense, axis=-1, keepdims=True)
    fair = jnp.full_like(dense, 1.0 / layers)
    part = jnp.where(total > 0, dense / jnp.where(total > 0, total, 1.0), fair)
    wanted = budget.shares(m)[:, None] * layers
    beta = jnp.clip(part * wanted, FLOOR, 1.0)
    if renormalize:
        beta = _renormalized(part, wanted)
    return beta, beta * m[:, None].astype(jnp.float32)


def _renormalized(part: jax.Array, wanted: jax.Array) -> jax.Array:
    """clip(part * scale, 0.01, 1) with the scale, found by bisection, that adds up to `wanted`."""
    wanted = jnp.maximum(wanted, FLOOR * part.shape[-1])

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        reached = jnp.sum(jnp.clip(part * middle, FLOOR, 1.0), axis=-1, keepdims=True) >= wanted
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    # The scale at which even the smallest part fills its layer is enough for any total.
    high = 1.0 / jnp.maximum(jnp.min(part, axis=-1, keepdims=True), 1e-6)
    _, scale = lax.fori_loop(0, 60, halve, (jnp.zeros_like(high), high))
    return jnp.clip(part * scale, FLOOR, 1.0)


def even_size(budget: Budget, m: jax.Array) -> jax.Array:
    """C: a layer's rows when all layers are given the same, int32 [B]."""
    rows = jnp.floor(budget.shares(m) * m.astype(jnp.float32) + 0.5).astype(jnp.int32)
    return jnp.clip(rows, 1, m)


def uniform_sizes(budget: Budget, m: jax.Array, layers: int) -> jax.Array:
    """The same size for every layer, float32 [B, L]."""
    size = even_size(budget, m).astype(jnp.float32)
    return jnp.broadcast_to(size[:, None], (*m.shape, layers))


def pyramid_sizes(
    budget: Budget, m: jax.Array, layers: int, *, window: int = 32, slope: int = 20
) -> jax.Array:
    """PyramidKV's sizes: falling linearly from the first layer to the last, plus the window.

    With B = C - w: min = B // slope, max = 2 B - min. Small budgets (a choice of this library):
    w = min(window, max(1, C // 2)); a max beyond the m - w rows that there are is cut, and min
    raised so that the mean stays B; a single layer is given C.

    Args:
        budget: what may be kept.
        m: true prompt lengths, int32 [B].
        layers: L.
        window: w, rows that are always kept.
        slope: PyramidKV's beta.

    Returns:
        float32 [B, L]; the mean over the layers is C.
    """
    size = even_size(budget, m)
    if layers == 1:
        return size[:, None].astype(jnp.float32)
    kept = jnp.minimum(window, jnp.maximum(1, size // 2))
    rest = size - kept
    most = jnp.minimum(2 * rest - rest // slope, m - kept)
    least = 2 * rest - most
    step = jnp.arange(layers, dtype=jnp.float32) / (layers - 1)
    fall = (most - least).astype(jnp.float32)[:, None] * step
    return most.astype(jnp.float32)[:, None] - fall + kept.astype(jnp.float32)[:, None]


def whole_sizes(sizes: jax.Array, budget: Budget, m: jax.Array, prompt_rows: int) -> jax.Array:
    """Whole-number budgets that add up to the sizes' rounded sum and fit the pool.

    k[l] = clip(floor(x[l]), lo, m); then, one at a time, the layer with the largest x - k below m
    gains a token, or the one with the smallest x - k above lo loses one, until the sum is right.
    Ties go to the lower layer. (The paper leaves the rounding open.)

    Args:
        sizes: x, float32 [B, L].
        budget: what may be kept; gives lo.
        m: true prompt lengths, int32 [B].
        prompt_rows: the prompt's bucket T, for which the pool has `budget.layer_rows(T)` rows per
            layer.

    Returns:
        k, int32 [B, L]; 1 <= k <= m, and a row's sum is at most L * `budget.layer_rows(T)`.
    """
    layers = sizes.shape[-1]
    rows = layers * budget.layer_rows(prompt_rows)

    def one(x: jax.Array, m: jax.Array, lo: jax.Array) -> jax.Array:
        total = jnp.floor(jnp.sum(x) + jnp.float32(_ROUNDING)).astype(jnp.int32)
        total = jnp.minimum(jnp.minimum(layers * m, jnp.maximum(layers * lo, total)), rows)
        k = jnp.clip(jnp.floor(x).astype(jnp.int32), lo, m)

        def step(k: jax.Array) -> jax.Array:
            rest = x - k.astype(jnp.float32)
            gain = jnp.argmax(jnp.where(k < m, rest, -jnp.inf))
            lose = jnp.argmin(jnp.where(k > lo, rest, jnp.inf))
            up = jnp.sum(k) < total
            return k.at[jnp.where(up, gain, lose)].add(jnp.where(up, 1, -1))

        return lax.while_loop(lambda k: jnp.sum(k) != total, step, k)

    return jax.vmap(one)(sizes.astype(jnp.float32), m, budget.least(m))
