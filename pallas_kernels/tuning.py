"""Block sizes and launch parameters of the kernels, as data.

`measured.json` beside this file has those that were measured best: device kind → operation →
"dtype/size" → fields of a configuration. `python -m benchmarks.gpu_suite` writes a new one on a
GPU; what is not in it runs with the first of the operation's candidates.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp

from pallas_kernels.backends import current_device
from pallas_kernels.tiles import padded

FILE = Path(__file__).parent / "measured.json"


@dataclass(frozen=True)
class RowConfig:
    """How a kernel without products is launched, of which a program does one row.

    Attributes:
        num_warps: warps of one program.
    """

    num_warps: int
    num_stages: ClassVar[int] = 1


@dataclass(frozen=True)
class PrefillConfig:
    """How the prefill kernel is cut and launched.

    Attributes:
        block_q: query rows of one program.
        block_k: keys of one trip of its loop.
        num_warps: warps of one program.
        num_stages: how many trips are loaded ahead.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class WindowConfig:
    """How the kernels of the window scores are cut and launched.

    Attributes:
        block_rows: window rows of one product.
        block_keys: keys of one product.
        num_warps: warps of one program.
        num_stages: how many trips of a loop are loaded ahead.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel is cut and launched.

    Attributes:
        block_keys: cached rows of one trip of its loop.
        num_warps: warps of one program.
        num_stages: how many trips are loaded ahead.
    """

    block_keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PackedConfig:
    """How the decode kernel over packed rows is cut and launched.

    Attributes:
        block_words: word-rows of one trip of its loop over packed rows.
        block_keys: rows of full width of one trip.
        num_warps: warps of one program.
        num_stages: how many trips are loaded ahead.
    """

    block_words: int
    block_keys: int
    num_warps: int
    num_stages: int


CONFIGS: dict[str, Any] = {
    "prefill_attention": PrefillConfig,
    "window_scores": WindowConfig,
    "ragged_decode_attention": DecodeConfig,
    "quantized_decode_attention": PackedConfig,
    "add_rms_norm": RowConfig,
    "sample_tokens": RowConfig,
}
"""The configuration of each operation, by the name of its package."""


def candidates(operation: str, capability: int, dtype: Any, size: int) -> tuple[Any, ...]:
    """What may be the best for a kind of GPU, the default first; all compile without a spill.

    Args:
        operation: a name of `CONFIGS`.
        capability: compute capability in tenths, 80 or 90.
        dtype: of the inputs; without tensor cores, for float32, registers are the limit.
        size: head dim, width or vocabulary.
    """
    size = padded(size)
    hopper, exact = capability >= 90, jnp.dtype(dtype).itemsize == 4
    match operation:
        case "prefill_attention" if exact and size < 128:
            sizes = [(32, 64, 8, 2), (16, 64, 4, 2)][0 if hopper else 1 :]
        case "prefill_attention" if exact:
            sizes = [(32, 64, 8, 1), (16, 64, 8, 2)] if hopper else [(32, 32, 8, 2), (16, 32, 4, 2)]
        case "prefill_attention" if size < 128:
            sizes = [(128, 64, 4 if hopper else 8, 3), (128, 128, 8, 3), (64, 64, 4, 3)]
        case "prefill_attention" if hopper:
            sizes = [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)]
        case "prefill_attention":
            sizes = [(128, 32, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3)]
        case "window_scores" if exact:
            sizes = [(32, 32, 4, 2), (16, 32, 4, 2)]
        case "window_scores":
            sizes = [(64, 64, 4, 3), (64, 128, 4, 2), (32, 128, 4, 3)]
        case "ragged_decode_attention":
            sizes = [(32, 8, 2), (16, 4, 2)] if exact else [(64, 4, 4), (128, 4, 2), (64, 2, 3)]
        case "quantized_decode_attention":
            sizes = [(32, 32, 2, 2), (32, 32, 2, 3)]
        case "add_rms_norm":
            sizes = [(8,), (16,), (4,)] if size <= 4096 else [(16,)]
        case _:
            sizes = [(16,), (8,)] if size <= 2**15 else [(8,)]
    return tuple(CONFIGS[operation](*each) for each in sizes)


@functools.cache
def table() -> dict[str, Any]:
    """The whole of `measured.json`."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def key(dtype: Any, size: int) -> str:
    """The name of a case in the table: "bfloat16/128"."""
    return f"{jnp.dtype(dtype).name}/{size}"


def best(operation: str, dtype: Any, size: int) -> Any:
    """The configuration for the device of the program being traced.

    Args:
        operation: a name of `CONFIGS`.
        dtype: of the inputs.
        size: head dim, width or vocabulary.
    """
    device = current_device()
    default = candidates(operation, device.capability or 90, dtype, size)[0]
    measured = table().get(device.kind, {}).get(operation, {})
    return replace(default, **measured.get(key(dtype, padded(size)), {}))
