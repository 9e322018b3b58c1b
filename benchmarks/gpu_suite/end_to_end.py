"""Whole models of the published shapes, random weights: the full cache against a tenth of it.

The cases, programs and rows are those of `benchmarks.speed`, `benchmarks.throughput` and
`benchmarks.peers`; here is what a GPU's ten minutes are spent on, the worthiest first.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmarks import throughput as largest
from benchmarks.gpu_suite.speed import quick
from benchmarks.gpu_suite.stages import ROOT, Context
from benchmarks.peers.compare import Plan as Peers
from benchmarks.peers.compare import compare
from benchmarks.roofline import WORKSPACE, Device
from benchmarks.speed import presets
from benchmarks.speed.cases import FULL, Case, Variants
from benchmarks.speed.decoding import CHUNKS
from benchmarks.speed.presets import PACKED, PACKED_TENTH, PAPER_MODEL, TENTH
from benchmarks.speed.rows import cache_of
from benchmarks.speed.run import Plan, measure_all
from vlcache_jax.models.families import init_params
from vlcache_jax.results.report import count_parameters

DRY_SCALE = 16
"""What a dry run divides the paper's contexts by; it runs one of its rows."""

DECODE = ((2048, 1), (2048, 32), (2048, 64), (8192, 64))
"""Context and batch of the decode steps that the bars are about."""

LONGEST = (32768, 24)
"""Those of the decode step from quantized caches, where the memory holds as many."""


FLAGS: tuple[tuple[str, ...], ...] = (
    (),
    ("--xla_gpu_enable_triton_gemm=false",),
    ("--xla_gpu_exhaustive_tiling_search=true",),
    ("--xla_gpu_enable_command_buffer=",),
    (),
)
"""What is compared: the default; narrow products by cuBLAS alone; a longer search of their tiles;
no command buffers (CUDA graphs), which shows what they are worth."""


def paper_decode(context: Context) -> dict[str, Any]:
    """The stage: decode steps of the paper's five rows."""
    return _paper(context, ("decode",))


def paper_whole(context: Context) -> dict[str, Any]:
    """The stage: prefill, what the method adds to it, and whole answers of the paper's rows."""
    return _paper(context, ("prefill", "end-to-end"))


def _paper(context: Context, stages: tuple[str, ...]) -> dict[str, Any]:
    size = ("float32", DRY_SCALE, [2048], [1]) if context.dry else ("bfloat16", 1, [], [])
    cases = presets.paper_cases(*size)
    limit = quick(context)
    result = _measure(context, cases, stages, limit)
    ratios = presets.paper_ratios(cases, result["rows"], limit)
    ratios = [row for row in ratios if row["ours"]]
    headline = "nothing ran"
    if ratios:
        best = max(ratios, key=lambda row: row["ours"])
        headline = (
            f"{best['stage']} {best['ours']:.2f}x at {best['context']} x {best['batch']}, "
            f"ideal {best['ideal']:.2f}x"
        )
    return {**result, "paper": ratios, "headline": headline}


def decode(context: Context) -> dict[str, Any]:
    """The stage: a decode step of the 7B model, full and a tenth."""
    sizes = ((128, 2),) if context.dry else DECODE
    cases = {size: _case(context, *size) for size in sizes}
    result = _measure(context, cases, ("decode",), quick(context))
    shares = [row["share"] for row in result["rows"] if row.get("share")]
    headline = f"{100 * min(shares):.0f} % of the limit at the least" if shares else "nothing ran"
    return {**result, "headline": headline}


def packed_decode(context: Context) -> dict[str, Any]:
    """The stage: a decode step from quantized caches, of as long a batch as all of them fit with.

    The full cache, a tenth, the full one in AKVQ's bits, and a tenth in them, in turns.
    """
    limit, case = quick(context), _case(context, *((128, 1) if context.dry else LONGEST))
    variants = (FULL, PACKED_TENTH)
    if not context.dry:
        variants = (FULL, TENTH, PACKED, PACKED_TENTH)
        case = replace(case, batch=min(case.batch, fitting(case, variants, limit)))
    result = _measure(context, {0: case}, ("decode",), limit, variants=variants)
    found = [
        f"{cache_of(row)} {row['speedup']:.2f}x, ideal {row['ideal_speedup']:.2f}x"
        for row in result["rows"]
        if "speedup" in row
    ]
    size = f"{case.context} x {case.batch}"
    return {**result, "headline": f"{size}: {'; '.join(found) or 'nothing to compare'}"}


def fitting(case: Case, variants: Variants, limit: Device) -> int:
    """Most sequences whose caches fit beside the weights, those of all variants; at least one."""
    weights = count_parameters(case.config)["total"] * jnp.dtype(case.dtype).itemsize
    steps = CHUNKS[-1] * case.chunk + 1
    each = sum(largest.held_bytes(case, variant, steps) for variant in variants)
    return max(1, int((limit.memory - weights - WORKSPACE) // each))


def profile(context: Context) -> dict[str, Any]:
    """The stage: where the time of a decode step and of a prefill goes, by named scope."""
    cases = {0: _case(context, *((128, 1) if context.dry else (8192, 8)))}
    with tempfile.TemporaryDirectory() as folder:
        result = _measure(context, cases, (), quick(context), Path(folder))
    return {**result, "headline": f"{len(result['profiles'])} programs traced"}


def throughput(context: Context) -> dict[str, Any]:
    """The stage: as many sequences as fit, prefilled a few at a time, then decoded together."""
    limit = quick(context)
    case = _case(context, *((128, 1) if context.dry else (8192, 2)))
    case = replace(case, new_tokens=4 if context.dry else 33)
    load = largest.Load(case, int(limit.memory), sequences=2 if context.dry else None)
    params, rows = init_params(case.config, dtype=jnp.dtype(case.dtype)), []
    for variant in (FULL, TENTH):
        rows.append(largest.run(load, variant, params, limit))
        context.save(rows=rows)
    largest.compare(rows)
    ratio = rows[-1].get("tokens_per_s_over_full")
    headline = "nothing to compare" if ratio is None else f"{ratio:.2f}x the tokens per second"
    return {"limit": asdict(limit), "rows": rows, "headline": headline}


def peers(context: Context) -> dict[str, Any]:
    """The stage: Hugging Face transformers and ours in turns, each in a process of its own."""
    plan = (
        Peers(context=256, new_tokens=3, repeats=2, static=False)
        if context.dry
        else Peers(PAPER_MODEL, 8192, 4, "bfloat16", static=False, repeats=10)
    )
    found = compare(plan)
    times = [row for row in found["ratios"] if row["stage"] == "decode" and row["speedup"]]
    headline = ", ".join(f"{row['ratio']} {row['speedup']:.2f}x" for row in times)
    return {**found, "headline": headline or "nothing ran"}


def flags(context: Context) -> dict[str, Any]:
    """The stage: a decode step of the 7B model, full and a tenth, under each set of flags.

    XLA reads its flags once, when a process begins: so every set is a run of `benchmarks.speed`.
    The first one runs again at the end, so that a drift of the device shows.
    """
    rows: list[dict[str, Any]] = []
    sets = FLAGS[:1] if context.dry else FLAGS
    for chosen in sets:
        rows += [{"flags": " ".join(chosen)}] if context.late() else _run(context, chosen)
        context.save(rows=rows)
    timed = [row for row in rows if row.get("seconds")]
    best = min(timed, key=lambda row: row["seconds"], default=None)
    headline = f"fastest with {best['flags'] or 'no flag'}" if best else "nothing ran"
    return {"ok": bool(timed), "rows": rows, "headline": headline}


def _run(context: Context, chosen: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of `benchmarks.speed`; one with the last words of the process where it failed."""
    name, sizes, repeats = (
        ("demo-small", ("--context", "64", "--batch", "1", "--new-tokens", "4"), "2")
        if context.dry
        else (PAPER_MODEL, ("--context", "2048", "--batch", "1", "--batch", "32"), "20")
    )
    command = [sys.executable, "-m", "benchmarks.speed", "--json", "--stage", "decode"]
    command += ["--model", name, *sizes, "--repeats", repeats]
    given = " ".join([os.environ.get("XLA_FLAGS", ""), *chosen]).strip()
    environment = {**os.environ, "XLA_FLAGS": given}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    own = {"flags": " ".join(chosen)}
    if done.returncode:
        return [{**own, "error": done.stderr.strip()[-2000:]}]
    return [{**own, **row} for row in json.loads(done.stdout)["rows"]]


def _case(context: Context, rows: int, batch: int) -> Case:
    if context.dry:
        return Case("demo-small", rows, batch, "float32", chunk=2, new_tokens=4)
    return Case(PAPER_MODEL, rows, batch, "bfloat16")


def _measure(
    context: Context,
    cases: dict[Any, Case],
    stages: Sequence[str],
    limit: Device,
    trace: Path | None = None,
    variants: Variants = (FULL, TENTH),
) -> dict[str, Any]:
    """Run cases one by one while there is time: "rows", "profiles", how many were "not_run"."""
    plan, about = Plan(cases, variants, tuple(stages), context.effort), {"limit": asdict(limit)}

    def save(found: dict[str, Any]) -> None:
        context.save(**about, **found)

    return about | measure_all(plan, limit, trace=trace, step=save, late=context.late)
