"""Which block sizes are best: writes `measured.json`, to be copied to pallas_kernels/.

Timed are each operation's candidates and a wider list, at one shape each, in bfloat16; of float16
the candidates alone. A configuration counts if it compiles and gives what the default gives.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.environment import write_result
from benchmarks.gpu_suite import checks, inputs
from benchmarks.gpu_suite.inputs import CacheCase, Sets
from benchmarks.gpu_suite.stages import Context
from benchmarks.operations import candidates, kernel, short
from benchmarks.roofline import Work
from pallas_kernels import tiles, tuning

GAIN = 0.99
"""A configuration takes the default's place if its time is below this share of the default's."""

WIDER: dict[str, list[tuple[int, ...]]] = {
    "prefill_attention": [
        (128, 64, 8, 2), (128, 64, 8, 4), (128, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 3),
        (64, 64, 4, 2), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 8, 2), (128, 32, 4, 4),
        (128, 32, 8, 4), (64, 32, 4, 4), (256, 64, 8, 2), (256, 32, 8, 3),
    ],
    "ragged_decode_attention": [
        (32, 2, 4), (32, 4, 4), (32, 4, 6), (64, 2, 4), (64, 4, 3), (64, 4, 5), (64, 4, 6),
        (64, 8, 3), (64, 8, 4), (128, 4, 3), (128, 4, 4), (128, 8, 2), (128, 8, 4), (256, 4, 2),
        (256, 8, 2),
    ],
    "quantized_decode_attention": [
        (16, 32, 1, 2), (16, 32, 1, 3), (16, 32, 2, 2), (32, 16, 2, 2), (32, 32, 2, 4),
        (32, 32, 4, 2), (32, 64, 2, 2), (64, 32, 2, 2), (64, 32, 4, 2), (64, 32, 4, 3),
        (64, 64, 4, 2), (128, 64, 8, 2),
    ],
    "window_scores": [
        (64, 64, 4, 2), (64, 64, 8, 3), (64, 128, 8, 2), (64, 128, 8, 3), (32, 64, 4, 3),
        (32, 128, 4, 2), (32, 128, 8, 3), (64, 256, 8, 2), (32, 256, 8, 2), (16, 128, 4, 3),
        (16, 256, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2),
    ],
    "add_rms_norm": [(1,), (2,), (4,), (8,), (16,), (32,)],
}  # fmt: skip
"""More than the candidates; some may not fit. In the order of the fields of each Config."""

SPLITS = (1, 2, 4, 8, 16, 33, 66)


@dataclass(frozen=True)
class Case:
    """One entry of the table.

    Attributes:
        operation: its name.
        dtype: of the inputs.
        size: head dim or width, padded to a power of two.
        words: the shape.
        ways: the operation with a configuration, by its name; the default first.
        configs: by the same names; empty where nothing is written to the table.
        inputs: of the calls.
    """

    operation: str
    dtype: str
    size: int
    words: str
    ways: dict[str, Callable[..., Any]]
    configs: dict[str, Any]
    inputs: Sets


def run(context: Context, makers: Sequence[Callable[[], Case]]) -> dict[str, Any]:
    """Time the configurations of each case, and write the best to the table."""
    rows: list[dict[str, Any]] = []
    gains: list[str] = []
    for number, make in enumerate(makers):
        if context.late():
            rows.append({"case": f"number {number + 1}", "ok": None, "note": checks.NOT_RUN})
            continue
        case = make()
        found = _time(context, case)
        rows += found
        context.save(rows=rows)
        timed = [row for row in found if row["ok"]]
        if not timed or not timed[0]["default"]:
            continue
        fastest, default = min(timed, key=lambda row: row["seconds"]), timed[0]
        best = fastest if fastest["seconds"] < GAIN * default["seconds"] else default
        gains.append(
            f"{case.words}: {best['config']} ({default['seconds'] / best['seconds']:.2f}x)"
        )
        if case.configs:
            _write(context, case, case.configs[best["config"]])
    not_run = sum(row.get("note") == checks.NOT_RUN for row in rows)
    return {"rows": rows, "ok": bool(gains), "not_run": not_run, "headline": "; ".join(gains)}


def _time(context: Context, case: Case) -> list[dict[str, Any]]:
    """A row for each configuration, the default first."""
    effort = measure.DRY if context.dry else measure.BRIEF
    arrays = case.inputs.sets, case.inputs.shared
    found: dict[str, measure.Timing | Exception] = {}
    programs: dict[str, Callable[[], Any]] = {}
    expected: np.ndarray | None = None

    def compiled(way: Callable[..., Any]) -> Any:
        operation = case.inputs.operation(way)
        program = measure.program_of(operation, carries=case.inputs.carries)
        return program.lower(*arrays).compile()

    workers = 2 if context.dry else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:  # compiling is most of the time
        futures = {name: pool.submit(compiled, way) for name, way in case.ways.items()}
        for name, program in futures.items():
            try:
                launch = partial(program.result(), *arrays)
                ours = np.asarray(jax.tree.leaves(launch()[0])[0])
                expected = ours if expected is None else expected
                error = checks.relative_error(ours, expected)
                if not error <= checks.BOUNDS[case.dtype]:
                    raise ArithmeticError(f"differs from the default by {error}")
                programs[name] = launch
            except Exception as problem:  # it need not fit
                found[name] = problem.with_traceback(None)
    found |= measure.compare(programs, calls=len(case.inputs.sets), effort=effort)
    rows = []
    for number, name in enumerate(case.ways):
        row = {"operation": case.operation, "dtype": case.dtype, "case": case.words}
        row |= {"config": name, "default": number == 0}
        timing = found[name]
        if isinstance(timing, Exception):
            rows.append({**row, "ok": False, "exception": measure.reason(timing)[:500]})
        else:
            rows.append({**row, "ok": True, **timing.record()})
    return rows


def _write(context: Context, case: Case, config: Any) -> None:
    """Add one entry to the table of this run, which begins as the committed one."""
    path = context.out / "measured.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else tuning.table()
    table = json.loads(json.dumps(table))  # the committed one is cached, and others' to keep
    entries = table.setdefault(context.head["device"], {}).setdefault(case.operation, {})
    entries[tuning.key(case.dtype, case.size)] = asdict(config)
    write_result(path, table)


def _stage(
    operation: str,
    make: Callable[[Context, str, int], tuple[Sets, dict[str, Any]]],
    sizes: Sequence[int] = (128, 64),
    more: Callable[[Context], list[Callable[[], Case]]] = lambda context: [],
) -> Callable[[Context], dict[str, Any]]:
    """The stage of an operation.

    Args:
        operation: its name.
        make: makes inputs, of a type and a size, and the settings of the kernel.
        sizes: head dims or widths.
        more: makes other cases.
    """

    def case(context: Context, dtype: str, size: int) -> Case:
        sets, settings = make(context, dtype, size)
        found = list(candidates(operation, dtype, size))
        if dtype == "bfloat16":
            found += [tuning.CONFIGS[operation](*each) for each in WIDER[operation]]
        found = list(dict.fromkeys(found))[: 2 if context.dry else None]
        configs = {short(config): config for config in found}
        run = kernel(operation, size, **settings)
        ways = {name: partial(run, config=config) for name, config in configs.items()}
        return Case(operation, dtype, tiles.padded(size), f"{dtype}/{size}", ways, configs, sets)

    def stage(context: Context) -> dict[str, Any]:
        each = product(("bfloat16", "float16"), sizes)
        each = [("bfloat16", 16)] if context.dry else each
        makers = [partial(case, context, *one) for one in each]
        return run(context, [*makers, *more(context)])

    return stage


def _prefill_inputs(context: Context, dtype: str, size: int) -> tuple[Sets, dict[str, Any]]:
    """Causal, 8192 tokens."""
    length = 32 if context.dry else 8192
    sets = inputs.prefill_sets(context, length, size, dtype)
    return replace(sets, shared=(jnp.array([length], jnp.int32),)), {"causal": True}


def _scores_inputs(context: Context, dtype: str, size: int) -> tuple[Sets, dict[str, Any]]:
    """50 rows of 8192 tokens."""
    return inputs.scores_sets(context, *((40, 9) if context.dry else (8192, 50)), size, dtype), {}


def _decode_inputs(context: Context, dtype: str, size: int) -> tuple[Sets, dict[str, Any]]:
    """512 MB of keys and values."""
    shape = CacheCase(*((2, 8, 40) if context.dry else (8, 8, 16384)))
    return inputs.cache_sets(context, shape, size, dtype), shape.settings


def _packed_inputs(context: Context, dtype: str, size: int) -> tuple[Sets, dict[str, Any]]:
    """512 MB in bfloat16, at 2 bits."""
    shape = inputs.PACKED_DRY if context.dry else inputs.PACKED_CASES[0]
    return inputs.cache_sets(context, shape, size, dtype), shape.settings


def _norm_inputs(context: Context, dtype: str, size: int) -> tuple[Sets, dict[str, Any]]:
    """64 rows."""
    shape = (8 if context.dry else 64, 1, size)
    sets: list[Any] = [
        tuple(measure.normal(context.key(), sides, dtype) for sides in (shape, shape, (size,)))
        for _ in range(measure.sets_for(4 * shape[0] * size * 2, dry=context.dry))
    ]
    return Sets(sets, Work(0)), {}


def _splits_case(context: Context, batch: int, rows: int) -> Case:
    """What `splits.split_count` should be: the kernel's own choice first."""
    operation, shape = "ragged_decode_attention", CacheCase(batch, 8, rows)
    sets = inputs.cache_sets(context, shape)
    head_dim = sets.sets[0][0].qkv.shape[-1]
    run = kernel(operation, head_dim, **shape.settings)
    ways: dict[str, Callable[..., Any]] = {"splits as it chooses": run}
    for splits in SPLITS[: 2 if context.dry else None]:
        ways[f"splits {splits}"] = partial(run, splits=splits)
    return Case(operation, "bfloat16", tiles.padded(head_dim), str(shape), ways, {}, sets)


def _splits_cases(context: Context) -> list[Callable[[], Case]]:
    shapes = [(2, 40)] if context.dry else [(8, 16384), (8, 819), (1, 8192)]
    return [partial(_splits_case, context, *shape) for shape in shapes]


prefill = _stage("prefill_attention", _prefill_inputs)
scores = _stage("window_scores", _scores_inputs)
decode = _stage("ragged_decode_attention", _decode_inputs, more=_splits_cases)
packed = _stage("quantized_decode_attention", _packed_inputs)
norm = _stage("add_rms_norm", _norm_inputs, (4096, 8192))
