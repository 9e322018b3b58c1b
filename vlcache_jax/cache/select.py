"""Which prompt tokens each kv head of a layer keeps: one sort for all layers and heads.

    scores [B, L, K, T] ─► order [B, L, K, T]    positions, the most important first
                           the first k[b, l] of them are kept

Nothing here depends on the budgets' values in its shapes: `order` ranks all T rows, and the budget
only says how far down the ranking is read.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LARGEST = np.finfo(np.float32).max
_NEXT_LARGEST = np.nextafter(_LARGEST, np.float32(0))

Rows = TypeVar("Rows", jax.Array, np.ndarray)
"""Counts of rows, on the device or on the host."""


def recent_rows(kept: Rows, recent_ratio: float) -> Rows:
    """How many of a layer's kept tokens are the last ones of the prompt: floor(recent_ratio * k).

    VL-Cache keeps a tenth of each layer's budget for them (paper, section 5.1: said of all methods
    that are compared). That they are taken from inside the budget is a choice of this library.

    Args:
        kept: k, int32 of any shape.
        recent_ratio: their share of k, 0 to 1.
    """
    # The product may fall just below the whole number that it stands for (0.29 * 100).
    share = kept.astype(np.float32) * np.float32(recent_ratio)
    return (share + np.float32(1e-4)).astype(np.int32)


def last_marked(marked: jax.Array, most: jax.Array) -> jax.Array:
    """The last of some marked rows, as many as each layer may have.

    Args:
        marked: bool [B, T].
        most: int32 [B, L].

    Returns:
        Bool [B, L, T]: all marked rows, or the last `most` of them where there are more.
    """
    behind = lax.cumsum(marked.astype(jnp.int32), axis=1, reverse=True)  # the row itself included
    return marked[:, None, :] & (behind[:, None, :] <= most[:, :, None])


def rank_rows(
    scores: jax.Array,
    first: jax.Array,
    last: jax.Array,
    m: jax.Array,
    others: jax.Array | None = None,
) -> jax.Array:
    """Rank the prompt's rows for every layer and kv head.

    The prompt's `first` and `last` rows and the `others` that are named come first, then the rest
    by score: infinity in front of all numbers, minus infinity behind them, NaN behind that; rows
    beyond the prompt's end come last. Ties go to the lower position.

    Args:
        scores: real [B, L, K, T], or [B, L, 1, T] for one ranking per layer, ranked as float32;
            what stands beyond a prompt's end is ignored.
        first: rows at the prompt's beginning that are kept whatever their score, int32 [B, L].
        last: the same of its end, int32 [B, L].
        m: true prompt lengths, int32 [B].
        others: more rows that are kept whatever their score, bool [B, L, T]; None for none.

    Returns:
        Positions in the order of their worth, int32, in the shape of the scores.
    """
    position = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    end = m[:, None, None, None]
    always = position >= end - last[:, :, None, None]
    always = always | (position < first[:, :, None, None])
    if others is not None:
        always = always | others[:, :, None, :]
    # Of a user's scores any may come: infinities are left to what is always kept and to padding.
    worth = jnp.clip(scores.astype(jnp.float32), -_NEXT_LARGEST, _LARGEST)
    worth = jnp.where(jnp.isnan(worth), -_LARGEST, worth)
    worth = jnp.where(always, jnp.inf, worth)
    worth = jnp.where(position < end, worth, -jnp.inf)
    # The position as a second key: a stable sort would carry a third array through every pass.
    keys = -worth, jnp.broadcast_to(position, worth.shape)
    return lax.sort(keys, dimension=-1, is_stable=False, num_keys=2)[1]


def largest(values: jax.Array, inside: jax.Array, count: jax.Array) -> jax.Array:
    """Which of a row's values are the `count` largest, of equal ones the first: bool [B, N].

    Found by bisection, without a sort of the row.

    Args:
        values: not below 0, float32 [B, N].
        inside: which of them there are, bool [B, N].
        count: how many are wanted, at most as many as there are, int32 [B].
    """
    # The bits of such numbers, read as whole ones, are in the same order.
    bits = jnp.where(inside, lax.bitcast_convert_type(jnp.abs(values), jnp.int32), -1)

    def above(limit: jax.Array) -> jax.Array:
        return jnp.sum(bits > limit[:, None], axis=1, dtype=jnp.int32)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # more than `count` are above `low`, not so above `high`
        middle = low + (high - low) // 2
        fits = above(middle) <= count
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    bounds = jnp.full_like(count, -2), jnp.full_like(count, np.float32(np.inf).view(np.int32))
    _, limit = lax.fori_loop(0, 32, halve, bounds)
    equal = bits == limit[:, None]
    place = lax.cumsum(equal.astype(jnp.int32), axis=1)
    left = count - above(limit)
    return (bits > limit[:, None]) | (equal & inside & (place <= left[:, None]))


def kept_rows(order: jax.Array, budgets: jax.Array) -> jax.Array:
    """Which rows are kept, bool in the shape of the order: for reports and traces."""
    rank = jnp.argsort(order, axis=-1)  # the inverse permutation
    return rank < budgets[:, :, None, None]
