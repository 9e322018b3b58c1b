"""One program for each row. A row that is sampled is read again and again, out of the L2 cache.

A border is found by bisection over the keys of logits: each step is a pass over the row that counts
what stands from a border on, or sums up its probabilities.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tiles
from pallas_kernels.sample_tokens.keys import LOWEST, key_of, value_of
from pallas_kernels.tuning import RowConfig, best

PER_THREAD = 16
"""Logits that a thread has in flight at once: a pass waits for the cache more than it computes."""


def _kernel(
    logits_ref: Any,
    temperature_ref: Any,
    top_k_ref: Any,
    top_p_ref: Any,
    uniform_ref: Any,
    token_ref: Any,
    *,
    block: int,
    small_block: int,
) -> None:
    """References: the logits of one row [V], and the settings and tokens of all, [B] each."""
    row, vocabulary = pl.program_id(0), logits_ref.shape[0]
    blocks = pl.cdiv(vocabulary, block)

    def load(start: Any, size: int) -> tuple[jax.Array, jax.Array]:
        """Ids from a start on, and their logits, -inf beyond the vocabulary."""
        ids = start + jnp.arange(size, dtype=jnp.int32)
        inside = ids < vocabulary
        return ids, jnp.where(inside, tiles.gather(logits_ref, (ids,), inside), -jnp.inf)

    def each_block(body: Callable[..., Any], state: Any) -> Any:
        def step(index: jax.Array, state: Any) -> Any:
            return body(*load(index * block, block), state)

        return lax.fori_loop(0, blocks, step, state)

    def lead(ids: jax.Array, x: jax.Array, leading: Any) -> Any:
        key, at = leading
        new = key_of(x)
        return jnp.maximum(new, key), jnp.where(new > key, ids, at)

    # Sums and maxima are kept for each place in a block, and reduced once, behind the loop.
    nothing = jnp.full((block,), -(2**31), jnp.int32), jnp.zeros((block,), jnp.int32)
    key, at = each_block(lead, nothing)
    peak = jnp.max(key, axis=0)
    greedy = jnp.min(jnp.where(key == peak, at, vocabulary), axis=0)
    maximum, temperature = value_of(peak), temperature_ref[row]

    def draw() -> jax.Array:
        scale = tiles.LOG2_E / temperature

        def mass(x: jax.Array, border: jax.Array) -> jax.Array:
            return jnp.where(x >= border, jnp.exp2((x - maximum) * scale), 0.0)

        def count(x: jax.Array, border: jax.Array) -> jax.Array:
            return (x >= border).astype(jnp.int32)

        def equal(x: jax.Array, border: jax.Array) -> jax.Array:
            return (x == border).astype(jnp.float32)

        def total(measure: Callable[..., jax.Array], key: jax.Array, dtype: Any) -> jax.Array:
            """The measure of all logits from the border with this key on."""
            border = value_of(key)
            sums = each_block(
                lambda _, x, sums: sums + measure(x, border), jnp.zeros((block,), dtype)
            )
            return jnp.sum(sums, axis=0, dtype=dtype)

        def search(
            measure: Callable[..., jax.Array],
            bound: jax.Array,
            on: jax.Array,
            low: jax.Array,
            reached: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            """The highest key with a total of at least the bound, and that total.

            It is `low`, with the total `reached`, where there is no higher one or nothing is on.
            """

            def halve(state: Any) -> Any:
                low, high, reached = state
                middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up
                found = total(measure, middle, bound.dtype)
                enough = found >= bound
                upper = jnp.where(found == bound, middle, high)  # which ends the search
                return (
                    jnp.where(enough, middle, low),
                    jnp.where(enough, upper, middle - 1),
                    jnp.where(enough, found, reached),
                )

            state = low, jnp.where(on, peak, low), reached
            low, _, reached = lax.while_loop(lambda state: state[0] < state[1], halve, state)
            return low, reached

        top_k, top_p = top_k_ref[row], top_p_ref[row]
        limits = (top_k > 0) & (top_k < vocabulary)
        low, _ = search(count, top_k, limits, jnp.int32(LOWEST), jnp.int32(0))
        reached = total(mass, low, jnp.float32)
        bound = top_p * reached
        low, reached = search(mass, bound, top_p < 1, low, reached)
        border = value_of(low)

        def first_beyond(measure: Callable[..., jax.Array], target: jax.Array) -> jax.Array:
            """The first id, of those with a measure, where its cumulative sum is above a target."""

            def narrow(size: int, count: int, start: jax.Array, reached: jax.Array) -> Any:
                """Of `count` blocks from a start on, the last that begins below the target.

                Where it starts, and the sum before it; `reached` is that before all of them.
                """

                def visit(index: jax.Array, state: Any) -> Any:
                    last, before, reached = state
                    at = start + index * size
                    own = jnp.sum(measure(*load(at, size)), axis=0)
                    begins = (own > 0) & (reached <= target)
                    last, before = jnp.where(begins, at, last), jnp.where(begins, reached, before)
                    return last, before, reached + own

                return lax.fori_loop(0, count, visit, (start, reached, reached))[:2]

            # The cumulative sum of a whole block would need more registers than there are.
            start, reached = narrow(block, blocks, jnp.int32(0), jnp.float32(0))
            start, reached = narrow(small_block, block // small_block, start, reached)
            ids, x = load(start, small_block)
            own = measure(ids, x)
            beyond = (reached + jnp.cumsum(own, axis=0) > target) & (own > 0)
            first = jnp.min(jnp.where(beyond, ids, vocabulary), axis=0)
            # Two passes round differently: where none is beyond, it is the last one.
            return jnp.minimum(first, jnp.max(jnp.where(own > 0, ids, -1), axis=0))

        # Of the equals at the border of the top p only the first ones that are needed stay.
        each = jnp.exp2((border - maximum) * scale)
        equals = total(equal, low, jnp.float32)
        needed = jnp.maximum(jnp.ceil((bound - (reached - equals * each)) / each), 1.0)
        cut = (top_p < 1) & (needed < equals)
        last = lax.cond(
            cut,
            lambda: first_beyond(lambda _, x: equal(x, border), needed - 1),
            lambda: jnp.maximum(greedy, vocabulary),  # a constant does not lower
        )
        reached = jnp.where(cut, reached - (equals - needed) * each, reached)

        def kept(ids: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.where((x > border) | (ids <= last), mass(x, border), 0.0)

        return first_beyond(kept, uniform_ref[row] * reached)

    sampled = temperature >= jnp.finfo(jnp.float32).tiny
    sampled &= jnp.abs(maximum / temperature) < jnp.inf
    token_ref[row] = lax.cond(sampled, draw, lambda: greedy)


def sample_tokens(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    uniform: jax.Array,
    *,
    config: RowConfig | None = None,
) -> jax.Array:
    """See the package's public function; `config` is that of the device by default."""
    batch, vocabulary = logits.shape
    launch: RowConfig = config or best("sample_tokens", logits.dtype, vocabulary)
    size, threads = tiles.padded(vocabulary), 32 * launch.num_warps
    whole = pl.BlockSpec((batch,), lambda i: (0,))
    return tiles.call(
        _kernel,
        "sample_tokens",
        grid=(batch,),
        in_specs=[pl.BlockSpec((None, vocabulary), lambda i: (i, 0)), *[whole] * 4],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct((batch,), jnp.int32),
        config=launch,
        cost=pl.CostEstimate(flops=logits.size, transcendentals=0, bytes_accessed=logits.nbytes),
        block=min(PER_THREAD * threads, size),
        small_block=min(threads, size),
    )(logits, temperature, top_k, top_p, uniform)
