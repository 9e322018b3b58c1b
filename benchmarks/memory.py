"""Whole programs compiled for a GPU that need not be there: `python -m benchmarks.memory`.

What they need of its memory, part by part; whether the cache is ever copied in the decode loop; how
many programs a decode step launches for each layer, and whether the whole step is one command
buffer (a CUDA graph). Nothing is allocated and nothing is run, but with `--on-gpu`. Needs the CUDA
plugin: pip install 'vlcache-jax[cuda]'.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import device_memory
from benchmarks.ahead_of_time import GPUS, Memory, compile_for
from benchmarks.command import bad_input, check_known, check_out
from benchmarks.environment import added, environment, write_result
from benchmarks.loops import loop_copies, loop_floats, step_launches
from benchmarks.models import MODELS, abstract_inputs, empty_cache
from pallas_kernels.packing import per_word
from vlcache_jax.cache.method import AnyPool
from vlcache_jax.cache.methods import FullCache, VLCache
from vlcache_jax.cache.packed import PackedPool
from vlcache_jax.cache.quantizers import QUANTIZERS, make_quantizer
from vlcache_jax.generate import Generate
from vlcache_jax.models.llava import abstract_params
from vlcache_jax.report import human_bytes, token_bytes

STAGES = ("decode", "generate")
DEFAULT = "llava-v1.6-mistral-7b"


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        device: a name of `GPUS`.
        model: a name of `MODELS`.
        context: prompt rows of each sequence, T.
        batch: sequences.
        budget: share of the cache that VL-Cache keeps; 1 for the full cache.
        kv_bits: how what is kept is quantized, as of `make_quantizer`; "16" for not at all.
        new_tokens: most tokens of an answer.
        stage: "decode", a chunk of decode steps alone, or "generate", all from pixels to tokens.
        backend: of the attention, None for the best.
    """

    device: str = "h200"
    model: str = DEFAULT
    context: int = 2048
    batch: int = 1
    budget: float = 0.1
    new_tokens: int = 129
    stage: str = "decode"
    backend: str | None = None
    kv_bits: str = "16"

    def generate(self) -> Generate:
        """The program's functions."""
        quantizer = make_quantizer(self.kv_bits)
        cache = FullCache() if self.budget >= 1 else VLCache(self.budget)
        cache = replace(cache, quantize=quantizer)
        return Generate(MODELS[self.model], cache, self.new_tokens, backend=self.backend)


ALL = (
    *(
        Program(model=model, context=context, batch=batch, stage=stage)
        for stage, context, batches in (("decode", 2048, (1, 64)), ("generate", 3072, (1,)))
        for model in ("llava-1.5-7b", "llava-v1.6-mistral-7b", "llava-v1.6-34b")
        for batch in batches
    ),
    Program(model="llava-1.5-7b", batch=64, budget=1.0),
    *(
        Program(model=model, context=8192, batch=batch, budget=budget)
        for model, batch in (("llava-v1.6-mistral-7b", 64), ("llava-v1.6-34b", 32))
        for budget in (1.0, 0.1)
    ),
    Program(context=32768, stage="generate"),
    *(
        Program(context=context, batch=batch, budget=budget, kv_bits="akvq")
        for context, batch in ((4096, 1), (8192, 64))
        for budget in (1.0, 0.1)
    ),
)
"""The rows of the committed table."""


def measure(program: Program, dump: str) -> dict[str, Any]:
    """Compile a program and read off what it needs.

    Args:
        program: what to compile.
        dump: the directory that XLA_FLAGS=--xla_dump_to names, which XLA read when it started.
    """
    config, bfloat16 = MODELS[program.model], jnp.dtype(jnp.bfloat16)
    generate = program.generate()
    stages = generate.stages
    params, text = abstract_params(config, bfloat16), config.text
    began = time.perf_counter()
    if program.stage == "decode":
        size = program.batch, program.context, bfloat16
        cache = jax.eval_shape(lambda: empty_cache(generate, *size))
        compiled = compile_for(
            program.device, stages.decode_chunk, params, *cache, donate_argnums=(2,)
        )
    else:
        inputs = abstract_inputs(config, program.batch, program.context)
        key = jax.eval_shape(lambda: jax.random.key(0))
        compiled = compile_for(program.device, generate, params, inputs, key)
    seconds = time.perf_counter() - began
    (launches,) = Path(dump).glob("*.thunk_sequence_after_thunk_passes.txt")
    memory, code = Memory.of(compiled), compiled.as_text() or ""
    tail = stages.tail_rows
    pool, full = (
        cache.pool_shapes(text, program.batch, program.context, bfloat16, stages.reserved_rows)
        for cache in (generate.cache, FullCache())
    )
    tail_shape = (program.batch, text.num_kv_heads, tail, text.head_dim)
    shapes = {leaf.shape for leaf in (*_large(pool), *_large(full))} | {tail_shape}
    return {
        **asdict(program),
        "compile_s": round(seconds, 1),
        **cache_parts(pool),
        "full_cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in _large(full)),
        "tail_bytes": program.batch * tail * token_bytes(text, bfloat16),
        "argument_bytes": memory.arguments,
        "temp_bytes": memory.temporaries,
        "peak_bytes": memory.peak,
        "cache_copies_in_loop": sum(len(loop_copies(code, shape)) for shape in shapes),
        "dequantized_in_loop": dequantized(code, pool),
        **step_launches(launches.read_text(encoding="utf-8")),
        "fits": memory.peak <= GPUS[program.device].memory,
    }


def _large(pool: AnyPool) -> list[Any]:
    """The arrays of a pool that have rows; the others are a few numbers for each layer."""
    return [leaf for leaf in jax.tree.leaves(pool) if leaf.ndim == 4]


def cache_parts(pool: AnyPool) -> dict[str, int]:
    """Bytes of a pool as it is allocated, and what they are for.

    Args:
        pool: arrays or shapes.

    Returns:
        "cache_bytes", and of these "dense_bytes", rows of full width, "word_bytes", codes, and
        "scale_bytes", scales and shifts.
    """
    parts = {"dense_bytes": _large(pool), "word_bytes": [], "scale_bytes": []}
    if isinstance(pool, PackedPool):
        parts["dense_bytes"] = _large(pool.dense)
        parts["word_bytes"] = [pool.words_k, pool.words_v]
        parts["scale_bytes"] = [pool.affine_k, pool.affine_v]
    found = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        for name, leaves in parts.items()
    }
    return {"cache_bytes": sum(found.values()), **found}


def dequantized(code: str, pool: AnyPool) -> int:
    """How often a step writes as many floating-point numbers as a layer has packed ones.

    A layer of keys or values, that is, with the rows that the pool has room for on average. None
    for a pool that is not quantized.
    """
    if not isinstance(pool, PackedPool):
        return 0
    batch, heads, words, size = pool.words_k.shape
    rows = words * per_word(max(pool.quantizer.widths)) // pool.first.shape[1]
    return len(loop_floats(code, batch * heads * rows * size))


def run(program: Program) -> dict[str, Any]:
    """`measure` in a process of its own, since XLA reads where to write its list when it starts."""
    with tempfile.TemporaryDirectory() as dump:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump}".strip()
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        return device_memory.alone(f"memory.measure(program, {dump!r})", program, environment)


def largest_batch(
    program: Program, compiled: Callable[[Program], dict[str, Any]] = run
) -> tuple[int, list[dict[str, Any]]]:
    """The largest batch whose program fits the device's memory, to a hundredth of it.

    What a program needs grows almost in a line with its batch: each batch that is tried is where a
    line through the last two would meet the memory.

    Args:
        program: all but its batch.
        compiled: gives the row of a program.

    Returns:
        The batch, 0 where not even one sequence fits; and the rows of all that were compiled.
    """
    memory, rows = GPUS[program.device].memory, {}

    def fits(batch: int) -> bool:
        rows[batch] = compiled(replace(program, batch=batch))
        return rows[batch]["fits"]

    fitting, failing = 0, None
    batch = program.batch
    while True:
        if fits(batch):
            fitting = batch
        else:
            failing = batch
        if failing is not None and failing - fitting <= max(1, fitting // 100):
            break
        batch = _next_batch({b: row["peak_bytes"] for b, row in rows.items()}, memory)
        batch = max(fitting + 1, batch if failing is None else min(failing - 1, batch))
    return fitting, list(rows.values())


def _next_batch(peaks: dict[int, int], memory: int) -> int:
    """Where the line through the last two peaks meets the memory; one further where it has."""
    if len(peaks) == 1:
        ((batch, peak),) = peaks.items()
        return 2 * batch if peak <= memory else batch // 2
    (a, first), (b, second) = list(peaks.items())[-2:]
    meets = a + int((memory - first) * (b - a) / (second - first))
    return meets + 1 if meets in peaks else meets


def known(row: dict[str, Any]) -> Program:
    """The program of a row; in a file of an older release it says less."""
    return Program(**{item.name: row[item.name] for item in fields(Program) if item.name in row})


def show(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table()
    for name in ("model", "stage", "T x batch", "budget", "bits"):
        table.add_column(name)
    for name in (
        "cache", "of", "temporary", "peak", "copies", "made wide", "launches", "one graph",
        "compile",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        sizes = ("cache_bytes", "full_cache_bytes", "temp_bytes", "peak_bytes")
        table.add_row(
            row["model"],
            row["stage"],
            f"{row['context']} x {row['batch']}",
            f"{row['budget']:g}",
            row["kv_bits"],
            *(human_bytes(row[name]) for name in sizes),
            str(row["cache_copies_in_loop"]),
            str(row["dequantized_in_loop"]),
            str(row["launches_per_layer"]),
            "yes" if row["one_command_buffer"] else "no",
            f"{row['compile_s']} s",
        )
    return table


def main(
    device: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "h200",
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = DEFAULT,
    context: Annotated[int, typer.Option(min=1, help="Prompt rows of a sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Share of the cache kept, 1 keeps all; may be repeated; 0.1 by default."),
    ] = None,
    kv_bits: Annotated[
        list[str] | None,
        typer.Option(
            help=f"How what is kept is quantized, of {', '.join(QUANTIZERS)}, or 16 for not at "
            "all, the default; may be repeated."
        ),
    ] = None,
    stage: Annotated[
        str, typer.Option(help="decode (a chunk of steps) or generate (all of it).")
    ] = "decode",
    backend: Annotated[str | None, typer.Option(help="triton or xla; the best by default.")] = None,
    on_gpu: Annotated[
        bool,
        typer.Option(
            "--on-gpu",
            help="Also run each program on this machine's GPU: the peak that its allocator saw.",
        ),
    ] = False,
    largest: Annotated[
        bool,
        typer.Option("--largest-batch", help="Search the largest batch that fits, from --batch."),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="The rows of the committed table instead.")
    ] = False,
    add: Annotated[
        bool,
        typer.Option("--add", help="Keep the rows that the file of --out has, add the others."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Compile a program ahead of time for a GPU, and say what it needs.

    "made wide" counts where a step writes as many numbers of full width as a layer of a quantized
    cache has.

    Example: python -m benchmarks.memory --model llava-v1.6-mistral-7b --context 8192 --batch 64

    With a quantized cache: python -m benchmarks.memory --context 4096 --kv-bits akvq --kv-bits 16
    """
    check_out(out, force=force or add)
    with bad_input():
        check_known("device", [device], GPUS)
        check_known("model", [model], MODELS)
        check_known("stage", [stage], STAGES)
        before: dict[str, Any] = {}
        if add:
            if out is None or largest:
                raise ValueError("--add is for rows of a file, without --largest-batch: give --out")
            before = json.loads(out.read_text(encoding="utf-8"))
        for name in kv_bits or ():
            make_quantizer(name)
    shares = budget or [0.1]
    if any(not 0 < share <= 1 for share in shares):
        raise typer.BadParameter(f"--budget {shares} must be above 0 and at most 1 (0.1 is 10 %)")
    asked = [
        Program(device, model, context, batch, share, stage=stage, backend=backend, kv_bits=bits)
        for share in shares
        for bits in kv_bits or ["16"]
    ]
    there = [known(row) for row in before.get("rows", [])]
    asked = [program for program in (ALL if everything else asked) if program not in there]
    errors = Console(stderr=True)
    found: dict[str, Any] = {}
    try:
        bar = track(asked, "compiling", console=errors, transient=True)
        if largest and not everything:
            found = {"largest_batch": {}, "rows": []}
            for program in bar:
                most, rows = largest_batch(program)
                wide = program.kv_bits == "16"
                key = f"{program.budget:g}" + ("" if wide else f" + {program.kv_bits}")
                found["largest_batch"][key] = most
                found["rows"] += rows
        else:
            found = {"rows": [run(program) for program in bar]}
        if on_gpu:
            for row in found["rows"]:
                row["measured_peak_bytes"] = device_memory.run(known(row))
    except RuntimeError as error:
        errors.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    if out is not None:
        write_result(out, added(before, {**environment(), **found}))
    if as_json:
        single = len(found["rows"]) == 1 and not largest
        print(json.dumps(found["rows"][0] if single else found))
    else:
        console = Console(width=max(130, errors.width))
        console.print(show(found["rows"]))
        for share, most in found.get("largest_batch", {}).items():
            console.print(f"largest batch that fits at a budget of {share}: {most}")


if __name__ == "__main__":
    typer.run(main)
