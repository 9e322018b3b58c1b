"""What this GPU can do: bytes moved and operations done per second, by the plainest programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import measure
from benchmarks.device import memory_limit
from benchmarks.gpu_suite.stages import Context
from benchmarks.roofline import Device

COPIES: dict[str, tuple[str, Callable[[jax.Array], jax.Array]]] = {
    "copy of float32": ("float32", jnp.copy),
    "float32 + 1": ("float32", lambda x: x + 1),
    "bfloat16 + 1": ("bfloat16", lambda x: x + 1),
}
"""Programs that read an array and write one of the same size."""


def ceilings(context: Context) -> dict[str, Any]:
    """The stage: copies, a read, and matrix products in both types."""
    size = 2**12 if context.dry else 2**30
    rows: list[dict[str, Any]] = []
    for name, (dtype, operation) in COPIES.items():
        rows.append(_move(context, name, dtype, operation, size, passes=2))
    rows.append(_move(context, "largest float32", "float32", jnp.max, size, passes=1))
    side = 64 if context.dry else 8192
    rows.append(_multiply(context, "bfloat16", side))
    rows.append(_multiply(context, "float32", side // 2))
    context.save(rows=rows)
    best = _best(context, rows)
    return {
        "rows": rows,
        "copy_bytes_per_s": best.bandwidth,
        "matmul_ops_per_s": best.flops,
        "headline": f"copy {best.bandwidth / 1e12:.2f} TB/s, bf16 {best.flops / 1e12:.0f} TFLOP/s",
    }


def quick(context: Context) -> Device:
    """What the shares in other stages are shares of, measured anew in the caller's own process."""
    size, side = (2**12, 64) if context.dry else (2**30, 8192)
    rows = [
        _move(context, name, dtype, operation, size, passes=2)
        for name, (dtype, operation) in COPIES.items()
    ]
    return _best(context, [*rows, _multiply(context, "bfloat16", side)])


def _best(context: Context, rows: list[dict[str, Any]]) -> Device:
    copy = max(row["bytes_per_s"] for row in rows if "bytes_per_s" in row and row["passes"] == 2)
    matmul = max(row["ops_per_s"] for row in rows if row.get("dtype") == "bfloat16/matmul")
    memory = memory_limit() or 2**30
    return Device(str(context.head.get("device")), copy, matmul, memory, "measured")


def _move(
    context: Context,
    name: str,
    dtype: str,
    operation: Callable[[jax.Array], jax.Array],
    size: int,
    passes: int,
) -> dict[str, Any]:
    """Bytes per second of an operation that goes over `size` bytes once or twice."""
    shape = (size // jnp.dtype(dtype).itemsize,)
    sets = [(measure.normal(context.key(), shape, dtype),) for _ in range(2)]
    timing = _time(context, operation, sets)
    return {
        "name": name,
        "dtype": dtype,
        "passes": passes,
        "bytes": passes * size,
        "bytes_per_s": passes * size / timing.seconds,
        **timing.record(),
    }


def _multiply(context: Context, dtype: str, side: int) -> dict[str, Any]:
    """Operations per second of a square product; of float32, really in float32."""
    precision = lax.Precision.HIGHEST if dtype == "float32" else None
    sets = [
        (
            measure.normal(context.key(), (side, side), dtype),
            measure.normal(context.key(), (side, side), dtype),
        )
        for _ in range(2)
    ]
    timing = _time(context, lambda a, b: jnp.dot(a, b, precision=precision), sets)
    return {
        "name": f"{dtype} product, {side} x {side} x {side}",
        "dtype": f"{dtype}/matmul",
        "ops": 2 * side**3,
        "ops_per_s": 2 * side**3 / timing.seconds,
        **timing.record(),
    }


def _time(context: Context, operation: Callable[..., Any], sets: list[Any]) -> measure.Timing:
    programs = {"it": measure.chain(operation, sets)}
    found = measure.compare(programs, calls=len(sets), effort=context.effort)["it"]
    if isinstance(found, Exception):
        raise found
    return found
