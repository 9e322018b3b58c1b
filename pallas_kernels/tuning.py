"""The committed table of block sizes that were measured best.

`measured.json` beside this file: device kind → operation → "dtype/padded head dim" → block sizes,
the fields of the operation's `Config`. `python -m benchmarks.gpu_suite` writes a new one on a GPU;
what is not in it runs with the first of the operation's candidates.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp

from pallas_kernels.backends import current_device

Config = TypeVar("Config")

FILE = Path(__file__).parent / "measured.json"


@functools.cache
def table() -> dict[str, Any]:
    """The whole file."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def key(dtype: Any, head_dim: int) -> str:
    """The name of a case: "bfloat16/128"."""
    return f"{jnp.dtype(dtype).name}/{head_dim}"


def measured(operation: str, device: str, dtype: Any, head_dim: int) -> dict[str, int] | None:
    """Block sizes measured on a device of this kind; None where there are none.

    Args:
        operation: name of the kernel.
        device: the device's kind, "NVIDIA H200".
        dtype: of the keys and values.
        head_dim: padded to a power of two.
    """
    return table().get(device, {}).get(operation, {}).get(key(dtype, head_dim))


def best(
    operation: str, candidates: Callable[[int, Any, int], tuple[Config, ...]], dtype: Any, size: int
) -> Config:
    """Block sizes for the device of the program being traced.

    Args:
        operation: name of the kernel.
        candidates: of its config.py; a device that is not in the table gets the first.
        dtype: of the keys and values.
        size: head dim, padded to a power of two.
    """
    device = current_device()
    default: Any = candidates(device.capability or 90, dtype, size)[0]
    return replace(default, **(measured(operation, device.kind, dtype, size) or {}))
