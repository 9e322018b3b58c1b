"""An argmax and, where any row is sampled, bisections: a sort of the vocabulary takes many times as
long on a CPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sample_tokens.keys import LOWEST, key_of, value_of


def sample_tokens(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    uniform: jax.Array,
) -> jax.Array:
    """See the package's public function."""
    greedy = jnp.argmax(logits, axis=1).astype(jnp.int32)
    vocabulary = logits.shape[1]

    def draw() -> jax.Array:
        maximum = jnp.take_along_axis(logits, greedy[:, None], axis=1)
        peak, lowest = key_of(maximum[:, 0]), jnp.full_like(greedy, LOWEST)

        def total(measure: jax.Array | int, kept: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(kept, measure, 0), axis=1)

        def above(border: jax.Array) -> jax.Array:
            return logits >= value_of(border)[:, None]

        def count_reaches(border: jax.Array) -> jax.Array:
            return total(1, above(border)) >= top_k

        def mass_reaches(border: jax.Array) -> jax.Array:
            return total(mass, above(border)) >= bound

        limits = (top_k > 0) & (top_k < vocabulary)
        border = _last(count_reaches, lowest, jnp.where(limits, peak, lowest))
        mass = jnp.exp((logits - maximum) / temperature[:, None])
        bound = top_p * total(mass, above(border))
        border = _last(mass_reaches, border, jnp.where(top_p < 1, peak, border))
        edge, ids = value_of(border)[:, None], jnp.arange(vocabulary, dtype=jnp.int32)
        equal, inside = logits == edge, logits > edge
        # Of the equals at the border of the top p only the first ones that are needed stay.
        each = jnp.exp((edge - maximum) / temperature[:, None])[:, 0]
        needed = jnp.maximum(jnp.ceil((bound - total(mass, inside)) / each), 1)
        cut = (top_p < 1) & (needed < total(1, equal))

        def is_needed(token: jax.Array) -> jax.Array:
            """Whether fewer equals come before a token than are needed."""
            return total(1, equal & (ids < token[:, None])) < needed

        end = jnp.full_like(greedy, vocabulary - 1)
        last = _last(is_needed, jnp.where(cut, 0, end), end)
        mass = jnp.where(inside | (equal & (ids <= last[:, None])), mass, 0.0)
        target = uniform * jnp.sum(mass, axis=1)

        def begins(token: jax.Array) -> jax.Array:
            """Whether what comes before a token does not reach beyond the target."""
            return total(mass, ids < token[:, None]) <= target

        token = _last(begins, jnp.zeros_like(greedy), end)
        sampled = temperature >= jnp.finfo(jnp.float32).tiny
        sampled &= jnp.isfinite(maximum[:, 0] / temperature)
        return jnp.where(sampled, token, greedy)

    return lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)


def _last(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """Of the integers from `low` to `high` the last for which something holds, int32 [B].

    It must hold for all up to that one, and is taken to for `low`, which is not tried.
    """

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up
        held = holds(middle)
        return jnp.where(held, middle, low), jnp.where(held, high, middle - 1)

    return lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, (low, high))[0]
