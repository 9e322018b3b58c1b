"""Attention over blocks of keys with a running maximum and sum (Milakov and Gimelshein 2018).

Shapes: query rows are grouped by kv head, [B, K, R, H] with R rows that share the keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Partial(NamedTuple):
    """Attention over some of the keys, not yet divided by its sum; all float32.

    Attributes:
        maximum: largest logit seen, [B, K, R]; -inf where no key was visible.
        total: sum of exp(logit - maximum), [B, K, R].
        mixed: sum of exp(logit - maximum) * v, [B, K, R, H].
    """

    maximum: jax.Array
    total: jax.Array
    mixed: jax.Array


def empty(q: jax.Array) -> Partial:
    """Attention over no key at all, for queries [B, K, R, H]."""
    rows = q.shape[:3]
    return Partial(
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, readable: jax.Array, scale: float
) -> Partial:
    """Attention of q over one block of keys, read in their own type.

    Args:
        q: [B, K, R, H].
        k: [B, K, S, H].
        v: [B, K, S, H].
        visible: which key each query row sees, bool, broadcastable to [B, K, R, S].
        readable: keys that hold data, bool [B, S]; what the others hold (NaN) is never used.
        scale: factor of the logits.
    """
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    logits = jnp.einsum(
        "bkrh,bksh->bkrs", q, k, precision=precision, preferred_element_type=jnp.float32
    )
    logits = jnp.where(visible, logits * scale, -jnp.inf)
    maximum = jnp.max(logits, axis=-1)
    # A row that sees nothing has the maximum -inf: shift it by 0, and its weights are exp(-inf).
    weights = jnp.exp(logits - jnp.where(maximum == -jnp.inf, 0.0, maximum)[..., None])
    mixed = jnp.einsum(
        "bkrs,bksh->bkrh",
        weights.astype(v.dtype),
        jnp.where(readable[:, None, :, None], v, 0),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return Partial(maximum, jnp.sum(weights, axis=-1), mixed)


def weigh(
    query: jax.Array, k: jax.Array, readable: jax.Array, seen: Partial
) -> tuple[jax.Array, jax.Array, Partial]:
    """Weights of one more block of keys; of a sequence that has seen none one must be readable,
    unless its maximum is finite.

    Args:
        query: float32 [B, K, H, R].
        k: float32 [B, K, S, H], scaled.
        readable: keys that hold data, bool [S] or [B, S]; what the others hold (NaN) is never used.
        seen: attention over the keys before.

    Returns:
        The weights [B, K, R, S]; the factor of what was mixed before, [B, K, R]; and `seen` with
        the block's maximum and sum, its values not yet mixed in.
    """
    # The keys in front, which on a CPU is twice as fast as the queries; then transposed, since the
    # exponential is vectorised along the last axis.
    logits = jnp.einsum("bksh,bkhr->bksr", k, query, precision=lax.Precision.HIGHEST)
    if readable.ndim == 2:  # XLA would turn the product of several sequences round
        logits, readable = lax.optimization_barrier(logits), readable[:, None, None]
    logits = jnp.where(readable, logits.swapaxes(2, 3), -jnp.inf)
    maximum = jnp.maximum(seen.maximum, jnp.max(logits, axis=-1))
    weights = jnp.exp(logits - maximum[..., None])
    kept = jnp.exp(seen.maximum - maximum)
    total = seen.total * kept + jnp.sum(weights, axis=-1)
    return weights, kept, Partial(maximum, total, seen.mixed)


def add(
    query: jax.Array, k: jax.Array, v: jax.Array, readable: jax.Array, seen: Partial
) -> Partial:
    """Go on with one more block of rows, see `weigh`.

    Args:
        query: float32 [B, K, H, R].
        k: float32 [B, K, S, H], scaled.
        v: float32 [B, K, S, H].
        readable: rows that hold data, bool [S] or [B, S]; what the others hold (NaN) is never used.
        seen: attention over the rows before.
    """
    weights, kept, seen = weigh(query, k, readable, seen)
    # The product changes nothing. Without one LLVM unrolls the loop over as few as 64 channels
    # before it would vectorise it, and a core moves half as many bytes in a second.
    readable = readable[:, None, :, None] if readable.ndim == 2 else readable[:, None]
    v = jnp.where(readable, v, 0) * readable
    mixed = jnp.einsum("bkrs,bksh->bkrh", weights, v, precision=lax.Precision.HIGHEST)
    return seen._replace(mixed=seen.mixed * kept[..., None] + mixed)


def merge(one: Partial, other: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys."""
    maximum = jnp.maximum(one.maximum, other.maximum)
    shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    left, right = jnp.exp(one.maximum - shift), jnp.exp(other.maximum - shift)
    return Partial(
        maximum,
        one.total * left + other.total * right,
        one.mixed * left[..., None] + other.mixed * right[..., None],
    )


def finish(partial: Partial) -> jax.Array:
    """The attention output [B, K, R, H] in float32; zero for a row that saw no key."""
    total = jnp.where(partial.total == 0.0, 1.0, partial.total)
    return partial.mixed / total[..., None]
