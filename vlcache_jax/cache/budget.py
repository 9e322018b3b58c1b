"""What is asked of a method: the budget, and the prompts that it is for."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.state import round_up
from vlcache_jax.errors import short

FLOOR = 0.01
"""Least share of the prompt that a layer keeps (VL-Cache, section 4.2), and the room that the sum
of the budgets is given for it where they are a share of the cache."""

TOKENS_PER_FLOOR = 10
"""A budget in tokens has a lower floor where 1 % of the prompt is more: a tenth of the tokens."""

POOL_SHARES = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.99)
"""Shares of the prompt's bucket that pools are made for. With the floor's room the last holds every
row: it is there for budgets below 1, which may leave out a token."""

_SLACK = 1e-4  # keeps a float32 product just above a whole number from counting as the next one
_RELATIVE_SLACK = 4e-7  # the same for products of any size: a few float32 roundings


@dataclass(frozen=True)
class Budget:
    """What may be kept of the whole model's cache: a share of it, or tokens per layer.

    A share follows the paper: its floor can lift what is kept by up to 1 % of the prompt. Tokens
    are exact: over L layers, L times as many are kept, or all of a shorter prompt.

    Attributes:
        share: alpha, above 0; 1 is the full cache. None if `tokens` is given.
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
        if self.share is not None and self.share > 1:
            share, tokens = self.share / 100 if self.share <= 100 else 0.1, math.ceil(self.share)
            raise ValueError(
                f"budget {self.share:.10g} is above 1, the share of the full cache: write "
                f"{share:g} for {100 * share:g} % of it, or {short(f'{tokens}tok')} for "
                f"{short(str(tokens))} tokens per layer"
            )
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"budget tokens={self.tokens} must be at least 1")

    @classmethod
    def parse(cls, text: "str | float | Budget") -> "Budget":
        """Read "0.1" or 0.1 (a share) or "256tok" (tokens per layer).

        Raises:
            ValueError: it is neither, or out of range; a share above 1 is, whole number or not.
        """
        if isinstance(text, Budget):
            return text
        share = tokens = None
        try:
            if isinstance(text, str) and text.endswith("tok"):
                tokens = int(text.removesuffix("tok"))
            elif not isinstance(text, bool):
                share = float(text)
        except (TypeError, ValueError, OverflowError):
            pass
        if share is None and tokens is None:
            raise ValueError(
                f"budget {short(text)!r} must be a share such as 0.1 or tokens such as 256tok"
            )
        return cls(share, tokens)

    def __str__(self) -> str:
        """As `parse` reads it."""
        return str(self.share) if self.share is not None else f"{self.tokens}tok"

    @property
    def keeps_all(self) -> bool:
        """Whether this is the full cache."""
        return self.share == 1

    def layer_rows(self, prompt_rows: int) -> int:
        """Most rows per layer, on average, for a bucket of T prompt rows.

        The floor of 1 % can lift the sum of the budgets above the share asked for, by at most 1 %;
        a budget in tokens is never exceeded.
        """
        rows = self.tokens or math.ceil(((self.share or 0.0) + FLOOR) * prompt_rows) + 1
        return min(prompt_rows, rows)

    def bucket(self, prompt_rows: int) -> "Budget":
        """The least of `POOL_SHARES` that has room for this, with a bucket of T prompt rows.

        Pools are made for it: one program serves all budgets of a bucket. `keeps_all` stays.
        """
        if self.keeps_all:
            return Budget(share=1.0)
        needed = self.layer_rows(prompt_rows)
        buckets = (Budget(share=share) for share in POOL_SHARES)
        return next(each for each in buckets if each.layer_rows(prompt_rows) >= needed)

    def capacity(self, layers: int, prompt_rows: int) -> int:
        """Rows of the pool for L layers and a bucket of T prompt rows, in whole blocks."""
        return round_up(layers * self.bucket(prompt_rows).layer_rows(prompt_rows))

    @property
    def data(self) -> "Limits":
        """The same as numbers that a compiled program takes."""
        share, tokens = self.share or 0.0, min(self.tokens or 0, np.iinfo(np.int32).max)
        return Limits(np.float32(share), np.float32(share + FLOOR), np.int32(tokens))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Limits:
    """Budgets as data: numbers for a whole batch, or arrays [B] with one for each sequence.

    Attributes:
        share: alpha, float32, 0 to 1; 0 of a budget in tokens.
        room: the share that the sum over the layers may reach, float32: alpha + 1 %; not used of
            a budget in tokens.
        tokens: tokens per layer on average, int32; 0 of a budget in shares.
    """

    share: Any
    room: Any
    tokens: Any

    def most(self, m: jax.Array) -> jax.Array:
        """`Budget.layer_rows` of each sequence's own length m, int32 [B]; at most its bucket's."""
        rows = jnp.ceil(self.room * m.astype(jnp.float32) * (1 - _RELATIVE_SLACK))
        rows = jnp.where(self.tokens > 0, self.tokens, rows.astype(jnp.int32) + 1)
        return jnp.minimum(rows, m)

    def shares(self, m: jax.Array) -> jax.Array:
        """The share of each sequence of length m, alpha, at most 1, float32 [B]."""
        of_tokens = jnp.minimum(1.0, self.tokens / m.astype(jnp.float32))
        return jnp.where(self.tokens > 0, of_tokens, self.share).astype(jnp.float32)

    def floor(self, m: jax.Array) -> jax.Array:
        """The least share of a prompt of m tokens that a layer is given, float32 [B].

        1 %; of a budget in tokens at most a tenth of alpha (a choice of this library), so that the
        layers still differ where the budget is less than 1 % of the prompt.
        """
        return jnp.where(
            self.tokens > 0, jnp.minimum(FLOOR, self.shares(m) / TOKENS_PER_FLOOR), FLOOR
        ).astype(jnp.float32)

    def least(self, m: jax.Array) -> jax.Array:
        """Fewest rows of a layer, int32 [B]: the floor of m tokens, at least one token."""
        rows = jnp.ceil(jnp.float32(FLOOR) * m.astype(jnp.float32) - jnp.float32(_SLACK))
        rows = jnp.maximum(rows.astype(jnp.int32), 1)
        of_tokens = -(-self.tokens // TOKENS_PER_FLOOR)
        return jnp.where(self.tokens > 0, jnp.minimum(rows, of_tokens), rows)

    def even_rows(self, m: jax.Array) -> jax.Array:
        """C: a layer's rows when all layers are given the same, of m tokens, int32 [B]."""
        rows = jnp.floor(self.shares(m) * m.astype(jnp.float32) + 0.5).astype(jnp.int32)
        return jnp.clip(jnp.where(self.tokens > 0, self.tokens, rows), 1, m)

    def window(self, m: jax.Array, most: int) -> jax.Array:
        """w: the rows that SnapKV and PyramidKV watch by and always keep, int32 [B].

        min(most, max(1, C // 2)): half of a small budget at most (a choice of this library).
        """
        return jnp.minimum(most, jnp.maximum(1, self.even_rows(m) // 2))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as scores and allocations see it.

    Attributes:
        length: m, the true length of each prompt, int32 [B].
        visual: which tokens the question is about, visual ones or those of a context, bool [B, T];
            false beyond a prompt's end.
        layers: static: L, the decoder's layers.
        budget: what may be kept.
    """

    length: jax.Array
    visual: jax.Array
    layers: int = field(metadata={"static": True})
    budget: Limits

    @property
    def rows(self) -> int:
        """T, the prompt rows of the bucket."""
        return self.visual.shape[1]

    @property
    def inside(self) -> jax.Array:
        """Which rows are tokens of the prompt, bool [B, T]."""
        return jnp.arange(self.rows, dtype=jnp.int32) < self.length[:, None]

    @property
    def text(self) -> jax.Array:
        """Which tokens are neither visual ones nor a context's, bool [B, T]."""
        return self.inside & ~self.visual
