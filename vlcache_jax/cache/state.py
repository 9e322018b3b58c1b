"""The key/value cache: a layer-ragged pool for the prompt and a dense tail for new tokens.

    pool   [B, K, capacity, H]    layer 0     | layer 1 | layer 2        | ...   for K and for V
                                  offset[b,0]   ^ offset[b,1]
                                  <-length[b,0]->
    tail   L x [B, K, R, H]       new tokens, rows 0..fill[b]

Each layer has its own share of one pool, and where it lies is data, not shape: one compiled
program serves every allocation. The pool is read-only while decoding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlcache_jax.config import TextConfig

BLOCK = 128
"""Rows that the capacity of a pool is rounded up to."""


class Segment(NamedTuple):
    """One layer's part of the pool: its first row and how many there are, int32 [B] each."""

    offset: jax.Array
    length: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """The kept prompt tokens of all layers.

    Attributes:
        k: keys after RoPE, [B, K, capacity, H].
        v: values, likewise.
        offset: first row of each layer, int32 [B, L].
        length: rows of each layer, int32 [B, L].
        visual: visual tokens among them, the mean over the kv heads, float32 [B, L]: for reports.
    """

    k: jax.Array
    v: jax.Array
    offset: jax.Array
    length: jax.Array
    visual: jax.Array

    def segments(self) -> tuple[Segment, ...]:
        """Where each layer's rows lie."""
        layers = range(self.offset.shape[1])
        return tuple(Segment(self.offset[:, i], self.length[:, i]) for i in layers)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tail:
    """The tokens decoded so far: a leaf per layer, so that an append copies nothing.

    Attributes:
        k: L keys [B, K, R, H].
        v: L values, likewise.
        fill: rows in use, int32 [B]; the same for the whole batch in `generate`.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    fill: jax.Array


def round_up(count: int, block: int = BLOCK) -> int:
    """The smallest multiple of `block` that holds `count`, at least one block."""
    return max(1, -(-count // block)) * block


def empty_tail(config: TextConfig, batch: int, rows: int, dtype: jnp.dtype) -> Tail:
    """A tail with room for `rows` new tokens. Zeros: uninitialised rows could hold NaN."""
    shape = (batch, config.num_kv_heads, rows, config.head_dim)
    layers = range(config.num_layers)
    return Tail(
        tuple(jnp.zeros(shape, dtype) for _ in layers),
        tuple(jnp.zeros(shape, dtype) for _ in layers),
        jnp.zeros((batch,), jnp.int32),
    )
