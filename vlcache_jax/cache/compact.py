"""Gather the kept rows of all layers into the pool: one gather of a fixed shape.

    slot of the pool   0 . . . . . | . . . | . . . . . . . . | . .
    layer              0           | 1     | 2               |   free
    rank in the layer  0 1 2 3 4 5 | 0 1 2 | 0 1 2 ...

A slot's layer and rank follow from the budgets alone, so the gather's shape is the pool's.
"""

import jax
import jax.numpy as jnp

from vlcache_jax.cache.state import Pool, round_up


def compact(
    k: jax.Array,
    v: jax.Array,
    order: jax.Array,
    budgets: jax.Array,
    visual: jax.Array,
    capacity: int,
) -> Pool:
    """Make the pool of the kept rows.

    Args:
        k: keys of all layers, [B, K, >= L * T, H], layer l at rows l * T.
        v: values, in the shape of the keys.
        order: positions by worth, int32 [B, L, K or 1, T].
        budgets: kept rows of each layer, int32 [B, L]; a row's sum is at most `capacity`.
        visual: visual tokens among them, the mean over the kv heads, float32 [B, L].
        capacity: rows of the pool.

    Returns:
        The pool; a layer's rows stand in the order of their worth. Slots behind the last layer hold
        copies of some row and are never read.
    """
    batch, layers, _, rows = order.shape
    end = jnp.cumsum(budgets, axis=-1, dtype=jnp.int32)  # [B, L]
    offset = end - budgets
    slot = jnp.arange(capacity, dtype=jnp.int32)
    layer = jnp.sum(slot[:, None] >= end[:, None, :], axis=-1, dtype=jnp.int32)  # [B, capacity]
    layer = jnp.minimum(layer, layers - 1)
    rank = jnp.minimum(slot - jnp.take_along_axis(offset, layer, axis=-1), rows - 1)
    order = jnp.broadcast_to(order, (batch, layers, k.shape[1], rows))
    flat = order.swapaxes(1, 2).reshape(batch, k.shape[1], layers * rows)
    source = (layer * rows + rank)[:, None, :]  # [B, 1, capacity]: where `order` is read
    position = jnp.take_along_axis(flat, source, axis=-1)  # [B, K, capacity]
    row = (layer * rows)[:, None, :] + position
    k, v = (jnp.take_along_axis(x, row[..., None], axis=2) for x in (k, v))
    most = min(round_up(rows), capacity)
    return Pool(k, v, offset.astype(jnp.int32), budgets, visual, most)
