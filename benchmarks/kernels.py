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
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.ahead_of_time import GPUS
from benchmarks.command import AsJson, Force, Out, bad_input, check_known, check_out, finish
from benchmarks.documents import table
from benchmarks.environment import added, environment
from benchmarks.operations import (
    OPERATIONS,
    candidates,
    kernel,
    layer,
    layer_rows,
    packed_rows,
    prompt,
)
from benchmarks.triton_offline import KernelError, compile_kernels
from pallas_kernels.packing import per_word

ARCHITECTURES = {"sm_80": "a100", "sm_90": "h200"}
"""What is compiled for, and a GPU that is one."""

WITHOUT_PRODUCTS = ("merge_splits", "add_rms_norm")
"""Kernels whose code has no tensor-core instruction; of float32 none has any, all others do."""

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (32, 64, 72, 80, 96, 128)
WIDTHS = (1024, 4096, 7168)
"""Of the residual stream; a row's `head_dim` for the norm, whose rows are not heads."""
VOCABULARIES = (4096, 32000, 151936)
"""A row's `head_dim` for the draw of a token."""
BATCH, HEADS, KV_HEADS, LENGTH, WINDOW, TAIL = 2, 32, 8, 4096, 512, 128
GROUPS = (7, 8)
"""Query heads of a kv head, besides `HEADS // KV_HEADS`: of Qwen2.5-VL's 7B, and of its 3B and 72B.
They are compiled in bfloat16 with heads of 128 and the default configuration alone."""
MEAN_ROWS = LENGTH // 10
MAXIMA = "counted, maxima"
"""The window's column maxima too: of the default configuration alone."""
CHUNKS = {32: 32, 2048: BATCH}
"""Rows of a chunk over the buffer of 32 layers → sequences, of which 32 have more elements than 32
bits count. They are compiled in bfloat16 with heads of 128 and the default configuration alone."""
CHUNK = "chunk of"
CASE = ("operation", "variant", "dtype", "head_dim", "config", "arch")
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
    *(Packed(group=group) for group in GROUPS),
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
        found = {name: getattr(self, name) for name in CASE}
        return {**found, "config": dataclasses.asdict(self.config)}


def configs(operation: str, arch: str, dtype: str, size: int) -> tuple[Any, ...]:
    """The configurations that are compiled, the default first."""
    return candidates(operation, dtype, size, int(arch.removeprefix("sm_")))


def cases() -> Iterator[Case]:
    """Every case of the table."""
    for arch in ARCHITECTURES:
        for dtype in DTYPES:
            for operation, variant, size, settings, args in _programs(dtype):
                found = configs(operation, arch, dtype, size)
                for config in found if _in_all(operation, variant) else found[:1]:
                    function = partial(kernel(operation, size, **settings), config=config)
                    yield Case(operation, variant, dtype, size, config, arch, function, args)


def _in_all(operation: str, variant: str) -> bool:
    """Whether a variant is compiled in every configuration, not in the default one alone."""
    if operation == "quantized_decode_attention":
        return variant == str(PACKED[0])
    # Of the maxima's others, 64 x 128 spills 24 bytes with heads of 128 on sm_80.
    return variant != MAXIMA and "group" not in variant and CHUNK not in variant


def _programs(dtype: str) -> Iterator[tuple[str, str, int, dict[str, Any], tuple[Any, ...]]]:
    """Operation, variant, head dim, settings and arguments of every program of a type."""
    for head_dim in HEAD_DIMS:
        common = (dtype, head_dim) == ("bfloat16", 128)
        for group in (HEADS // KV_HEADS, *(GROUPS if common else ())):
            yield from _attention(dtype, head_dim, group)
        for rows, batch in CHUNKS.items() if common else ():
            q, number = _shape(dtype, batch, rows, HEADS, head_dim), _shape("int32", batch)
            where = layer_rows(_shape, dtype, batch, KV_HEADS, head_dim, LENGTH, 32)
            for operation in ("prefill_attention", "window_scores"):
                yield operation, f"{CHUNK} {rows}", head_dim, {}, (q, where, number, number)
        if dtype != "float32":  # is left to XLA
            for packed in PACKED if common else PACKED[:1]:
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


def _attention(
    dtype: str, head_dim: int, group: int
) -> Iterator[tuple[str, str, int, dict[str, Any], tuple[Any, ...]]]:
    """`_programs` of attention over rows of full width."""
    usual = group == HEADS // KV_HEADS
    heads, number = (group * KV_HEADS, KV_HEADS), _shape("int32", BATCH)
    note = "" if usual else f", group {group}"
    qkv = prompt(_shape, dtype, BATCH, LENGTH, heads, head_dim)
    for variant, causal in (("causal", True), ("bidirectional", False)):
        yield "prefill_attention", variant + note, head_dim, {"causal": causal}, (*qkv, number)
    rows = _shape(dtype, BATCH, WINDOW, heads[0], head_dim), qkv[1], number, number
    for variant in ("counted", MAXIMA) if usual else ("counted",):
        settings = {"maxima": variant == MAXIMA}
        yield "window_scores", variant + note, head_dim, settings, rows
    args = layer(_shape, dtype, BATCH, heads, head_dim, 32 * MEAN_ROWS, TAIL)
    for splits in (1, 8):
        settings = {"most_rows": LENGTH, "splits": splits}
        yield "ragged_decode_attention", f"splits {splits}{note}", head_dim, settings, args


def _shape(dtype: str, *sides: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, jnp.dtype(dtype))


def _packed_program(
    dtype: str, head_dim: int, packed: Packed
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    lanes, kv_heads = per_word(min(packed.bits)), HEADS // packed.group
    heads = packed.group * kv_heads, kv_heads
    new, dense, tail = layer(_shape, dtype, BATCH, heads, head_dim, LENGTH, TAIL)
    words = 32 * MEAN_ROWS // lanes
    rows = packed_rows(_shape, BATCH, kv_heads, head_dim, packed.bits, words, packed.groups)
    most = {"most_rows": LENGTH, "most_words": LENGTH // lanes}
    return {**most, "splits": packed.splits}, (new, dense, rows, tail)


def representative(case: Case) -> bool:
    """Whether a case is among the few that a test compiles: the operations' defaults."""
    few = {("bfloat16", 128), ("float32", 80), ("bfloat16", 4096), ("float32", 32000)}
    common = (case.dtype, case.head_dim) in few
    first = configs(case.operation, case.arch, case.dtype, case.head_dim)[0]
    usual = _in_all(case.operation, case.variant)
    usual |= case.variant in (MAXIMA, f"{CHUNK} {max(CHUNKS)}")
    return common and case.config == first and usual and case.variant != "bidirectional"


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
        bool, typer.Option("--representative", help="Only a few cases, about a minute.")
    ] = False,
    operation: Annotated[
        list[str] | None,
        typer.Option(help=f"Only {', '.join(OPERATIONS)}; may be repeated.", show_default=False),
    ] = None,
    add: Annotated[
        bool,
        typer.Option("--add", help="Keep the rows that the file of --out has, add the others."),
    ] = False,
    as_json: AsJson = False,
    out: Out = None,
    force: Force = False,
) -> None:
    """Compile every kernel in every configuration for sm_80 and sm_90; exit 1 if one is not ok.

    The whole table takes about 20 minutes on two cores.
    """
    if not offline:
        raise typer.BadParameter("give --offline; on a GPU run: python -m benchmarks.gpu_suite")
    check_out(out, force=force or add)
    before: dict[str, Any] = {}
    with bad_input():
        wanted = operation or list(OPERATIONS)
        check_known("--operation", wanted, OPERATIONS)
        if add:
            if out is None:
                raise ValueError("--add is for rows of a file: give --out")
            before = json.loads(out.read_text(encoding="utf-8"))
    there = before.get("rows", [])
    present = [{name: row[name] for name in CASE} for row in there]
    chosen = [case for case in cases() if case.operation in wanted and case.row not in present]
    chosen = [case for case in chosen if not some or representative(case)]
    bar = {"total": len(chosen), "console": Console(stderr=True), "transient": True}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is done in other processes
        done = track(pool.map(compile_case, chosen), "compiling", **bar)
        rows = [row for found in done for row in found]
    ok = all(row["ok"] for row in [*there, *rows])
    result = {**added(before, {**environment(), "rows": rows}), "ok": ok}
    finish(result, text_of(rows), as_json=as_json, out=out)
    if not ok:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
