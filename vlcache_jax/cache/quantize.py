"""Quantizing rows: the rule that rounds them, and what every quantizer must say.

Scale and shift of a group are stored in bfloat16, the scale rounded up, and values are rounded by
the stored ones; a group of equal values has scale 1 and that value as its shift. All three are
choices of this library where AKVQ-VL (Su et al. 2025, arXiv 2501.15021) leaves it open. The
quantizers themselves are in quantizers.py.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.packing import BITS, per_word
from vlcache_jax.cache.budget import Budget, Prompt
from vlcache_jax.cache.select import Rows
from vlcache_jax.cache.state import round_up

WORD_BLOCK = 32
"""Word-rows that the packed part of a pool is rounded up to, and its rows of full width: coarser
ones would be a tenth of a small cache."""

CLIP = {2: 0.8}
"""Share of a group's range that is represented, by width; 1 for the others (AKVQ-VL, section 4)."""


def grid(
    low: jax.Array, high: jax.Array, clip: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scale and shift of groups from their least and largest values; all float32.

    Rounded to bfloat16, which is what is stored: what is quantized by them is what is read back.
    The scale is rounded up, so that the codes reach the end of the range: at 8 bits the nearest one
    may be a whole step short of it.

    Args:
        low: least value of each group.
        high: largest.
        clip: share of the range, above 0 to 1, that the codes span: clip * low .. clip * high.
        step: clip / (2**bits - 1).
    """
    # As written it rounds the same everywhere: no product and sum that could be fused, and no
    # division by something broadcast, of which XLA makes a product with the reciprocal, or not.
    bits = lax.bitcast_convert_type((high - low) * step, jnp.uint32) + jnp.uint32(0xFFFF)
    scale = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    constant = scale == 0  # or a range below what the type can hold
    shift = jnp.where(constant, low, clip * low)
    # Not a conversion to bfloat16 and back, which XLA may leave out.
    shift = lax.reduce_precision(shift, exponent_bits=8, mantissa_bits=7)
    return jnp.where(constant, 1.0, scale), shift


def round_to(x: jax.Array, scale: jax.Array, shift: jax.Array, levels: jax.Array) -> jax.Array:
    """Codes 0..levels of values, uint32: round((x - shift) * (1 / scale)), saturated."""
    return jnp.clip(jnp.round((x - shift) * (1 / scale)), 0, levels).astype(jnp.uint32)


def groups(head_dim: int, group: int) -> int:
    """Groups of one row's values.

    Raises:
        ValueError: `group` is below 1, or the head dim is above it and no multiple of it.
    """
    if group < 1:
        raise ValueError(f"{group=} must be at least 1")
    if head_dim <= group:
        return 1
    if head_dim % group:
        fitting = (str(size) for size in range(1, head_dim) if head_dim % size == 0)
        raise ValueError(
            f"{head_dim=} must be a multiple of {group=}, or at most that: choose group="
            f"{', '.join(fitting)}, or {head_dim} and more"
        )
    return head_dim // group


@dataclass(frozen=True)
class Capacity:
    """Room for one sequence's rows of all layers.

    Attributes:
        dense: rows of full width.
        words: word-rows of packed rows of the prompt.
        reserved: word-rows of each layer behind these, for new tokens that are quantized.
        layer_dense: rows of full width that one layer can have at most.
        layer_words: word-rows that one layer can have at most.
    """

    dense: int
    words: int
    reserved: int
    layer_dense: int
    layer_words: int


def most_of_layers(counts: np.ndarray, layers: int, rows: int) -> int:
    """The most that all layers together may need, however a budget is divided over them.

    By weak duality, for any price p >= 0 of a row, sum(counts[k]) <= L * max(counts - p * (k - r)):
    the best price is found by bisection.

    Args:
        counts: what a layer of k = 0, 1, ... T rows needs, int [T + 1].
        layers: L.
        rows: rows of a layer, at most, on average.
    """
    k, low, high, least = np.arange(len(counts)), 0.0, 1.0, np.inf
    for _ in range(60):
        price = (low + high) / 2
        needed = counts - price * (k - rows)
        top = int(np.argmax(needed))
        least = min(least, float(needed[top]))
        low, high = (price, high) if top > rows else (low, price)
    return int(layers * least + 1e-6)


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """How the kept rows of a cache are quantized; the base of all quantizers.

    Attributes:
        bits: width of a packed row's numbers, 2, 4 or 8.
        recent: last tokens of the prompt that stay at full width.
        group: values of one row and head that share a scale; a smaller head dim is one group.
        clip: share of a group's range that is represented; by the width by default (`CLIP`).
        transform: multiply queries and keys by the Walsh-Hadamard transform after RoPE, and fold
            it into the weights of the values.
        residual: new tokens are quantized too, the oldest first, so that about this many stay at
            full width; None leaves all of an answer at full width.

    Raises:
        ValueError: a setting is out of range.
    """

    name: ClassVar[str] = ""

    bits: int = 2
    recent: int = 0
    group: int = 128
    clip: float | None = None
    transform: bool = False
    residual: int | None = None
    pivots = 0  # no field of the base: `AKVQ` has one

    def __post_init__(self):
        if self.recent < 0:
            raise ValueError(f"recent={self.recent} must be at least 0")
        if self.group < 1:
            raise ValueError(f"group={self.group} must be at least 1")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ValueError(f"clip={self.clip} must be above 0 and at most 1")
        if self.residual is not None and self.residual < 1:
            raise ValueError(f"residual={self.residual} must be at least 1")
        if unknown := set(self.widths) - set(BITS):
            raise ValueError(f"bits={sorted(unknown)} must be one of {BITS}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of the packed runs, the widest first."""
        return (self.bits,)

    @property
    def key_group(self) -> int | None:
        """Rows that share a scale per channel, of keys quantized by channel; None by token."""
        return None

    @property
    def lanes(self) -> int:
        """Most rows that share a word."""
        return per_word(min(self.widths))

    @property
    def align(self) -> int:
        """Word-rows that a run is rounded up to."""
        return 1 if self.key_group is None else max(1, self.key_group // self.lanes)

    @property
    def unit(self) -> int:
        """New tokens that are packed at a time: whole words of every width, whole groups of keys.

        With a `residual`, a unit is packed after every so many steps, if `residual` others stay:
        where a chunk of decode steps ends, or a call, makes no difference.
        """
        return math.lcm(self.key_group or 1, per_word(min(BITS)))

    def tail_rows(self, new_rows: int) -> int:
        """Rows of the tail for `new_rows` tokens, a multiple of the chunk."""
        if self.residual is None:
            return new_rows
        # Those that stay, a unit that is not due yet, and what comes before the next is looked at.
        return max(self.unit, min(new_rows, self.residual + 2 * self.unit - 1))

    def for_decoder(
        self, kind: str, layers: int, tsa_layers: tuple[int, ...] | None = None
    ) -> "Quantizer":
        """This quantizer for a decoder: settings that follow from the model are filled in.

        Args:
            kind: of `TextConfig`.
            layers: L.
            tsa_layers: text-salient layers that were calibrated for the checkpoint, if any were.
        """
        return self

    def recent_rows(self, kept: Rows, evicts: bool) -> Rows:
        """How many of a layer's kept rows, the latest, have full width.

        The one count of them: rows are arranged by it, and the room for any division of a budget
        over the layers is that of its worst case.

        Args:
            kept: rows of each layer, int32 of any shape, on the host (numpy) or the device.
            evicts: whether these are what an eviction method kept.
        """
        return kept.clip(max=self.recent)

    def dense(self, prompt: Prompt, salience: jax.Array | None) -> jax.Array | None:
        """Other tokens of full width, bool [B, L, T]; None where there are none.

        Args:
            prompt: the prompts.
            salience: largest activation of each token, float32 [B, L, T].
        """
        return None

    def columns(self, prompt: Prompt) -> jax.Array:
        """Which of `widths` a token of each layer is given at least, int32 [1 or B, L, T or 1]."""
        return jnp.zeros((1, prompt.layers, 1), jnp.int32)

    def new_width(self, layer: int) -> int:
        """Bits of a layer's text, and so of its new tokens, where they are quantized at all."""
        return self.bits

    def runs(self, layer: int) -> tuple[int, ...]:
        """Bits of a layer's runs: those of the prompt, and that of its new tokens."""
        return self.widths if self.residual is None else (*self.widths, self.new_width(layer))

    def capacity(self, limit: Budget, layers: int, prompt_rows: int, new_rows: int = 0) -> Capacity:
        """Room for what is kept of any prompt of a bucket of T rows, and for new tokens.

        Args:
            limit: what is kept.
            layers: L.
            prompt_rows: T.
            new_rows: most new tokens that are quantized.
        """
        rows = limit.bucket(prompt_rows).layer_rows(prompt_rows)
        total = layers * rows
        kept = np.arange(prompt_rows + 1, dtype=np.int32)
        recent = np.asarray(self.recent_rows(kept, not limit.keeps_all))
        dense = min(total, layers * self.pivots + most_of_layers(recent, layers, rows))
        packed = min(total, most_of_layers(kept - recent, layers, rows))
        # Nothing has more bits than text: in some layers no row may have the widest width.
        wide_layers = sum(self.new_width(layer) == self.widths[0] for layer in range(layers))
        wide = min(packed, wide_layers * prompt_rows)
        each = per_word(self.widths[0])
        words = -(-wide // each) - (-(packed - wide) // self.lanes)
        # Each run of a layer may end inside of a word-row, or of a group of keys.
        ends = len(self.widths) * self.align
        words += layers * ends + 2
        reserved = -(-new_rows // (each * self.align)) * self.align
        return Capacity(
            round_up(dense, WORD_BLOCK),
            round_up(words, WORD_BLOCK),
            reserved,
            layer_dense=min(dense, self.pivots + int(recent.max())),
            layer_words=min(words, -(-prompt_rows // each) + ends) + reserved,
        )
