"""Decode steps under other compiler flags, each set in a process of its own.

XLA reads its flags once, when a process begins: so every set is a run of `benchmarks.speed`. The
first one runs again at the end, so that a drift of the device shows.
"""

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.gpu_suite.stages import ROOT, Context
from benchmarks.speed.presets import PAPER_MODEL

SETS: tuple[tuple[str, ...], ...] = (
    (),
    ("--xla_gpu_enable_triton_gemm=false",),
    ("--xla_gpu_exhaustive_tiling_search=true",),
    ("--xla_gpu_enable_command_buffer=",),
    (),
)
"""What is compared: the default; narrow products by cuBLAS alone; a longer search of their tiles;
no command buffers (CUDA graphs), which shows what they are worth."""


def compare(context: Context) -> dict[str, Any]:
    """The stage: a decode step of the 7B model, full and a tenth, under each set of flags."""
    rows: list[dict[str, Any]] = []
    sets = SETS[:1] if context.dry else SETS
    for flags in sets:
        rows += [{"flags": " ".join(flags)}] if context.late() else _run(context, flags)
        context.save(rows=rows)
    timed = [row for row in rows if row.get("seconds")]
    best = min(timed, key=lambda row: row["seconds"], default=None)
    headline = f"fastest with {best['flags'] or 'no flag'}" if best else "nothing ran"
    return {"ok": bool(timed), "rows": rows, "headline": headline}


def _run(context: Context, flags: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of `benchmarks.speed`; one with the last words of the process where it failed."""
    name, sizes, repeats = (
        ("demo", ("--context", "64", "--batch", "1", "--new-tokens", "4"), "2")
        if context.dry
        else (PAPER_MODEL, ("--context", "2048", "--batch", "1", "--batch", "32"), "20")
    )
    command = [sys.executable, "-m", "benchmarks.speed", "--json", "--stage", "decode"]
    command += ["--model", name, *sizes, "--repeats", repeats]
    given = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
    environment = {**os.environ, "XLA_FLAGS": given}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    own = {"flags": " ".join(flags)}
    if done.returncode:
        return [{**own, "error": done.stderr.strip()[-2000:]}]
    return [{**own, **row} for row in json.loads(done.stdout)["rows"]]
