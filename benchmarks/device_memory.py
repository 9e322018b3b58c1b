"""What a program really takes of a GPU's memory: the peak that the allocator saw while it ran."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from benchmarks.device import describe
from benchmarks.models import MODELS, abstract_inputs, empty_cache
from vlcache_jax.models.llava import abstract_params

if TYPE_CHECKING:
    from benchmarks.memory import Program


def device_statistics() -> dict[str, int]:
    """What the allocator of the GPU tells.

    Raises:
        benchmarks.device.NoGpu: there is none.
    """
    describe(need_gpu=True)
    return jax.devices()[0].memory_stats() or {}


def peak(program: "Program", statistics: Callable[[], dict[str, int]] = device_statistics) -> int:
    """Run a program once, and give the most bytes that were in use since the process began.

    Its weights and prompts are zeros: what they hold changes no size.

    Args:
        program: what to run.
        statistics: what is asked for the peak, before and after.
    """
    statistics()  # no weights are made where there is no GPU
    config, bfloat16 = MODELS[program.model], jnp.dtype(jnp.bfloat16)
    generate = program.generate()

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    params = zeros(abstract_params(config, bfloat16))
    if program.stage == "decode":
        pool, state = empty_cache(generate, program.batch, program.context, bfloat16)
        decode = jax.jit(generate.stages.decode_chunk, donate_argnums=2)
        jax.block_until_ready(decode(params, pool, state))
    else:
        inputs = zeros(abstract_inputs(config, program.batch, program.context))
        inputs = replace(inputs, length=inputs.length + program.context)
        jax.block_until_ready(jax.jit(generate)(params, inputs, jax.random.key(0)))
    return statistics()["peak_bytes_in_use"]


def alone(call: str, program: "Program", environment: dict[str, str]) -> Any:
    """The result of a call in a process of its own, for which XLA and its allocator begin anew.

    Args:
        call: of a function of `memory` or of this module, with `program` as its argument.
        program: that argument.
        environment: of the process.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    code = (
        "import json; from benchmarks import device_memory, memory; "
        f"program = memory.Program(**{asdict(program)!r}); print(json.dumps({call}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{program} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(program: "Program") -> int:
    """`peak` in a process of its own, whose allocator has held nothing else."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return alone("device_memory.peak(program)", program, environment)
