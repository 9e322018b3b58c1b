"""The rows of a result: what was timed, beside its floor and beside the full cache."""

from collections.abc import Sequence
from typing import Any

from benchmarks.measure import L2_BYTES, Timing, reason
from benchmarks.roofline import Device, Stage
from benchmarks.speed.cases import Case
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.results.report import kv_bits


def described(case: Case, variant: CacheMethod) -> dict[str, Any]:
    """What a row is about."""
    return {
        "model": case.model,
        "context": case.context,
        "batch": case.batch,
        "method": variant.label,
        "budget": str(variant.limit),
        "kv_bits": kv_bits(variant.quantize),
        "dtype": case.dtype,
        "images": case.images,
        "synthetic_positions": case.synthetic_positions,
    }


def cache_of(row: dict[str, Any]) -> str:
    """How a row's cache is called, for people."""
    method, bits = row["method"], row.get("kv_bits")
    if bits and bits not in method:  # "full+rtn" of 2 or of 4 bits
        method = f"{method} {bits}"
    return method if method.startswith("full") else f"{method} {row['budget']}"


def row_of(
    stage: str,
    case: Case,
    variant: CacheMethod,
    found: Timing | Exception,
    work: Stage,
    limit: Device,
    **more: Any,
) -> dict[str, Any]:
    """One row: what was measured, or why there is nothing, beside the floor of the stage's work.

    What `more` says is left out where nothing was measured.
    """
    row = {"stage": stage, **described(case, variant)}
    if isinstance(found, Exception):
        return {**row, "exception": reason(found)}
    floor = work.floor(limit)
    # What a cache of the processor may hold does not come from memory: it has no such limit.
    cached = work.bytes < 2 * L2_BYTES and work.bytes / limit.bandwidth > floor / 2
    limits = {
        "bytes": round(work.bytes),
        "operations": round(work.operations),
        "floor_s": floor,
        "share": floor / found.seconds if found.seconds > 0 and not cached else None,
    }
    return {**row, **more, **limits, **found.record()}


def beside_full(rows: Sequence[dict[str, Any]]) -> None:
    """Give the rows of one stage their speed-up over the full cache, and the one of the floors.

    Args:
        rows: of one case, in any order, the full cache's among them.
    """
    full = next((row for row in rows if row["method"] == "full"), {})
    for row in rows:
        if row is not full and "seconds" in row and "seconds" in full:
            row["speedup"] = full["seconds"] / row["seconds"]
            row["ideal_speedup"] = full["floor_s"] / row["floor_s"]
            row["share_of_ideal"] = row["speedup"] / row["ideal_speedup"]
