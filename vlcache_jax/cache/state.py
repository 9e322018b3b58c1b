"""The key/value cache: a layer-ragged pool for the prompt and a dense tail for new tokens.

    pool   [B, K, capacity, H]    layer 0     | layer 1 | layer 2        | ...   for K and for V
                                  offset[b,0]   ^ offset[b,1]
                                  <-length[b,0]->
    tail   L x [B, K, R, H]       new tokens, rows 0..fill[b]

Each layer has its own share of one pool, and where it lies is data, not shape: one compiled
program serves every allocation. The pool is read-only while decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_decode_attention import append_and_attend
from pallas_kernels.rows import NewToken, Segment, Tail
from vlcache_jax.distributed.collectives import HEADS, own
from vlcache_jax.models.config import TextConfig

BLOCK = 128
"""Rows that the capacity of a pool is rounded up to."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """The kept prompt tokens of all layers.

    Attributes:
        k: keys after RoPE, [B, K, capacity, H].
        v: values, [B, K, capacity, H].
        offset: first row of each layer, int32 [B, L].
        length: rows of each layer, int32 [B, L].
        visual: those among them that `Prompt.visual` has, the mean over the kv heads, float32
            [B, L]: for reports.
        most: static: rows that one layer can have at most, a multiple of `BLOCK`.
    """

    k: jax.Array
    v: jax.Array
    offset: jax.Array
    length: jax.Array
    visual: jax.Array
    most: int = field(metadata={"static": True})

    def segments(self) -> tuple[Segment, ...]:
        """Each layer's rows."""
        layers = range(self.offset.shape[1])
        return tuple(Segment(self.k, self.v, self.offset[:, i], self.length[:, i]) for i in layers)

    @property
    def counts(self) -> jax.Array:
        """Rows of each layer by their width, of which there is one: int32 [B, L, 1]."""
        return self.length[..., None]

    def only(self, some: jax.Array) -> "Pool":
        """The rows of some sequences, bool [B]: the others have none."""
        return replace(self, length=jnp.where(some[:, None], self.length, 0))

    def append_and_attend(
        self,
        new: NewToken,
        segment: Segment,
        tail: Tail,
        backend: str | None,
        together: bool = True,
    ) -> tuple[jax.Array, Tail]:
        """Attention of a new token to one layer's rows, to its tail and to itself: [B, N, H].

        Args:
            new: the layer's product of the token, qkv [B, K, G + 2, H], and its position's angles.
            segment: the layer's rows, of `segments`.
            tail: the tokens before, k and v [B, K, R, H]; it comes back with the new one.
            backend: of the kernel.
            together: all sequences of the batch have begun to decode at once.
        """
        return append_and_attend(
            new,
            segment,
            tail,
            most_rows=self.most,
            together=together,
            backend=backend,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tails:
    """The tokens decoded so far: a leaf per layer, so that an append copies nothing.

    Attributes:
        k: L keys [B, K, R, H].
        v: L values [B, K, R, H].
        fill: rows in use, int32 [B]; the same for the whole batch in `generate`. More than R of a
            sequence that has ended: what it draws is not kept.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    fill: jax.Array

    def layer(self, index: int) -> Tail:
        """One layer's."""
        return Tail(self.k[index], self.v[index], self.fill)

    def only(self, some: jax.Array) -> "Tails":
        """The rows of some sequences, bool [B]: the others have none."""
        return replace(self, fill=jnp.where(some, self.fill, 0))

    @classmethod
    def of(cls, layers: Sequence[Tail]) -> "Tails":
        """Those of all layers, which are as full."""
        return cls(tuple(x.k for x in layers), tuple(x.v for x in layers), layers[0].fill)


def round_up(count: int, block: int = BLOCK) -> int:
    """The smallest multiple of `block` that holds `count`, at least one block."""
    return max(1, -(-count // block)) * block


def whole_capacity(layers: int, prompt_rows: int) -> int:
    """Rows of the pool that holds every row of L layers and a bucket of T prompt rows."""
    return round_up(layers * prompt_rows)


def empty_tail(config: TextConfig, batch: int, rows: int, dtype: jnp.dtype) -> Tails:
    """Tails with room for `rows` new tokens. Zeros: uninitialised rows could hold NaN."""
    shape = batch, own(config.num_kv_heads, HEADS), rows, config.head_dim
    layers = range(config.num_layers)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in layers) for _ in range(2))
    return Tails(k, v, jnp.zeros((batch,), jnp.int32))
