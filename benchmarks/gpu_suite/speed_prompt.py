"""How fast the operations on a prompt are: see speed.py."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.gpu_suite import ceilings
from benchmarks.gpu_suite.checks import NOT_RUN
from benchmarks.gpu_suite.speed import (
    DTYPE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    result,
    rows_of,
)
from benchmarks.gpu_suite.stages import ROOT, Context
from benchmarks.roofline import Device, Work
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.window_scores import window_scores

# Prefill attention.


def prefill(context: Context) -> dict[str, Any]:
    """The stage of the prefill attention, causal, batch 1; PyTorch's in a process of its own."""
    limit = ceilings.quick(context)
    lengths = (32,) if context.dry else (8192, 2048, 32768)
    short = min(lengths)
    rows: list[dict[str, Any]] = []
    for done, length in enumerate(lengths):
        context.progress(done, len(lengths) + 1)
        if context.late():
            rows.append({"case": prefill_case(length), "ok": None, "note": NOT_RUN})
            continue
        sets, work = prefill_sets(context, length)
        ways: dict[str, dict[str, Any]] = {
            "triton": {"backend": "triton"},
            "cudnn": {"backend": "cudnn"},
            "automatic": {"backend": None},
        }
        if length == short:
            ways["xla"] = {"backend": "xla"}
        programs: dict[str, Callable[[], Any]] = {}
        for name, options in ways.items():
            programs[name] = measure.chain(functools.partial(prefill_attention, **options), sets)
        rows += rows_of(context, prefill_case(length), work, limit, programs, len(sets))
        del sets, programs
        context.save(rows=rows)
    rows += _torch_rows(context, lengths, limit)
    rates = {(row["case"], row["backend"]): row["ops_per_s"] for row in rows if row["ok"]}
    found = [
        f"{name} {rates[prefill_case(8192), name] / 1e12:.0f}"
        for name in ("triton", "cudnn")
        if (prefill_case(8192), name) in rates
    ]
    return result(rows, limit, f"at 8192: {', '.join(found) or 'nothing'} TFLOP/s")


def prefill_case(length: int) -> str:
    """The name of a length in the results."""
    return f"causal, {length} tokens"


def prefill_sets(
    context: Context, length: int, head_dim: int = HEAD_DIM, dtype: str = DTYPE
) -> tuple[list[Any], Work]:
    """Input sets (q, k, v), and the work of one."""
    heads, kv_heads = (4, 2) if context.dry else (HEADS, KV_HEADS)
    head_dim = 16 if context.dry else head_dim
    numbers = 2 * length * (heads + kv_heads) * head_dim  # q, k, v and the result
    size = numbers * jnp.dtype(dtype).itemsize
    sets = [
        tuple(
            measure.normal(context.key(), (1, length, n, head_dim), dtype)
            for n in (heads, kv_heads, kv_heads)
        )
        for _ in range(measure.sets_for(size, dry=context.dry))
    ]
    return sets, Work(size, 4 * heads * head_dim * length * length // 2)


def _torch_rows(context: Context, lengths: Sequence[int], limit: Device) -> list[dict[str, Any]]:
    """PyTorch's attention: in another process, since two frameworks in one share libraries."""
    rows = []
    found: dict[str, Any] = {}
    why = "a dry run has no GPU"
    if not context.dry:
        command = [sys.executable, "-m", "benchmarks.gpu_suite.torch_sdpa", *map(str, lengths)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=ROOT)
            why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
        except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
            why = f"{type(error).__name__}: {error}"
    for length in lengths:
        row = {"case": prefill_case(length), "backend": "torch"}
        times = found.get(str(length))
        if times is None:
            rows.append({**row, "ok": None, "note": f"not available: {why}"})
            continue
        work = Work(0, 4 * HEADS * HEAD_DIM * length * length // 2)
        seconds = float(np.median(times["samples"]))
        rate = {"ops_per_s": work.operations / seconds, "share": work.floor(limit) / seconds}
        rows.append({**row, "ok": True, "seconds": seconds, **rate, **times})
    return rows


# Window scores.


def scores(context: Context) -> dict[str, Any]:
    """The stage of the window scores: 50 rows as VL-Cache wants them, all rows as H2O does."""
    limit = ceilings.quick(context)
    cases = [(8192, 50), (2048, 50), (32768, 50), (8192, 8192)]
    if context.dry:
        cases = [(40, 9), (24, 24)]
    rows: list[dict[str, Any]] = []
    for done, (length, window) in enumerate(cases):
        context.progress(done, len(cases))
        words = f"{length} tokens, window {window}"
        if context.late():
            rows.append({"case": words, "ok": None, "note": NOT_RUN})
            continue
        sets, work = scores_sets(context, length, window)
        threshold = None if window == length else 0.01
        shortest = length == min(case[0] for case in cases)
        programs: dict[str, Callable[[], Any]] = {}
        for backend in ("triton", "xla") if shortest else ("triton",):
            way = functools.partial(window_scores, threshold=threshold, backend=backend)
            programs[backend] = measure.chain(way, sets)
        rows += rows_of(context, words, work, limit, programs, len(sets))
        del sets, programs
        context.save(rows=rows)
    times = [f"{1e6 * row['seconds']:.0f}" for row in rows if row.get("backend") == "triton"
             and row["ok"]]  # fmt: skip
    return result(rows, limit, f"us per layer: {', '.join(times)}")


def scores_sets(
    context: Context, length: int, window: int, head_dim: int = HEAD_DIM, dtype: str = DTYPE
) -> tuple[list[Any], Work]:
    """Input sets (q, k, start, lengths), and the work of one: one pass over K."""
    heads, kv_heads = (4, 2) if context.dry else (HEADS, KV_HEADS)
    head_dim = 16 if context.dry else head_dim
    read = (window * heads + length * kv_heads) * head_dim * jnp.dtype(dtype).itemsize
    sets = [
        (
            measure.normal(context.key(), (1, window, heads, head_dim), dtype),
            measure.normal(context.key(), (1, length, kv_heads, head_dim), dtype),
            jnp.array([length - window], jnp.int32),
            jnp.array([length], jnp.int32),
        )
        for _ in range(measure.sets_for(read, dry=context.dry))
    ]
    pairs = window * (length - window) + window * (window + 1) // 2
    return sets, Work(read + 4 * kv_heads * length, 2 * heads * head_dim * pairs)
