"""Whole programs compiled for a GPU that need not be there: `python -m benchmarks.memory`.

What they need of its memory, part by part; whether the cache is ever copied in the decode loop; how
many programs a decode step launches for each layer, and whether the whole step is one command
buffer (a CUDA graph). Nothing is allocated and nothing is run. Needs the CUDA plugin:
pip install 'vlcache-jax[cuda]'.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.ahead_of_time import GPUS, compile_for
from benchmarks.command import AsJson, Force, Out, bad_input, check_known, check_out, finish
from benchmarks.counted import operations
from benchmarks.device import describe
from benchmarks.environment import added, environment
from benchmarks.loops import copies, loop_copies, loop_floats, step_launches
from benchmarks.models import MODELS, empty_cache
from benchmarks.programs import ALL, BFLOAT16, DEFAULT, PARTS, STAGES, Program
from benchmarks.roofline import prefill
from benchmarks.speed_sections import programs_part
from pallas_kernels.packing import per_word
from vlcache_jax.cache.budget import Budget
from vlcache_jax.cache.method import AnyPool
from vlcache_jax.cache.methods import METHODS, FullCache, VLCache
from vlcache_jax.cache.packed import PackedPool
from vlcache_jax.cache.quantizers import QUANTIZERS, make_quantizer
from vlcache_jax.models.families import Params, abstract_params
from vlcache_jax.results.report import token_bytes


def measure(program: Program, dump: str) -> dict[str, Any]:
    """Compile a program and read off what it needs.

    Args:
        program: what to compile.
        dump: the directory that XLA_FLAGS=--xla_dump_to names, which XLA read when it started.
    """
    generate, text = program.generate(), MODELS[program.model].text
    size = program.batch, program.context
    params = abstract_params(MODELS[program.model], BFLOAT16)
    began = time.perf_counter()
    args: tuple[Any, ...] = ()
    if program.stage == "decode":
        cache = jax.eval_shape(lambda: empty_cache(generate, *size, BFLOAT16))
        step = generate.stages.decode_chunk
        compiled = compile_for(program.device, step, params, *cache, donate_argnums=(2,))
    elif program.stage == "generate":
        key = jax.eval_shape(lambda: jax.random.key(0))
        compiled = compile_for(program.device, generate, params, program.inputs(), key)
    elif program.stage in PARTS:
        part, args, donated = program.part(params)
        compiled = compile_for(program.device, part, *args, donate_argnums=donated)
    else:
        compiled = compile_for(program.device, program.vision, params, program.inputs())
    seconds = time.perf_counter() - began
    memory, code = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory is not None
    row = {
        **asdict(program),
        "compile_s": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "fits": memory.peak_memory_in_bytes <= GPUS[program.device].memory,
    }
    if program.stage == "vision":
        return row
    if program.stage in PARTS:
        return {**row, **part_facts(program, compiled, params, args)}
    (launches,) = Path(dump).glob("*.thunk_sequence_after_thunk_passes.txt")
    tail, reserved = generate.stages.tail_rows, generate.stages.reserved_rows
    pool, full = (
        cache.pool_shapes(text, *size, BFLOAT16, reserved)
        for cache in (generate.cache, FullCache())
    )
    tail_shape = (program.batch, text.num_kv_heads, tail, text.head_dim)
    shapes = {leaf.shape for leaf in (*_large(pool), *_large(full))} | {tail_shape}
    return {
        **row,
        **cache_parts(pool),
        "full_cache_bytes": cache_parts(full)["cache_bytes"],
        "tail_bytes": program.batch * tail * token_bytes(text, BFLOAT16),
        "cache_copies_in_loop": sum(len(loop_copies(code, shape)) for shape in shapes),
        "dequantized_in_loop": dequantized(code, pool),
        **step_launches(launches.read_text(encoding="utf-8")),
    }


def part_facts(
    program: Program, compiled: jax.stages.Compiled, params: Params, args: tuple[Any, ...]
) -> dict[str, int]:
    """What is said of one of `PARTS`: what it needs beside all weights and the prompt's K and V.

    Of `args` shapes, the weights' `params` where it is given them. Arguments that it does not use
    lie in memory all the same. Of a question also its operations, beside what its rows need at
    least: `benchmarks.roofline`.
    """
    config, size = MODELS[program.model], (program.batch, program.context)
    stages, memory = program.generate().stages, compiled.memory_analysis()
    buffers = jax.eval_shape(lambda: stages.empty_buffers(*size, BFLOAT16))
    assert memory is not None
    weights, cache = _bytes(params), _bytes(buffers)
    given = _bytes(args) - (weights if args[0] is params else 0)
    given -= 0 if program.stage == "see" else cache
    facts = {
        "weight_bytes": weights,
        "full_cache_bytes": cache,
        "beside_bytes": memory.peak_memory_in_bytes - memory.argument_size_in_bytes + given,
        "buffer_copies": len(copies(compiled.as_text() or "", buffers.k.shape)),
    }
    if program.stage == "finish":
        least = prefill(config, program.context, program.batch, rows=program.rows)
        question, own, _ = replace(program, backend="xla").part(params)
        facts |= {
            "operations": round(operations(question, *own)),
            "least_operations": round(least.operations),
            "least_bytes": round(least.bytes),
        }
    return facts


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _large(pool: AnyPool) -> list[Any]:
    """The arrays of a pool that have rows; the others are a few numbers for each layer."""
    return [leaf for leaf in jax.tree.leaves(pool) if leaf.ndim == 4]


def cache_parts(pool: AnyPool) -> dict[str, int]:
    """Bytes of a pool of arrays or shapes as it is allocated, and what they are for.

    Returns:
        "cache_bytes", and of these "dense_bytes", rows of full width, "word_bytes", codes, and
        "scale_bytes", scales and shifts.
    """
    parts = {"dense_bytes": _large(pool), "word_bytes": [], "scale_bytes": []}
    if isinstance(pool, PackedPool):
        parts["dense_bytes"] = _large(pool.dense)
        parts["word_bytes"] = [pool.words_k, pool.words_v]
        parts["scale_bytes"] = [pool.affine_k, pool.affine_v]
    found = {name: _bytes(leaves) for name, leaves in parts.items()}
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
        own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        return _alone(f"measure({program!r}, {dump!r})", own)


def measured_peak(program: Program) -> int:
    """`peak` on this machine's GPU, in a process of its own, whose allocator held nothing else."""
    return _alone(f"peak({program!r})", {"JAX_PLATFORMS": ""})


def _alone(call: str, environment: dict[str, str]) -> Any:
    """What a call of a function of this module gives in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    code = f"import json; from benchmarks.memory import *; print(json.dumps({call}))"
    own = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{call} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def device_statistics() -> dict[str, int]:
    """What the allocator of the GPU tells.

    Raises:
        benchmarks.device.NoGpu: there is none.
    """
    describe(need_gpu=True)
    return jax.devices()[0].memory_stats() or {}


def peak(program: Program, statistics: Callable[[], dict[str, int]] = device_statistics) -> int:
    """Run a program once, and give the most bytes that were in use since the process began.

    Its weights and prompts are zeros: what they hold changes no size.

    Args:
        program: what to run.
        statistics: what is asked for the peak, before and after.
    """
    statistics()  # no weights are made where there is no GPU
    config, generate = MODELS[program.model], program.generate()

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    shapes = abstract_params(config, BFLOAT16)
    if program.stage in PARTS:
        part, args, donated = program.part(shapes)
        jax.block_until_ready(jax.jit(part, donate_argnums=donated)(*zeros(args)))
        return statistics()["peak_bytes_in_use"]
    params = zeros(shapes)
    if program.stage == "decode":
        pool, state = empty_cache(generate, program.batch, program.context, BFLOAT16)
        decode = jax.jit(generate.stages.decode_chunk, donate_argnums=2)
        jax.block_until_ready(decode(params, pool, state))
    else:
        inputs = zeros(program.inputs())
        inputs = replace(inputs, length=inputs.length + program.context)
        if program.stage == "vision":
            jax.block_until_ready(jax.jit(program.vision)(params, inputs))
        else:
            jax.block_until_ready(jax.jit(generate)(params, inputs, jax.random.key(0)))
    return statistics()["peak_bytes_in_use"]


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


def main(
    device: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "h200",
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = DEFAULT,
    context: Annotated[int, typer.Option(min=1, help="Prompt rows of a sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Share of the cache kept, 1 keeps all; may be repeated; 0.1 by default."),
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = VLCache.name,
    kv_bits: Annotated[
        list[str] | None,
        typer.Option(
            help=f"How what is kept is quantized, of {', '.join(QUANTIZERS)}, or 16 for not at "
            "all, the default; may be repeated."
        ),
    ] = None,
    stage: Annotated[
        str,
        typer.Option(
            help=f"decode (a chunk of steps), generate (all of it), vision, or {', '.join(PARTS)}."
        ),
    ] = "decode",
    tiles: Annotated[
        int | None,
        typer.Option(min=0, help="Of each prompt; by default the most that one image becomes."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="That extend or finish runs; 2048 by default.")
    ] = None,
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
    as_json: AsJson = False,
    out: Out = None,
    force: Force = False,
) -> None:
    """Compile a program ahead of time for a GPU, and say what it needs.

    Example: python -m benchmarks.memory --model llava-v1.6-mistral-7b --context 8192 --batch 64

    With a quantized cache: python -m benchmarks.memory --context 4096 --kv-bits akvq --kv-bits 16
    """
    check_out(out, force=force or add)
    shares, before = budget or [0.1], {}
    with bad_input():
        check_known("device", [device], GPUS)
        check_known("model", [model], MODELS)
        check_known("stage", [stage], STAGES)
        check_known("method", [method], METHODS)
        for name in kv_bits or ():
            make_quantizer(name)
        for share in shares:
            Budget(share)
        if add:
            if out is None or largest:
                raise ValueError("--add is for rows of a file, without --largest-batch: give --out")
            before = json.loads(out.read_text(encoding="utf-8"))
    asked = [
        Program(
            device,
            model,
            context,
            batch,
            share,
            stage=stage,
            backend=backend,
            kv_bits=bits,
            method=method,
            tiles=tiles,
            rows=rows,
        )
        for share in shares
        for bits in kv_bits or ["16"]
    ]
    there = [known(row) for row in before.get("rows", [])]
    asked = [program for program in (ALL if everything else asked) if program not in there]
    errors = Console(stderr=True)
    found: dict[str, Any] = {"rows": []}
    text = ""
    try:
        for program in track(asked, "compiling", console=errors, transient=True):
            if not largest:
                found["rows"].append(run(program))
                continue
            most, tried = largest_batch(program)
            found["rows"] += tried
            bits = "" if program.kv_bits == "16" else f" + {program.kv_bits}"
            key = f"{program.budget:g}{bits}"
            found.setdefault("largest_batch", {})[key] = most
            text += f"\n\nLargest batch that fits at a budget of {key}: {most}."
        if on_gpu:
            for row in found["rows"]:
                row["measured_peak_bytes"] = measured_peak(known(row))
    except RuntimeError as error:
        errors.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    new = {**environment(), **found}
    if as_json and len(found["rows"]) == 1 and not largest and not add:
        new = {**new, **found["rows"][0]}
    finish(added(before, new), programs_part(new) + text, as_json=as_json, out=out)


if __name__ == "__main__":
    typer.run(main)
