"""Decode attention of one layer alone, on a CPU: `python -m benchmarks.cpu_decode`.

In turns with it: the sum of the whole pool, the least that reading it costs, and with
`--beside PATH` the attention of another checkout. Offsets and lengths differ between sequences.
"""

import importlib
import sys
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from benchmarks import device, measure
from benchmarks.command import AsJson, Force, Out, bad_input, check_out, finish
from benchmarks.documents import RESULTS, Part, table
from benchmarks.documents import measured as where_measured
from benchmarks.environment import commit_of, environment
from pallas_kernels.ragged_decode_attention import xla

KV_HEADS, HEAD_DIM, TAIL = 8, 64, 128
OWN, OTHER, SUM = "attention", "before", "sum of the pool"
"""What is timed."""


def checkout(path: Path) -> ModuleType:
    """The attention of another checkout, loaded beside this one's."""
    package = xla.__name__.split(".")[0]
    own = {name: sys.modules.pop(name) for name in [*sys.modules] if name.startswith(package)}
    sys.path.insert(0, str(path.resolve(strict=True)))
    try:
        return importlib.import_module(xla.__name__)
    finally:
        del sys.path[0]
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]
        sys.modules.update(own)


def arrays(context: int, batch: int, group: int, share: float, dtype: str) -> tuple[Any, ...]:
    """Arguments of `attend_segments`: offsets, and where not all is kept lengths, are random.

    The pool has an eighth of rows to spare, and half of the tail is in use.
    """
    rng, capacity = np.random.default_rng(0), context + context // 8
    length = context * share * (rng.uniform(0.5, 1.5, batch) if share < 1 else np.ones(batch))
    bounds = rng.uniform(0, capacity - length), length, np.full(batch, TAIL // 2)
    offset, length, fill = (jnp.asarray(x, jnp.int32) for x in bounds)
    q, k, v, *tail = (
        measure.normal(jax.random.key(seed), (batch, KV_HEADS, rows, HEAD_DIM), dtype)
        for seed, rows in enumerate((group, capacity, capacity, TAIL, TAIL))
    )
    return q, k, v, offset, length, *tail, fill


def measured(case: dict[str, Any], modules: dict[str, ModuleType], repeats: int) -> dict[str, Any]:
    """Times of the attention of each module, by name, and of the sum; `case` is of `arrays`."""

    def attend(module: ModuleType, *given: jax.Array) -> jax.Array:
        found = module.attend_segments(*given, scale=HEAD_DIM**-0.5)
        return module.online_softmax.finish(found)

    given = arrays(**case)
    programs: dict[str, Any] = {name: partial(attend, module) for name, module in modules.items()}
    programs[SUM] = lambda q, k, v, *_: jnp.sum(k) + jnp.sum(v)
    timed = {name: partial(jax.jit(program), *given) for name, program in programs.items()}
    found: Any = measure.compare(timed, calls=1, effort=measure.Effort(repeats=repeats))
    pool = given[1].nbytes + given[2].nbytes
    share = int(given[4].sum() + given[7].sum()) / (case["batch"] * given[1].shape[2])
    times = {name: timing.record() for name, timing in found.items()}
    return {**case, "bytes": round(pool * share), "pool_bytes": pool, "times": times}


@where_measured
def part(result: dict[str, Any]) -> str:
    """The table of docs/performance.md: the median of each time, and the least in brackets."""
    names = list(result["rows"][0]["times"])
    lines = []
    for row in result["rows"]:
        size = f"{row['context']:,} x {row['batch']}, {row['group']} queries, {row['dtype']}"
        kept = "all" if row["share"] == 1 else f"{row['share']:.0%}"
        times = [row["times"][name] for name in names]
        cells = [f"{1e3 * t['seconds']:.2f} ({1e3 * t['spread'][0]:.2f}) ms" for t in times]
        lines.append([size, kept, *cells, f"{row['bytes'] / times[0]['seconds'] / 1e9:.1f} GB/s"])
    return table(["context x batch", "kept", *names, f"read by the {OWN}"], lines)


SECTION = Part("decode-attention", part, (RESULTS / "cpu" / "decode_attention.json",))


def main(
    size: Annotated[list[str] | None, typer.Option(help="As 8192x8; several times.")] = None,
    group: Annotated[list[int] | None, typer.Option(help="Query heads of a kv head.")] = None,
    share: Annotated[list[float] | None, typer.Option(help="Of the context, kept.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 by default.")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Samples of each timing.")] = 20,
    beside: Annotated[Path | None, typer.Option(help="Another checkout.")] = None,
    as_json: AsJson = False,
    out: Out = None,
    force: Force = False,
) -> None:
    """Time decode attention of 8 sequences at 8k and of one at 1k, from all rows and from a tenth.

    Beside another commit: git worktree add ../before COMMIT;
    python -m benchmarks.cpu_decode --beside ../before
    """
    check_out(out, force=force)
    with bad_input():
        modules = {OWN: xla} if beside is None else {OWN: xla, OTHER: checkout(beside)}
        sizes = [tuple(map(int, each.split("x"))) for each in size or ["8192x8", "1024x1"]]
    rows = []
    for case in product(sizes, group or [1, 2, 4], share or [1.0, 0.1], dtype or ["float32"]):
        values = dict(zip(("group", "share", "dtype"), case[1:], strict=True))
        context, batch = case[0]
        rows.append(measured({"context": context, "batch": batch, **values}, modules, repeats))
    other = {} if beside is None else {OTHER: commit_of(beside)}
    result = {**environment(), **device.describe(need_gpu=False), **other, "rows": rows}
    finish(result, part(result), as_json=as_json, out=out)


if __name__ == "__main__":
    typer.run(main)
