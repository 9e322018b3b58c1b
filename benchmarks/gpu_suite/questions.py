"""Questions about what was run before, and long prompts in chunks; see `benchmarks.sessions`."""

from typing import Any

import jax.numpy as jnp

from benchmarks.gpu_suite.stages import Context
from benchmarks.sessions import NEW, QUESTION, Subject, measured
from benchmarks.speed.presets import PAPER_MODEL, TENTH
from vlcache_jax.models.families import init_params
from vlcache_jax.running.parts import CHUNK_ROWS
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.stores import STORES

_PROGRAMS = Programs()
"""Of all stages of a process: what one has compiled, the next one has."""


def sessions(context: Context) -> dict[str, Any]:
    """The stage: the second question about one picture and about many, beside a new prefill."""
    return _measure(context, (2900, 32000), STORES)


def chunks(context: Context) -> dict[str, Any]:
    """The stage: a prompt of 32k run whole and in chunks."""
    return _measure(context, (32000,), (), (32,) if context.dry else (CHUNK_ROWS, 4 * CHUNK_ROWS))


def _measure(
    context: Context, visual: tuple[int, ...], stores: tuple[str, ...], chunks: tuple[int, ...] = ()
) -> dict[str, Any]:
    """The rows of each number of visual tokens, while there is time."""
    name, dtype = ("demo-small", "float32") if context.dry else (PAPER_MODEL, "bfloat16")
    asked = [
        Subject(name, count, QUESTION, TENTH, dtype, _PROGRAMS)
        for count in ((64,) if context.dry else visual)
    ]
    params, rows = init_params(asked[0].case.config, dtype=jnp.dtype(dtype)), []
    for number, subject in enumerate(asked):
        if number and context.late():
            break
        own = stores[:1] if context.dry else stores
        rows += measured(subject, params, context.effort, own, chunks)
        context.save(rows=rows)
    timed = [row for row in rows if "speedup" in row]
    said = [f"{row['way']} {row['speedup']:.2f}x at {row['visual_tokens']}" for row in timed]
    ok = all("exception" not in row for row in rows if row["way"] == NEW)
    return {"ok": ok, "rows": rows, "headline": "; ".join(said) or "nothing to compare"}
