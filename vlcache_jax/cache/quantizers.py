"""Quantizers: how many bits each kept row of the cache is given.

    AKVQ   the Walsh-Hadamard transform, and bits by what a layer attends to (AKVQ-VL)
    RTN    round to nearest: the same bits for all, without the transform by default: a control
    KIVI   keys by channel, values by token, the latest rows in full: a control

A quantizer is a setting of a cache method. Alone it stands for the full cache, quantized; with a
method that evicts, what is kept is quantized. Their common settings, and how rows are rounded:
quantize.py.

AKVQ-VL (Su et al. 2025, arXiv 2501.15021) has no public code. Choices of this library, where the
paper leaves it open: pivots are the prompt's tokens with the largest activation in the residual
stream that enters the layer; of what an eviction method keeps, a tenth of each layer's rows (the
latest) and the surviving pivots have full width.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.packing import BITS
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.quantize import WORD_BLOCK, Quantizer
from vlcache_jax.cache.select import Rows, recent_rows
from vlcache_jax.errors import short, whole_numbers

TSA_LAYERS: dict[str, tuple[int, ...]] = {"llama": (0, 1), "mistral": ()}
"""Text-salient layers by the kind of decoder, as the paper found them; of others none is known."""


@dataclass(frozen=True, kw_only=True)
class AKVQ(Quantizer):
    """AKVQ-VL (Su et al. 2025): 2 bits, more for what a layer attends to.

    Text-salient (TSA) layers: recent tokens 16 bit, other text 4, visual tokens 2. All others
    (pivot-salient, PSA): recent and pivot tokens 16 bit, everything else 2.

    Attributes:
        bits: width of what is not salient.
        text_bits: of the text in TSA layers.
        recent: last tokens of the prompt at full width, where nothing is evicted.
        recent_ratio: the same as a share of each layer's rows, where a method evicts.
        pivots: tokens with massive activations at full width, the same for all heads.
        tsa_layers: which layers are text-salient; None for what was calibrated for the checkpoint,
            else by the kind of decoder as the paper has it (`TSA_LAYERS`).
    """

    name: ClassVar[str] = "akvq"

    transform: bool = True
    text_bits: int = 4
    recent: int = 128
    recent_ratio: float = 0.1
    pivots: int = 15
    tsa_layers: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.tsa_layers is not None:
            layers = whole_numbers(self.tsa_layers, "tsa_layers")
            object.__setattr__(self, "tsa_layers", layers)
        if self.pivots < 0 or not 0 <= self.recent_ratio <= 1:
            raise ValueError(
                f"pivots={self.pivots} must be at least 0, recent_ratio={self.recent_ratio} from "
                "0 to 1"
            )
        if self.text_bits not in BITS or self.text_bits < self.bits:
            raise ValueError(
                f"text_bits={self.text_bits} must be one of {BITS}, at least bits={self.bits}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """One for text where there are TSA layers, and one for the others."""
        if not self.tsa_layers or self.text_bits == self.bits:
            return (self.bits,)
        return self.text_bits, self.bits

    def for_decoder(
        self, kind: str, layers: int, tsa_layers: tuple[int, ...] | None = None
    ) -> "AKVQ":
        """With the TSA layers of that decoder, where none are set.

        Raises:
            ValueError: one of the TSA layers is not there.
        """
        chosen = tsa_layers if self.tsa_layers is None else self.tsa_layers
        if chosen is None:
            chosen = tuple(i for i in TSA_LAYERS.get(kind, ()) if i < layers)
        if wrong := [i for i in chosen if i >= layers]:
            raise ValueError(
                f"tsa_layers {short(wrong)} are not layers of a model that has {layers}: choose "
                f"from 0 to {layers - 1}"
            )
        return replace(self, tsa_layers=chosen)

    def recent_rows(self, kept: Rows, evicts: bool) -> Rows:
        """A tenth of what a method kept, or so many of all."""
        return recent_rows(kept, self.recent_ratio) if evicts else kept.clip(max=self.recent)

    def dense(self, prompt: Prompt, salience: jax.Array | None) -> jax.Array | None:
        """The pivots of the PSA layers."""
        count = min(self.pivots, prompt.rows)
        if salience is None or count == 0:
            return None
        position = jnp.arange(prompt.rows, dtype=jnp.int32)
        inside = position < prompt.length[:, None, None]
        chosen = lax.top_k(jnp.where(inside, salience, -jnp.inf), count)[1]  # [B, L, count]
        pivots = jnp.any(position == chosen[..., None], axis=-2)
        return pivots & ~self._tsa(prompt)[:, None]

    def columns(self, prompt: Prompt) -> jax.Array:
        """Text of TSA layers in the first column, all else in the last."""
        if len(self.widths) == 1:
            return super().columns(prompt)
        wide = self._tsa(prompt)[:, None] & ~prompt.visual[:, None, :]  # [B, L, T]
        return jnp.where(wide, 0, 1)

    def new_width(self, layer: int) -> int:
        """Those of text in a TSA layer."""
        return self.text_bits if layer in (self.tsa_layers or ()) else self.bits

    def _tsa(self, prompt: Prompt) -> jax.Array:
        """Which layers are text-salient, bool [L]."""
        return jnp.array([i in (self.tsa_layers or ()) for i in range(prompt.layers)])


@dataclass(frozen=True, kw_only=True)
class RTN(Quantizer):
    """Round to nearest, all rows alike. A control; with `transform`, a plain alternative."""

    name: ClassVar[str] = "rtn"


@dataclass(frozen=True, kw_only=True)
class KIVI(Quantizer):
    """KIVI (Liu et al. 2024): keys by channel, values by token, the latest rows in full.

    The rows before the latest are whole groups, so up to `group` - 1 more have full width.

    Attributes:
        group: rows of a group of keys, and values of a group of values.
        recent: rows at full width, at least (KIVI's residual length).
    """

    name: ClassVar[str] = "kivi"

    group: int = 32
    clip: float | None = 1.0
    recent: int = 128

    def __post_init__(self):
        super().__post_init__()
        # Whole word-rows, and a part of those that are packed at a time.
        if self.group % self.lanes or WORD_BLOCK % self.align:
            most = WORD_BLOCK * self.lanes
            raise ValueError(
                f"group={self.group} must be {self.lanes} rows, or 2, 4, 8... times that, to {most}"
            )

    @property
    def key_group(self) -> int:
        """A group's rows."""
        return self.group

    def recent_rows(self, kept: Rows, evicts: bool) -> Rows:
        """So many, and what fills no group of keys."""
        return kept - (kept - self.recent).clip(min=0) // self.group * self.group


QUANTIZERS: dict[str, Quantizer] = {
    **{str(bits): RTN(bits=bits, transform=True) for bits in BITS},
    "akvq": AKVQ(),
    "kivi": KIVI(),
}
"""The quantizers by the name that the command line uses; a number is that many bits for every row,
with the transform."""


def make_quantizer(name: str | None) -> Quantizer | None:
    """A quantizer by its name: "2", "4", "8", "akvq", "kivi"; None for None or "16".

    Raises:
        ValueError: there is no such quantizer.
    """
    if name is None or name == "16":
        return None
    if name not in QUANTIZERS:
        raise ValueError(f"kv bits {name!r}: choose one of {', '.join(QUANTIZERS)}, or 16")
    return QUANTIZERS[name]
