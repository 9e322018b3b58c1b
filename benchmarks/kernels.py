"""What the Pallas kernels become as machine code: `python -m benchmarks.kernels --offline`.

Every kernel is compiled for every type, head dim and candidate of its configuration, for an A100
and an H200 (sm_80, sm_90), without a GPU: registers, spills, shared memory, tensor-core
instructions. A row is ok where nothing spills, the shared memory is within what a block of that GPU
may have, and tensor cores are used where they should be. Speed needs a GPU: benchmarks.gpu_suite.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.ahead_of_time import GPUS
from benchmarks.command import bad_input, check_known, check_out
from benchmarks.environment import added, environment, write_result
from benchmarks.triton_offline import KernelError, compile_kernels
from pallas_kernels import (
    add_rms_norm,
    prefill_attention,
    quantized_decode_attention,
    ragged_decode_attention,
    sample_tokens,
    window_scores,
)
from pallas_kernels.packing import per_word
from pallas_kernels.rows import NewToken, PackedRows, Segment, Tail
from pallas_kernels.tuning import CONFIGS, candidates

ARCHITECTURES = {"sm_80": "a100", "sm_90": "h200"}
"""What is compiled for, and a GPU that is one."""

WITHOUT_PRODUCTS = ("merge_splits", "add_rms_norm")
"""Kernels whose code has no tensor-core instruction; of float32 none has any, all others do."""

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (32, 64, 80, 96, 128)
WIDTHS = (1024, 4096, 7168)
"""Of the residual stream; a row's `head_dim` for the norm, whose rows are not heads."""
VOCABULARIES = (4096, 32000, 151936)
"""A row's `head_dim` for the draw of a token."""
BATCH, HEADS, KV_HEADS, LENGTH, WINDOW, TAIL = 2, 32, 8, 4096, 512, 128
MEAN_ROWS = LENGTH // 10


class Packed(NamedTuple):
    """What is asked of the kernel over packed rows.

    Attributes:
        bits: width of each run.
        group: query heads of a kv head.
        groups: of channels that have a scale of their own.
        splits: parts of the layer's rows.
    """

    bits: tuple[int, ...] = (2,)
    group: int = HEADS // KV_HEADS
    groups: int = 1
    splits: int = 8

    def __str__(self) -> str:
        changed = {k: v for k, v in self._asdict().items() if v != self._field_defaults[k]}
        return ", ".join(f"{name} {value}" for name, value in changed.items()) or "2 bits"


PACKED = (
    Packed(),
    Packed(splits=1),
    Packed(bits=(4, 2)),
    Packed(bits=(8,)),
    Packed(group=1),
    Packed(groups=2),
)
"""The first one is compiled for all types, head dims and configurations; the others, since each of
them takes long, in bfloat16 with heads of 128 and the default configuration alone."""


@dataclass(frozen=True)
class Case:
    """One program with kernels.

    Attributes:
        operation: the package of the kernels.
        variant: what is asked of the operation.
        dtype: of the inputs.
        head_dim: H.
        config: block sizes.
        arch: a name of `ARCHITECTURES`.
        function: the program.
        args: its arguments, trees of shapes.
    """

    operation: str
    variant: str
    dtype: str
    head_dim: int
    config: Any
    arch: str
    function: Callable[..., Any]
    args: tuple[Any, ...]


def cases() -> Iterator[Case]:
    """Every case of the table."""
    for arch in ARCHITECTURES:
        for dtype in DTYPES:
            for head_dim in HEAD_DIMS:
                for make in (_prefill_cases, _window_cases, _decode_cases, _packed_cases):
                    yield from make(arch, dtype, head_dim)
            for width in WIDTHS:
                yield from _norm_cases(arch, dtype, width)
        for vocabulary in VOCABULARIES:
            yield from _sample_cases(arch, vocabulary)


def representative(case: Case) -> bool:
    """Whether a case is among the few that a test compiles: the operations' defaults."""
    few = {("bfloat16", 128), ("float32", 80), ("bfloat16", 4096), ("float32", 32000)}
    common = (case.dtype, case.head_dim) in few
    first = _configs(case.operation, case.arch, case.dtype, case.head_dim)[0]
    packed = case.operation == "quantized_decode_attention" and case.variant != str(PACKED[0])
    return common and case.config == first and not packed and case.variant != "bidirectional"


def _arrays(dtype: str, *shapes: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes)


def _configs(operation: str, arch: str, dtype: str, size: int) -> tuple[Any, ...]:
    capability = int(arch.removeprefix("sm_"))
    return candidates(operation, capability, dtype, size)


def _prefill_cases(arch: str, dtype: str, head_dim: int) -> Iterator[Case]:
    name = "prefill_attention"
    q, k = (BATCH, LENGTH, HEADS, head_dim), (BATCH, LENGTH, KV_HEADS, head_dim)
    args = (*_arrays(dtype, q, k, k), *_arrays("int32", (BATCH,)))
    for config in _configs(name, arch, dtype, head_dim):
        for variant, causal in (("causal", True), ("bidirectional", False)):
            function = partial(
                prefill_attention.triton.prefill_attention,
                causal=causal,
                scale=head_dim**-0.5,
                config=config,
            )
            yield Case(name, variant, dtype, head_dim, config, arch, function, args)


def _window_cases(arch: str, dtype: str, head_dim: int) -> Iterator[Case]:
    name = "window_scores"
    q, k = (BATCH, WINDOW, HEADS, head_dim), (BATCH, LENGTH, KV_HEADS, head_dim)
    args = (*_arrays(dtype, q, k), *_arrays("int32", (BATCH,), (BATCH,)))
    for config in _configs(name, arch, dtype, head_dim):
        function = partial(
            window_scores.triton.window_scores,
            threshold=0.01,
            scale=head_dim**-0.5,
            config=config,
        )
        yield Case(name, "counted", dtype, head_dim, config, arch, function, args)


def _layer(dtype: str, head_dim: int, kv_heads: int, rows: int) -> tuple[NewToken, Segment, Tail]:
    """A new token, a layer of a pool of so many rows, and its tail, as shapes."""
    qkv = BATCH, kv_heads, HEADS // kv_heads + 2, head_dim
    angles = _arrays("float32", *[(BATCH, head_dim // 2)] * 2)
    pool = _arrays(dtype, *[(BATCH, kv_heads, rows, head_dim)] * 2)
    tail = _arrays(dtype, *[(BATCH, kv_heads, TAIL, head_dim)] * 2)
    numbers = _arrays("int32", *[(BATCH,)] * 3)
    new = NewToken(*_arrays(dtype, qkv), *angles)
    return new, Segment(*pool, *numbers[:2]), Tail(*tail, *numbers[2:])


def _decode_cases(arch: str, dtype: str, head_dim: int) -> Iterator[Case]:
    name = "ragged_decode_attention"
    args = _layer(dtype, head_dim, KV_HEADS, 32 * MEAN_ROWS)
    for config in _configs(name, arch, dtype, head_dim):
        for splits in (1, 8):
            function = partial(
                ragged_decode_attention.triton.append_and_attend,
                scale=head_dim**-0.5,
                most_rows=LENGTH,
                config=config,
                splits=splits,
            )
            yield Case(name, f"splits {splits}", dtype, head_dim, config, arch, function, args)


def _packed_cases(arch: str, dtype: str, head_dim: int) -> Iterator[Case]:
    name = "quantized_decode_attention"
    if dtype == "float32":  # is left to XLA
        return
    configs = _configs(name, arch, dtype, head_dim)
    for config in configs:
        every = (dtype, head_dim, config) == ("bfloat16", 128, configs[0])
        for packed in PACKED if every else PACKED[:1]:
            program = _packed_program(dtype, head_dim, config, packed)
            yield Case(name, str(packed), dtype, head_dim, config, arch, *program)


def _packed_program(
    dtype: str, head_dim: int, config: Any, packed: Packed
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    lanes, kv_heads = per_word(min(packed.bits)), HEADS // packed.group
    words, runs = 32 * MEAN_ROWS // lanes, (BATCH, len(packed.bits))
    new, dense, tail = _layer(dtype, head_dim, kv_heads, LENGTH)
    rows = PackedRows(
        *_arrays("uint32", *[(BATCH, kv_heads, words, head_dim)] * 2),
        *_arrays("uint32", *[(BATCH, kv_heads, packed.groups, words * lanes)] * 2),
        *_arrays("int32", runs, runs),
        bits=packed.bits,
    )
    function = partial(
        quantized_decode_attention.triton.append_and_attend,
        transform=True,
        scale=head_dim**-0.5,
        most_rows=LENGTH,
        most_words=LENGTH // lanes,
        config=config,
        splits=packed.splits,
    )
    return function, (new, dense, rows, tail)


def _norm_cases(arch: str, dtype: str, width: int) -> Iterator[Case]:
    name = "add_rms_norm"
    args = _arrays(dtype, (BATCH, width), (BATCH, width), (width,))
    for config in _configs(name, arch, dtype, width):
        function = partial(add_rms_norm.triton.add_rms_norm, eps=1e-5, config=config)
        yield Case(name, "rows", dtype, width, config, arch, function, args)


def _sample_cases(arch: str, vocabulary: int) -> Iterator[Case]:
    name, dtype = "sample_tokens", "float32"
    settings = [_arrays(kind, (BATCH,))[0] for kind in (dtype, "int32", dtype, dtype)]
    args = (*_arrays(dtype, (BATCH, vocabulary)), *settings)
    for config in _configs(name, arch, dtype, vocabulary):
        function = partial(sample_tokens.triton.sample_tokens, config=config)
        yield Case(name, "rows", dtype, vocabulary, config, arch, function, args)


def compile_case(case: Case) -> list[dict[str, Any]]:
    """The rows of a case, one for each kernel of its program."""
    gpu = ARCHITECTURES[case.arch]
    row = {
        "operation": case.operation,
        "variant": case.variant,
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "config": dataclasses.asdict(case.config),
        "arch": case.arch,
    }
    try:
        kernels = compile_kernels(case.function, *case.args, gpu=gpu)
    except KernelError as error:
        return [{"kernel": error.kernel, **row, "ok": False, "error": error.message}]
    rows = []
    for kernel in kernels:
        found = kernel.tensor_core_ops
        products = kernel.name not in WITHOUT_PRODUCTS and case.dtype != "float32"
        fits = kernel.shared_bytes <= GPUS[gpu].block_shared_memory
        rows.append(
            {
                "kernel": kernel.name,
                **row,
                "registers": kernel.registers,
                "spill_bytes": kernel.spill_bytes,
                "shared_bytes": kernel.shared_bytes,
                "tensor_core_ops": found,
                "ok": (found > 0) == products and fits and kernel.spill_bytes == 0,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table()
    for name in ("kernel", "variant", "type", "H", "block sizes", "arch"):
        table.add_column(name)
    for name in ("registers", "spilt B", "shared B", "tensor cores", "ok"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = ("registers", "spill_bytes", "shared_bytes", "tensor_core_ops")
        table.add_row(
            row["kernel"],
            row["variant"],
            row["dtype"],
            str(row["head_dim"]),
            " ".join(str(value) for value in row["config"].values()),
            row["arch"],
            *(str(row.get(name, "-")) for name in numbers),
            "yes" if row["ok"] else "[red]NO",
        )
    return table


def main(
    offline: Annotated[
        bool, typer.Option("--offline", help="Compile the kernels; no GPU is needed.")
    ] = False,
    some: Annotated[
        bool, typer.Option("--representative", help="Only a few cases, under a minute.")
    ] = False,
    operation: Annotated[
        list[str] | None,
        typer.Option(help=f"Only {', '.join(CONFIGS)}; may be repeated.", show_default=False),
    ] = None,
    add: Annotated[
        bool,
        typer.Option("--add", help="Keep the rows that the file of --out has of other operations."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write the JSON to this file.", dir_okay=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Compile every kernel in every configuration for sm_80 and sm_90; exit 1 if one is not ok.

    The whole table takes about 20 minutes on two cores.
    """
    if not offline:
        raise typer.BadParameter("give --offline; on a GPU run: python -m benchmarks.gpu_suite")
    check_out(out, force=force or add)
    before: dict[str, Any] = {}
    with bad_input():
        wanted = operation or list(CONFIGS)
        check_known("--operation", wanted, CONFIGS)
        if add:
            if out is None:
                raise ValueError("--add is for rows of a file: give --out")
            before = json.loads(out.read_text(encoding="utf-8"))
            before["rows"] = [row for row in before["rows"] if row["operation"] not in wanted]
    chosen = [case for case in cases() if case.operation in wanted]
    chosen = [case for case in chosen if not some or representative(case)]
    errors = Console(stderr=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is done in other processes
        done = pool.map(compile_case, chosen)
        rows = [
            row
            for found in track(done, "compiling", total=len(chosen), console=errors, transient=True)
            for row in found
        ]
    ok = all(row["ok"] for row in [*before.get("rows", []), *rows])
    result = added(before, {**environment(), "rows": rows}) | {"ok": ok}
    if out is not None:
        write_result(out, result)
    if as_json:
        print(json.dumps(result))
    else:
        Console(width=max(130, errors.width)).print(show(rows))
    for row in rows:
        if "error" in row:
            errors.print(f"{row['kernel']} ({row['arch']}): {row['error']}", style="red")
    if not result["ok"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
