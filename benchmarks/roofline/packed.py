"""What a quantized cache takes: rows of each width, and bytes of them with their scales."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from benchmarks.models import WINDOW
from benchmarks.roofline import BFLOAT16
from vlcache_jax.cache.budget import Budget
from vlcache_jax.cache.quantize import Quantizer
from vlcache_jax.cache.quantizers import AKVQ, make_quantizer
from vlcache_jax.models.config import ModelConfig, TextConfig
from vlcache_jax.results.report import kept_bytes, row_bytes


def rows_by_width(
    quantizer: Quantizer, kept: np.ndarray, *, evicts: bool, text: int = WINDOW
) -> np.ndarray:
    """Rows of full width and of each width of the quantizer, int [..., L, 1 + widths].

    The most that there can be: as though all text were kept, which is the end of the prompt, and
    every pivot, none of which is recent, so far as there is room.

    Args:
        quantizer: for a decoder (`Quantizer.for_decoder`).
        kept: rows of each layer, int [..., L].
        evicts: whether these are what a method kept of more.
        text: text tokens of a prompt, all behind its picture.
    """
    dense = quantizer.recent_rows(kept, evicts)
    wide = np.zeros_like(dense)
    if isinstance(quantizer, AKVQ):
        tsa = np.isin(np.arange(kept.shape[-1]), quantizer.tsa_layers or ())
        if len(quantizer.widths) > 1:
            wide = np.where(tsa, np.clip(np.minimum(text, kept) - dense, 0, None), 0)
        dense = dense + np.where(tsa, 0, np.minimum(quantizer.pivots, kept - dense))
    runs = (wide, kept - dense - wide) if len(quantizer.widths) > 1 else (kept - dense,)
    return np.stack([dense, *runs], axis=-1)


def bits_of(
    config: TextConfig, quantizer: Quantizer | None, rows: np.ndarray, dtype: jnp.dtype = BFLOAT16
) -> float:
    """Bits of a value with the scales that belong to it, of the rows that `kept_bytes` takes."""
    full = int(rows.sum()) * row_bytes(config, dtype)
    return 16 * kept_bytes(config, quantizer, rows, dtype) / full


def quantized_rows(
    config: TextConfig, quantizer: Quantizer, context: int, budget: float = 1.0
) -> np.ndarray:
    """`rows_by_width` of a prompt's cache, its budget divided equally, int [L, 1 + widths]."""
    kept = np.full((config.num_layers,), max(1, round(budget * context)))
    return rows_by_width(quantizer, kept, evicts=not Budget.parse(budget).keeps_all)


@dataclass(frozen=True)
class Cache:
    """One way to keep the cache.

    Attributes:
        budget: share of it that is kept.
        quantizer: how what is kept is quantized, for the model's decoder; None for not at all.
    """

    budget: float = 1.0
    quantizer: Quantizer | None = None

    def kept(self, config: ModelConfig, context: int) -> tuple[float, float]:
        """The budget, and the bits of a value of the pool with all that belongs to it."""
        if self.quantizer is None:
            return self.budget, 16.0
        rows = quantized_rows(config.text, self.quantizer, context, self.budget)
        return self.budget, bits_of(config.text, self.quantizer, rows)

    def rows(self, config: ModelConfig, context: int) -> dict[str, float]:
        """Rows of a layer by their bits, the mean over the layers; empty without a quantizer."""
        if self.quantizer is None:
            return {}
        mean = quantized_rows(config.text, self.quantizer, context, self.budget).mean(axis=0)
        return {
            str(bits): float(rows)
            for bits, rows in zip((16, *self.quantizer.widths), mean, strict=True)
        }


Caches = Mapping[str, Cache]
"""By the cache's name."""


def caches(config: ModelConfig, budget: float, kv_bits: str) -> Caches:
    """The caches that are compared: full and the budget, and both of them quantized.

    `kv_bits` is a name that `make_quantizer` takes, "16" for none.
    """
    found = {"full": Cache()}
    if budget < 1:
        found[f"{100 * budget:g} %"] = Cache(budget)
    quantizer = make_quantizer(kv_bits)
    if quantizer is not None:
        own = quantizer.for_decoder(config.text.kind, config.text.num_layers)
        for name, cache in list(found.items()):
            found[f"{name} + {kv_bits}"] = Cache(cache.budget, own)
    return found
