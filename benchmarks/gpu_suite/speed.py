"""How fast the operations are, beside their floor: bytes and operations at full rate.

Bytes are those really needed (each input read once, each result written once), operations those
that the mask leaves. All at the sizes of LLaVA-1.6-Mistral-7B unless a case says otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.gpu_suite import inputs
from benchmarks.gpu_suite.checks import NOT_RUN
from benchmarks.gpu_suite.stages import Context
from benchmarks.roofline import Device, Work
from benchmarks.speed import limit
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantized_decode_attention import append_and_attend as append_packed
from pallas_kernels.ragged_decode_attention import append_and_attend
from pallas_kernels.window_scores import window_scores
from vlcache_jax.cache.compact import compact


def ceilings(context: Context) -> dict[str, Any]:
    """The stage of what the GPU can do: copies and matrix products, in both types."""
    best, rows = limit.measured("bfloat16", context.effort)
    context.save(rows=rows)
    return {
        "rows": rows + limit.measured("float32", context.effort)[1],
        "copy_bytes_per_s": best.bandwidth,
        "matmul_ops_per_s": best.flops,
        "headline": f"copy {best.bandwidth / 1e12:.2f} TB/s, bf16 {best.flops / 1e12:.0f} TFLOP/s",
    }


def quick(context: Context) -> Device:
    """What shares are shares of, measured anew in each stage's own process."""
    return limit.measured("bfloat16", context.effort)[0]


@dataclass(frozen=True)
class Ways:
    """Several ways of doing the same.

    Attributes:
        programs: by their names.
        work: of a call.
        calls: in each program.
        others: the work of programs that read something else.
        more: what their rows also say.
    """

    programs: dict[str, Callable[[], Any]]
    work: Work
    calls: int
    others: dict[str, Work] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


def run(
    context: Context,
    cases: Mapping[str, Callable[[], Ways]],
    headline: Callable[[list[dict[str, Any]]], str],
) -> dict[str, Any]:
    """The result of a stage: a row for each way of each case, whose inputs are made in turn."""
    device = quick(context)
    rows: list[dict[str, Any]] = []
    for words, make in cases.items():
        if context.late():
            rows.append({"case": words, "ok": None, "note": NOT_RUN})
            continue
        ways = make()
        found = measure.compare(ways.programs, calls=ways.calls, effort=context.effort)
        for name, timing in found.items():
            row = row_of(words, name, timing, ways.others.get(name, ways.work), device)
            rows.append({**row, **ways.more})
        del ways
        context.save(rows=rows)
    return {
        "rows": rows,
        "copy_bytes_per_s": device.bandwidth,
        "matmul_ops_per_s": device.flops,
        "ok": all(row["ok"] is not False for row in rows),
        "not_run": sum(row.get("note") == NOT_RUN for row in rows),
        "headline": headline(rows),
    }


def row_of(
    case: str, name: str, found: measure.Timing | Exception, work: Work, device: Device
) -> dict[str, Any]:
    """What was measured of one way of a case, beside what the device allows."""
    row = {"case": case, "backend": name, "bytes": work.bytes, "ops": work.operations}
    if isinstance(found, NotImplementedError):
        return {**row, "ok": None, "note": f"not available: {found}"}
    if isinstance(found, Exception):
        return {**row, "ok": False, "exception": measure.reason(found)}
    rates = {
        "bytes_per_s": work.bytes / found.seconds,
        "ops_per_s": work.operations / found.seconds,
        "floor_s": work.floor(device),
        "share": work.floor(device) / found.seconds,
    }
    return {**row, "ok": True, **rates, **found.record()}


def _best_share(rows: list[dict[str, Any]]) -> str:
    best = max((row["share"] for row in rows if "share" in row), default=0.0)
    return f"at best {best:.0%} of the copy's bandwidth"


# Decode attention, over rows of full width and over packed ones.


def decode(context: Context) -> dict[str, Any]:
    """The stage of the decode attention."""
    cases = (
        (inputs.CacheCase(2, 8, 40, uneven=True, xla=True),) if context.dry else inputs.DECODE_CASES
    )
    makers = {str(case): partial(_decode_ways, context, case) for case in cases}
    return run(context, makers, _best_share)


def _decode_ways(context: Context, case: inputs.CacheCase) -> Ways:
    found = inputs.cache_sets(context, case)
    attend = append_packed if case.runs else append_and_attend
    backends = ("triton", "xla") if case.xla else ("triton",)
    programs = {name: found.chain(attend, backend=name, **case.settings) for name in backends}
    return Ways(programs, found.work, len(found.sets))


def packed(context: Context) -> dict[str, Any]:
    """The stage: packed rows, and as many rows of the pool in bfloat16, in turns."""
    cases = (inputs.PACKED_DRY,) if context.dry else inputs.PACKED_CASES

    def ways_of(case: inputs.CacheCase) -> Ways:
        own = _decode_ways(context, case)
        same = inputs.CacheCase(case.batch, case.kv_heads, case.packed + case.rows)
        pool = inputs.cache_sets(context, same, layers=own.calls)
        own.programs["pool"] = pool.chain(append_and_attend, backend="triton", **same.settings)
        more = {"full_bytes": pool.work.bytes}
        return replace(own, others={"pool": pool.work}, more=more)

    def headline(rows: list[dict[str, Any]]) -> str:
        return _best_share([row for row in rows if row.get("backend") == "triton"])

    return run(context, {str(case): partial(ways_of, case) for case in cases}, headline)


# Prompts.


def prefill(context: Context) -> dict[str, Any]:
    """The stage of the prefill attention, causal, batch 1."""
    lengths = (32,) if context.dry else (8192, 2048, 32768)

    def ways_of(length: int) -> Ways:
        found = inputs.prefill_sets(context, length)
        names = {"triton": "triton", "cudnn": "cudnn", "automatic": None}
        if length == min(lengths):
            names["xla"] = "xla"
        programs = {
            name: found.chain(prefill_attention, backend=way) for name, way in names.items()
        }
        return Ways(programs, found.work, len(found.sets))

    def headline(rows: list[dict[str, Any]]) -> str:
        found = [
            f"{row['backend']} {row['ops_per_s'] / 1e12:.0f}"
            for row in rows
            if row["ok"] and row["case"] == prefill_case(8192)
        ]
        return f"at 8192: {', '.join(found) or 'nothing'} TFLOP/s"

    makers = {prefill_case(length): partial(ways_of, length) for length in lengths}
    return run(context, makers, headline)


def prefill_case(length: int) -> str:
    """The name of a length in the results."""
    return f"causal, {length} tokens"


def scores(context: Context) -> dict[str, Any]:
    """The stage of the window scores: 50 rows as VL-Cache wants them, all rows as H2O does."""
    cases = [(8192, 50), (2048, 50), (32768, 50), (8192, 8192)]
    cases = [(40, 9), (24, 24)] if context.dry else cases

    def ways_of(length: int, window: int) -> Ways:
        found = inputs.scores_sets(context, length, window)
        threshold = None if window == length else 0.01
        backends = ("triton", "xla") if length == min(cases)[0] else ("triton",)
        programs = {
            name: found.chain(window_scores, threshold=threshold, backend=name) for name in backends
        }
        return Ways(programs, found.work, len(found.sets))

    def headline(rows: list[dict[str, Any]]) -> str:
        timed = [row for row in rows if row["ok"] and row["backend"] == "triton"]
        times = (f"{1e6 * row['seconds']:.0f}" for row in timed)
        return f"us per layer: {', '.join(times)}"

    makers = {f"{n} tokens, window {w}": partial(ways_of, n, w) for n, w in cases}
    return run(context, makers, headline)


# Compaction.


def compaction(context: Context) -> dict[str, Any]:
    """The stage of `compact`: a tenth of 8192 tokens of 32 layers."""
    layers, kv_heads, length, head_dim = (
        (2, 2, 40, 16) if context.dry else (32, inputs.KV_HEADS, 8192, inputs.HEAD_DIM)
    )
    capacity = -(-layers * length // 10 // 128) * 128
    shares = np.random.default_rng(context.seed).uniform(0.5, 1.5, layers)
    budgets = np.minimum(capacity * shares / shares.sum(), length).astype(np.int32)[None]

    @jax.jit
    def order(key: jax.Array) -> jax.Array:
        drawn = jax.random.uniform(key, (1, layers, kv_heads, length))
        return jnp.argsort(drawn, axis=-1).astype(jnp.int32)

    def call(order: jax.Array, budgets: jax.Array, visual: jax.Array, k: Any, v: Any) -> Any:
        return compact(k, v, order, budgets, visual, capacity)

    def ways() -> Ways:
        size = inputs.DTYPE, 1, kv_heads, layers * length, head_dim
        full = tuple(inputs.drawing(context)(*size) for _ in range(2))
        visual = jnp.zeros((1, layers), jnp.float32)
        sets = [(order(context.key()), jnp.asarray(budgets), visual) for _ in range(2)]
        moved = 4 * capacity * kv_heads * (2 * head_dim + 1)
        found = inputs.Sets(sets, Work(moved), full)
        return Ways({"xla": found.chain(call)}, found.work, len(sets))

    return run(
        context, {f"{layers} layers of {length} tokens to {capacity} rows": ways}, _best_share
    )
