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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.ahead_of_time import GPUS, compile_for
from benchmarks.command import AsJson, Force, Out, bad_input, check_known, check_out, finish
from benchmarks.environment import environment
from benchmarks.loops import loop_copies, loop_floats, step_launches
from benchmarks.models import MODELS, abstract_inputs, empty_cache
from benchmarks.speed_sections import programs_part
from pallas_kernels.packing import per_word
from vlcache_jax.cache.method import AnyPool
from vlcache_jax.cache.methods import FullCache, VLCache
from vlcache_jax.cache.packed import PackedPool
from vlcache_jax.cache.quantizers import QUANTIZERS, make_quantizer
from vlcache_jax.generate import Generate
from vlcache_jax.models.llava import abstract_params
from vlcache_jax.report import token_bytes

STAGES = ("decode", "generate")
DEFAULT = "llava-v1.6-mistral-7b"
BFLOAT16 = jnp.dtype(jnp.bfloat16)


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        device: a name of `GPUS`.
        model: a name of `MODELS`.
        context: prompt rows of each sequence, T.
        batch: sequences.
        budget: share of the cache that VL-Cache keeps; 1 for the full cache.
        new_tokens: most tokens of an answer.
        stage: "decode", a chunk of decode steps alone, or "generate", all from pixels to tokens.
        backend: of the attention, None for the best.
        kv_bits: how what is kept is quantized, as of `make_quantizer`; "16" for not at all.
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
        cache = FullCache() if self.budget >= 1 else VLCache(self.budget)
        cache = replace(cache, quantize=make_quantizer(self.kv_bits))
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
    generate, text = program.generate(), MODELS[program.model].text
    params, size = (
        abstract_params(MODELS[program.model], BFLOAT16),
        (program.batch, program.context),
    )
    began = time.perf_counter()
    if program.stage == "decode":
        cache = jax.eval_shape(lambda: empty_cache(generate, *size, BFLOAT16))
        step = generate.stages.decode_chunk
        compiled = compile_for(program.device, step, params, *cache, donate_argnums=(2,))
    else:
        inputs = abstract_inputs(MODELS[program.model], *size)
        key = jax.eval_shape(lambda: jax.random.key(0))
        compiled = compile_for(program.device, generate, params, inputs, key)
    seconds = time.perf_counter() - began
    (launches,) = Path(dump).glob("*.thunk_sequence_after_thunk_passes.txt")
    memory, code = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory is not None
    tail, reserved = generate.stages.tail_rows, generate.stages.reserved_rows
    pool, full = (
        cache.pool_shapes(text, *size, BFLOAT16, reserved)
        for cache in (generate.cache, FullCache())
    )
    tail_shape = (program.batch, text.num_kv_heads, tail, text.head_dim)
    shapes = {leaf.shape for leaf in (*_large(pool), *_large(full))} | {tail_shape}
    return {
        **asdict(program),
        "compile_s": round(seconds, 1),
        **cache_parts(pool),
        "full_cache_bytes": cache_parts(full)["cache_bytes"],
        "tail_bytes": program.batch * tail * token_bytes(text, BFLOAT16),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "cache_copies_in_loop": sum(len(loop_copies(code, shape)) for shape in shapes),
        "dequantized_in_loop": dequantized(code, pool),
        **step_launches(launches.read_text(encoding="utf-8")),
        "fits": memory.peak_memory_in_bytes <= GPUS[program.device].memory,
    }


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
    """`measure` in a process of its own, since XLA reads where to write its list when it starts.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as dump:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump}".strip()
        own = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        call = f"measure({program!r}, {dump!r})"
        code = f"import json; from benchmarks.memory import *; print(json.dumps({call}))"
        done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


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
    everything: Annotated[
        bool, typer.Option("--all", help="The rows of the committed table instead.")
    ] = False,
    as_json: AsJson = False,
    out: Out = None,
    force: Force = False,
) -> None:
    """Compile a program ahead of time for a GPU, and say what it needs.

    Example: python -m benchmarks.memory --model llava-v1.6-mistral-7b --context 8192 --batch 64

    With a quantized cache: python -m benchmarks.memory --context 4096 --kv-bits akvq --kv-bits 16
    """
    check_out(out, force=force)
    shares = budget or [0.1]
    with bad_input():
        check_known("device", [device], GPUS)
        check_known("model", [model], MODELS)
        check_known("stage", [stage], STAGES)
        for name in kv_bits or ():
            make_quantizer(name)
        if any(not 0 < share <= 1 for share in shares):
            raise ValueError(f"--budget {shares} must be above 0 and at most 1 (0.1 is 10 %)")
    asked = [
        Program(device, model, context, batch, share, stage=stage, backend=backend, kv_bits=bits)
        for share in shares
        for bits in kv_bits or ["16"]
    ]
    errors = Console(stderr=True)
    try:
        programs = track(ALL if everything else asked, "compiling", console=errors, transient=True)
        rows = list(map(run, programs))
    except RuntimeError as error:
        errors.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    result = {**environment(), "rows": rows}
    finish(result, programs_part(result), as_json=as_json, out=out)


if __name__ == "__main__":
    typer.run(main)
