"""What this GPU can do: bytes moved and operations done per second, by the plainest programs."""

from typing import Any

import jax.numpy as jnp

from benchmarks import measure
from benchmarks.gpu_suite.stages import Context
from benchmarks.roofline import Device
from benchmarks.speed import limit


def ceilings(context: Context) -> dict[str, Any]:
    """The stage: copies and matrix products in both types, and a read."""
    best, rows = limit.measured("bfloat16", context.effort)
    rows += limit.measured("float32", context.effort)[1]
    context.save(rows=rows)
    rows.append(_read(context, 2**12 if context.dry else 2**30))
    return {
        "rows": rows,
        "copy_bytes_per_s": best.bandwidth,
        "matmul_ops_per_s": best.flops,
        "headline": f"copy {best.bandwidth / 1e12:.2f} TB/s, bf16 {best.flops / 1e12:.0f} TFLOP/s",
    }


def quick(context: Context) -> Device:
    """What the shares in other stages are shares of, measured anew in the caller's own process."""
    return limit.measured("bfloat16", context.effort)[0]


def _read(context: Context, size: int) -> dict[str, Any]:
    """Bytes per second of an operation that goes over `size` bytes once."""
    arrays = [(measure.normal(context.key(), (size // 4,), "float32"),) for _ in range(2)]
    programs = {"it": measure.chain(jnp.max, arrays)}
    found = measure.compare(programs, calls=2, effort=context.effort)["it"]
    if isinstance(found, Exception):
        raise found
    row = {"name": "largest", "dtype": "float32", "amount": size}
    return {**row, "per_s": size / found.seconds, **found.record()}
