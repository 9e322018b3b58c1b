"""What the Pallas kernels become as machine code: `python -m benchmarks.kernels --offline`.

Every kernel is compiled for every type, head dim and candidate of its configuration, for an A100
and an H200 (sm_80, sm_90), without a GPU: registers, spills, shared memory, tensor-core
instructions. A row is ok where nothing spills, the shared memory is within what a block of that GPU
may have, and tensor cores are used where they should be. Speed needs a GPU: benchmarks.gpu_suite.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.ahead_of_time import GPUS
from benchmarks.command import AsJson, Force, Out, bad_input, check_known, check_out, finish
from benchmarks.documents import table
from benchmarks.environment import environment
from benchmarks.operations import OPERATIONS, candidates, kernel, layer, packed_rows, prompt
from benchmarks.triton_offline import KernelError, compile_kernels
from pallas_kernels.packing import per_word

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
MAXIMA = "counted, maxima"
"""The window's column maxima too: of the default configuration alone."""
NUMBERS = ("registers", "spill_bytes", "shared_bytes", "tensor_core_ops")


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

    @property
    def row(self) -> dict[str, Any]:
        """What a row says of it."""
        return {
            "operation": self.operation,
            "variant": self.variant,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "config": dataclasses.asdict(self.config),
            "arch": self.arch,
        }


def configs(operation: str, arch: str, dtype: str, size: int) -> tuple[Any, ...]:
    """The configurations that are compiled, the default first."""
    return candidates(operation, dtype, size, int(arch.removeprefix("sm_")))


def cases() -> Iterator[Case]:
    """Every case of the table."""
    for arch in ARCHITECTURES:
        for dtype in DTYPES:
            for operation, variant, size, settings, args in _programs(dtype):
                found = configs(operation, arch, dtype, size)
                first = operation == "quantized_decode_attention" and variant != str(PACKED[0])
                # Of the others, 64 x 128 spills 24 bytes with heads of 128 on sm_80.
                first = first or variant == MAXIMA
                for config in found[:1] if first else found:
                    function = partial(kernel(operation, size, **settings), config=config)
                    yield Case(operation, variant, dtype, size, config, arch, function, args)


def _programs(dtype: str) -> Iterator[tuple[str, str, int, dict[str, Any], tuple[Any, ...]]]:
    """Operation, variant, head dim, settings and arguments of every program of a type."""
    heads, number = (HEADS, KV_HEADS), _shape("int32", BATCH)
    for head_dim in HEAD_DIMS:
        qkv = prompt(_shape, dtype, BATCH, LENGTH, heads, head_dim)
        for variant, causal in (("causal", True), ("bidirectional", False)):
            yield "prefill_attention", variant, head_dim, {"causal": causal}, (*qkv, number)
        rows = _shape(dtype, BATCH, WINDOW, HEADS, head_dim), qkv[1], number, number
        for variant in ("counted", MAXIMA):
            yield "window_scores", variant, head_dim, {"maxima": variant == MAXIMA}, rows
        args = layer(_shape, dtype, BATCH, heads, head_dim, 32 * MEAN_ROWS, TAIL)
        for splits in (1, 8):
            settings = {"most_rows": LENGTH, "splits": splits}
            yield "ragged_decode_attention", f"splits {splits}", head_dim, settings, args
        if dtype != "float32":  # is left to XLA
            for packed in PACKED if (dtype, head_dim) == ("bfloat16", 128) else PACKED[:1]:
                yield (
                    "quantized_decode_attention", str(packed), head_dim,
                    *_packed_program(dtype, head_dim, packed),
                )  # fmt: skip
    for width in WIDTHS:
        args = tuple(_shape(dtype, *sides) for sides in ((BATCH, width), (BATCH, width), (width,)))
        yield "add_rms_norm", "rows", width, {}, args
    if dtype == "float32":
        for vocabulary in VOCABULARIES:
            kinds = ("float32", "int32", "float32", "float32")
            args = (_shape(dtype, BATCH, vocabulary), *(_shape(kind, BATCH) for kind in kinds))
            yield "sample_tokens", "rows", vocabulary, {}, args


def _shape(dtype: str, *sides: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, jnp.dtype(dtype))


def _packed_program(
    dtype: str, head_dim: int, packed: Packed
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    lanes, heads = per_word(min(packed.bits)), (HEADS, HEADS // packed.group)
    new, dense, tail = layer(_shape, dtype, BATCH, heads, head_dim, LENGTH, TAIL)
    words = 32 * MEAN_ROWS // lanes
    rows = packed_rows(_shape, BATCH, heads[1], head_dim, packed.bits, words, packed.groups)
    most = {"most_rows": LENGTH, "most_words": LENGTH // lanes}
    return {**most, "splits": packed.splits}, (new, dense, rows, tail)


def representative(case: Case) -> bool:
    """Whether a case is among the few that a test compiles: the operations' defaults."""
    few = {("bfloat16", 128), ("float32", 80), ("bfloat16", 4096), ("float32", 32000)}
    common = (case.dtype, case.head_dim) in few
    first = configs(case.operation, case.arch, case.dtype, case.head_dim)[0]
    packed = case.operation == "quantized_decode_attention" and case.variant != str(PACKED[0])
    return common and case.config == first and not packed and case.variant != "bidirectional"


def compile_case(case: Case) -> list[dict[str, Any]]:
    """The rows of a case, one for each kernel of its program."""
    gpu = ARCHITECTURES[case.arch]
    try:
        kernels = compile_kernels(case.function, *case.args, gpu=gpu)
    except KernelError as error:
        return [{"kernel": error.kernel, **case.row, "ok": False, "error": error.message}]
    rows = []
    for found in kernels:
        products = found.name not in WITHOUT_PRODUCTS and case.dtype != "float32"
        fits = found.shared_bytes <= GPUS[gpu].block_shared_memory
        rows.append(
            {
                "kernel": found.name,
                **case.row,
                **{name: getattr(found, name) for name in NUMBERS},
                "ok": (found.tensor_core_ops > 0) == products and fits and found.spill_bytes == 0,
            }
        )
    return rows


def text_of(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    return table(
        ["kernel", "variant", "type", "H", "block sizes", "arch", "registers", "spilt B",
         "shared B", "tensor cores", "ok"],
        [
            [
                *(str(row[name]) for name in ("kernel", "variant", "dtype", "head_dim")),
                " ".join(map(str, row["config"].values())),
                row["arch"],
                *(str(row.get(name, "-")) for name in NUMBERS),
                "yes" if row["ok"] else "**NO**",
            ]
            for row in rows
        ],
    )  # fmt: skip


def main(
    offline: Annotated[
        bool, typer.Option("--offline", help="Compile the kernels; no GPU is needed.")
    ] = False,
    some: Annotated[
        bool, typer.Option("--representative", help="Only a few cases, under a minute.")
    ] = False,
    operation: Annotated[
        list[str] | None,
        typer.Option(help=f"Only {', '.join(OPERATIONS)}; may be repeated.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
    force: Force = False,
) -> None:
    """Compile every kernel in every configuration for sm_80 and sm_90; exit 1 if one is not ok.

    The whole table takes about 20 minutes on two cores.
    """
    if not offline:
        raise typer.BadParameter("give --offline; on a GPU run: python -m benchmarks.gpu_suite")
    check_out(out, force=force)
    with bad_input():
        wanted = operation or list(OPERATIONS)
        check_known("--operation", wanted, OPERATIONS)
    chosen = [case for case in cases() if case.operation in wanted]
    chosen = [case for case in chosen if not some or representative(case)]
    bar = {"total": len(chosen), "console": Console(stderr=True), "transient": True}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is done in other processes
        done = track(pool.map(compile_case, chosen), "compiling", **bar)
        rows = [row for found in done for row in found]
    ok = all(row["ok"] for row in rows)
    result = {**environment(), "rows": rows, "ok": ok}
    finish(result, text_of(rows), as_json=as_json, out=out)
    if not ok:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
