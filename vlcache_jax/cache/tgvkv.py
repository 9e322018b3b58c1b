"""TGV-KV (ICML 2026, arXiv 2606.03075): text guides what is kept of the visual tokens.

text rows ─► text columns: what text is worth, and how much each text row counts
          ─► visual columns: the rows' attention, as they count ─► scores
                             all of it together ─► layers
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.allocate import Allocation, parts
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.score import Layer, Look, Score
from vlcache_jax.cache.windows import ScatteredRows
from vlcache_jax.distributed.collectives import HEADS, shards, total

_BEFORE = 2.0**100
"""What text is worth is multiplied by: far beyond any visual token, and rounded nowhere."""


@dataclass(frozen=True)
class TextRows(ScatteredRows):
    """All rows that are text."""

    def position(self, prompt: Prompt) -> jax.Array:
        """See the class."""
        position = jnp.arange(prompt.rows, dtype=jnp.int32)
        return jnp.sort(jnp.where(prompt.text, position, prompt.rows), axis=1)


TEXT_ROWS = TextRows()


@dataclass(frozen=True)
class TextGuided(Score):
    """Text in front, by the attention of text to it; then visual tokens, by that of weighted rows.

    What text row i pays to visual token v counts w[i] times; w[j] is the attention that text rows
    pay to text token j, divided by the number of those that see it, and all weights add up to 1.
    So a budget is filled by text first, then by visual tokens. Choice of this library: each kv head
    has weights of its own, from the sum over its query heads.
    """

    @property
    def looks(self) -> tuple[Look, ...]:
        """The text rows, which are no window at the prompt's end."""
        return (Look(TEXT_ROWS),)

    def reach(self, length: int, last_visual: int) -> None:
        """What a row counts is known when all have been run."""

    def __call__(self, layer: Layer) -> jax.Array:
        """See the class."""
        prompt, text = layer.prompt, layer.prompt.text[:, None]
        worth = jnp.where(text, layer.watch(TEXT_ROWS).scores, 0.0)  # [B, K, T]
        position = TEXT_ROWS.position(prompt)
        there = position < prompt.rows
        seen_by = jnp.sum(there, axis=1, keepdims=True) - jnp.arange(prompt.rows)
        at = jnp.minimum(position, prompt.rows - 1)[:, None]
        weights = jnp.take_along_axis(worth, at, axis=2) / jnp.maximum(seen_by, 1)[:, None]
        weights = jnp.where(there[:, None], weights, 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1.0)
        guided = layer.attention(layer.queries(position), position, weights=weights).scores
        most = layer.q.shape[2] * shards()  # of a visual token: 1 for each query head
        return jnp.where(text, worth * _BEFORE + most, guided)


@dataclass(frozen=True)
class AttentionToVision(Allocation):
    """TGV-KV's rule: a layer's share is that of the attention that text rows pay to visual tokens.

    All layers are given the same where there is none; `allocate` raises a layer to the floor.
    """

    window = TEXT_ROWS
    threshold = None

    def measure(self, layer: Layer) -> jax.Array:
        """That attention, summed over rows, tokens and heads."""
        scores = layer.watch(TEXT_ROWS).scores
        scores = jnp.where(layer.prompt.visual[:, None], scores, 0.0)
        return total(jnp.sum(scores, axis=(1, 2)), HEADS)

    def sizes(self, prompt: Prompt, measured: jax.Array) -> jax.Array:
        """The shares of all that is kept."""
        even = prompt.budget.even_rows(prompt.length)[:, None].astype(jnp.float32)
        return parts(measured) * even * prompt.layers


@dataclass(frozen=True)
class TGVKV(CacheMethod):
    """TGV-KV (2026): all text, then the visual tokens that weighted text rows look at.

    Looks from every text row: of a prompt without pictures or context, from all of its rows.
    """

    name: ClassVar[str] = "tgv-kv"

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        return TextGuided(), AttentionToVision()
