"""What a quantized cache takes: rows of each width, and bytes of them with their scales."""

import jax.numpy as jnp
import numpy as np

from benchmarks.models import WINDOW
from benchmarks.roofline import BFLOAT16
from vlcache_jax.cache.budget import Budget
from vlcache_jax.cache.quantize import Quantizer
from vlcache_jax.cache.quantizers import AKVQ
from vlcache_jax.config import TextConfig
from vlcache_jax.report import packed_bytes, row_bytes


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


def kept_bytes(
    config: TextConfig, quantizer: Quantizer | None, rows: np.ndarray, dtype: jnp.dtype = BFLOAT16
) -> int:
    """Bytes of rows: those of full width, codes, scales and shifts; no padding.

    Args:
        config: the decoder.
        quantizer: how they are quantized; None where all have full width.
        rows: of each width, int [..., L, 1 + widths], as of `rows_by_width`.
        dtype: of those of full width.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    return int(flat[:, 0].sum()) * row_bytes(config, dtype) + sum(
        packed_bytes(config, quantizer, flat[:, 1:])
    )


def bits_of(
    config: TextConfig, quantizer: Quantizer | None, rows: np.ndarray, dtype: jnp.dtype = BFLOAT16
) -> float:
    """`stored_bits` of such rows: of a value, where one of full width has 16, whatever its type.

    Args:
        config: as in `kept_bytes`.
        quantizer: likewise.
        rows: likewise.
        dtype: likewise.
    """
    full = int(rows.sum()) * row_bytes(config, dtype)
    return 16 * kept_bytes(config, quantizer, rows, dtype) / full


def quantized_rows(
    config: TextConfig, quantizer: Quantizer, context: int, budget: float = 1.0, text: int = WINDOW
) -> np.ndarray:
    """`rows_by_width` of a prompt's cache, its budget divided equally, int [L, 1 + widths].

    Args:
        config: the decoder.
        quantizer: for this decoder.
        context: tokens of the prompt.
        budget: share of the cache that is kept.
        text: text tokens behind the picture.
    """
    kept = np.full((config.num_layers,), max(1, round(budget * context)))
    evicts = not Budget.parse(budget).keeps_all
    return rows_by_width(quantizer, kept, evicts=evicts, text=text)
