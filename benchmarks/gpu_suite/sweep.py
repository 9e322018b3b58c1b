"""Which block sizes are best: writes `measured.json`, to be copied to pallas_kernels/.

Timed are each operation's candidates and a wider list, at one shape each, in bfloat16; of float16
the candidates alone. A configuration counts if it compiles and gives what the default gives.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.environment import write_result
from benchmarks.gpu_suite import checks, speed, speed_packed, speed_prompt
from benchmarks.gpu_suite.stages import Context
from pallas_kernels import tiles, tuning
from pallas_kernels.add_rms_norm import triton as norm_triton
from pallas_kernels.backends import current_device
from pallas_kernels.prefill_attention import triton as prefill_triton
from pallas_kernels.quantized_decode_attention import triton as packed_triton
from pallas_kernels.ragged_decode_attention import triton as decode_triton
from pallas_kernels.window_scores import triton as scores_triton

GAIN = 0.99
"""A configuration takes the default's place if its time is below this share of the default's."""

# More than the candidates; some may not fit. In the order of the fields of each Config.
PREFILL = [
    (128, 64, 8, 2), (128, 64, 8, 4), (128, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 3),
    (64, 64, 4, 2), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 8, 2), (128, 32, 4, 4),
    (128, 32, 8, 4), (64, 32, 4, 4), (256, 64, 8, 2), (256, 32, 8, 3),
]  # fmt: skip
DECODE = [
    (32, 2, 4), (32, 4, 4), (32, 4, 6), (64, 2, 4), (64, 4, 3), (64, 4, 5), (64, 4, 6), (64, 8, 3),
    (64, 8, 4), (128, 4, 3), (128, 4, 4), (128, 8, 2), (128, 8, 4), (256, 4, 2), (256, 8, 2),
]  # fmt: skip
PACKED = [
    (16, 32, 1, 2), (16, 32, 1, 3), (16, 32, 2, 2), (32, 16, 2, 2), (32, 32, 2, 4), (32, 32, 4, 2),
    (32, 64, 2, 2), (64, 32, 2, 2), (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2),
]  # fmt: skip
SCORES = [
    (64, 64, 4, 2), (64, 64, 8, 3), (64, 128, 8, 2), (64, 128, 8, 3), (32, 64, 4, 3),
    (32, 128, 4, 2), (32, 128, 8, 3), (64, 256, 8, 2), (32, 256, 8, 2), (16, 128, 4, 3),
    (16, 256, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2),
]  # fmt: skip
NORM = [(1,), (2,), (4,), (8,), (16,), (32,)]
SPLITS = (1, 2, 4, 8, 16, 33, 66)
DECODE_KERNEL = speed.again(decode_triton.append_and_attend)


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
        sets: input sets.
        shared: arrays of all sets.
        carries: as in `measure.program_of`.
    """

    operation: str
    dtype: str
    size: int
    words: str
    ways: dict[str, Callable[..., Any]]
    configs: dict[str, Any]
    sets: list[Any]
    shared: tuple[Any, ...] = ()
    carries: bool = False


def run(context: Context, makers: Sequence[Callable[[], Case]]) -> dict[str, Any]:
    """Time the configurations of each case, and write the best to the table."""
    rows: list[dict[str, Any]] = []
    gains: list[str] = []
    for done, make in enumerate(makers):
        context.progress(done, len(makers))
        if context.late():
            rows.append({"case": f"number {done + 1}", "ok": None, "note": checks.NOT_RUN})
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
    base = {"operation": case.operation, "dtype": case.dtype, "case": case.words}
    failures: dict[str, str] = {}
    programs: dict[str, Callable[[], Any]] = {}
    expected: np.ndarray | None = None
    workers = 2 if context.dry else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:  # compiling is most of the time
        compiled = {name: pool.submit(_compile, way, case) for name, way in case.ways.items()}
        for name, program in compiled.items():
            try:
                launch = partial(program.result(), case.sets, case.shared)
                ours = np.asarray(jax.tree.leaves(launch()[0])[0])
                expected = ours if expected is None else expected
                error = checks.relative_error(ours, expected)
                if not error <= checks.BOUNDS[case.dtype]:
                    failures[name] = f"differs from the default by {error}"
                    continue
                programs[name] = launch
            except Exception as problem:  # it need not fit
                failures[name] = f"{type(problem).__name__}: {problem}"[:500]
    times = measure.compare(programs, calls=len(case.sets), effort=effort)
    rows = []
    for number, name in enumerate(case.ways):
        row = {**base, "config": name, "default": number == 0}
        found = times.get(name)
        if isinstance(found, measure.Timing):
            rows.append({**row, "ok": True, **found.record()})
        else:
            rows.append({**row, "ok": False, "exception": failures.get(name, str(found))})
    return rows


def _compile(way: Callable[..., Any], case: Case) -> Any:
    program = measure.program_of(way, carries=case.carries)
    return program.lower(case.sets, case.shared).compile()


def _write(context: Context, case: Case, config: Any) -> None:
    """Add one entry to the table of this run, which begins as the committed one."""
    path = context.out / "measured.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else tuning.table()
    table = json.loads(json.dumps(table))  # the committed one is cached, and others' to keep
    entries = table.setdefault(context.head["device"], {}).setdefault(case.operation, {})
    entries[tuning.key(case.dtype, case.size)] = asdict(config)
    write_result(path, table)


def _configs(
    context: Context, operation: str, dtype: str, size: int, wider: list[Any]
) -> list[Any]:
    """The candidates, the default first, and in bfloat16 the wider list."""
    capability = current_device().capability or 90
    found = list(tuning.candidates(operation, capability, dtype, size))
    if dtype == "bfloat16":
        found += [tuning.CONFIGS[operation](*fields) for fields in wider]
    return list(dict.fromkeys(found))[: 2 if context.dry else None]


def _cases(context: Context, make: Callable[..., Case], sizes: Sequence[int]) -> list[Any]:
    if context.dry:
        return [partial(make, context, "bfloat16", 16)]
    dtypes = ("bfloat16", "float16")
    return [partial(make, context, dtype, size) for dtype in dtypes for size in sizes]


def _case(
    operation: str,
    dtype: str,
    size: int,
    kernel: Callable[..., Any],
    configs: Sequence[Any],
    sets: list[Any],
    shared: tuple[Any, ...] = (),
    *,
    carries: bool = False,
) -> Case:
    names = {checks.short(config): config for config in configs}
    ways = {name: partial(kernel, config=config) for name, config in names.items()}
    return Case(operation, dtype, size, f"{dtype}/{size}", ways, names, sets, shared, carries)


def prefill(context: Context) -> dict[str, Any]:
    """The stage of the prefill attention: causal, 8192 tokens."""
    return run(context, _cases(context, _prefill_case, (128, 64)))


def _prefill_case(context: Context, dtype: str, head_dim: int) -> Case:
    length = 32 if context.dry else 8192
    sets, _ = speed_prompt.prefill_sets(context, length, head_dim, dtype)
    lengths = jnp.array([length], jnp.int32)
    kernel = partial(prefill_triton.prefill_attention, causal=True, scale=head_dim**-0.5)
    configs = _configs(context, "prefill_attention", dtype, head_dim, PREFILL)
    return _case("prefill_attention", dtype, head_dim, kernel, configs, sets, (lengths,))


def scores(context: Context) -> dict[str, Any]:
    """The stage of the window scores: 50 rows of 8192 tokens."""
    return run(context, _cases(context, _scores_case, (128, 64)))


def _scores_case(context: Context, dtype: str, head_dim: int) -> Case:
    length, window = (40, 9) if context.dry else (8192, 50)
    sets, _ = speed_prompt.scores_sets(context, length, window, head_dim, dtype)
    kernel = partial(scores_triton.window_scores, threshold=0.01, scale=head_dim**-0.5)
    configs = _configs(context, "window_scores", dtype, head_dim, SCORES)
    return _case("window_scores", dtype, head_dim, kernel, configs, sets)


def decode(context: Context) -> dict[str, Any]:
    """The stage of the decode attention: 512 MB of keys and values; then numbers of splits."""
    makers = _cases(context, _decode_case, (128, 64))
    shapes = [(8, 16384), (8, 819), (1, 8192)]
    makers += [partial(_splits_case, context, *s) for s in ([(2, 40)] if context.dry else shapes)]
    return run(context, makers)


def _decode_case(context: Context, dtype: str, head_dim: int) -> Case:
    shape = speed.DecodeCase(*((2, 8, 40) if context.dry else (8, 8, 16384)))
    sets, shared, _ = speed.decode_sets(context, shape, head_dim, dtype)
    kernel = partial(DECODE_KERNEL, scale=head_dim**-0.5, most_rows=shape.rows)
    name = "ragged_decode_attention"
    configs = _configs(context, name, dtype, head_dim, DECODE)
    return _case(name, dtype, head_dim, kernel, configs, sets, shared, carries=True)


def _splits_case(context: Context, batch: int, rows: int) -> Case:
    """What `splits.split_count` should be: the kernel's own choice first."""
    shape = speed.DecodeCase(batch, 8, rows)
    sets, shared, _ = speed.decode_sets(context, shape)
    head_dim = sets[0][0].qkv.shape[-1]
    kernel = partial(DECODE_KERNEL, scale=head_dim**-0.5, most_rows=rows)
    ways: dict[str, Callable[..., Any]] = {"splits as it chooses": kernel}
    for splits in SPLITS[: 2 if context.dry else None]:
        ways[f"splits {splits}"] = partial(kernel, splits=splits)
    case = "ragged_decode_attention", "bfloat16", tiles.padded(head_dim), str(shape)
    return Case(*case, ways, {}, sets, shared, carries=True)


def packed(context: Context) -> dict[str, Any]:
    """The stage of the decode attention over packed rows: 512 MB in bfloat16, at 2 bits."""
    return run(context, _cases(context, _packed_case, (128, 64)))


def _packed_case(context: Context, dtype: str, head_dim: int) -> Case:
    shape = speed_packed.DRY if context.dry else speed_packed.CASES[0]
    sets, shared, _ = speed_packed.packed_sets(context, shape, head_dim, dtype)
    kernel = partial(
        speed.again(packed_triton.append_and_attend),
        transform=True,
        scale=head_dim**-0.5,
        most_rows=speed_packed.SIDES[0],
        most_words=sum(shape.words),
    )
    name = "quantized_decode_attention"
    configs = _configs(context, name, dtype, head_dim, PACKED)
    return _case(name, dtype, head_dim, kernel, configs, sets, shared, carries=True)


def norm(context: Context) -> dict[str, Any]:
    """The stage of the addition and norm: 64 rows."""
    return run(context, _cases(context, _norm_case, (4096, 8192)))


def _norm_case(context: Context, dtype: str, width: int) -> Case:
    shape = (8 if context.dry else 64, 1, width)
    sets = [
        tuple(measure.normal(context.key(), s, dtype) for s in (shape, shape, (width,)))
        for _ in range(measure.sets_for(4 * shape[0] * width * 2, dry=context.dry))
    ]
    kernel = partial(norm_triton.add_rms_norm, eps=1e-5)
    configs = _configs(context, "add_rms_norm", dtype, width, NORM)
    return _case("add_rms_norm", dtype, width, kernel, configs, sets)
