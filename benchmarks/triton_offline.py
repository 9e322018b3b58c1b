"""Compile the Pallas Triton kernels of a program to machine code on a machine without a GPU.

`compile_kernels(function, *args, gpu="h200")` lowers a program for a GPU, takes the Triton code of
every Pallas kernel out of it and has the `triton` wheel and its ptxas compile that. A kernel that
passes compiles, and what it takes of a multiprocessor is known. XLA carries a Triton of its own:
registers and shared memory are close to what will run, not the same.

It needs `pip install 'vlcache-jax[offline]'`, but neither a GPU nor JAX's CUDA plugin.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
from jax.extend.mlir import ir

from benchmarks.ahead_of_time import GPUS, abstract_mesh


@dataclass(frozen=True)
class KernelCode:
    """What a kernel became.

    Attributes:
        name: as in the lowered program.
        registers: of one thread.
        spill_bytes: moved between registers and memory by each thread, for want of registers:
            stores and loads together, as they stand in the code.
        shared_bytes: shared memory of one block.
        tensor_core_ops: matrix instructions (mma.sync, wgmma.mma_async) that stand in the PTX.
        num_warps: of one block.
        num_stages: of the pipeline of a loop.
        grid: blocks; of the first call, where the program calls the kernel more than once.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core_ops: int
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]


class KernelError(RuntimeError):
    """A kernel, by its name, does not compile: what the compiler said."""

    def __init__(self, kernel: str, message: str):
        super().__init__(f"kernel {kernel}: {message}")
        self.kernel = kernel
        self.message = message


def compile_kernels(function: Callable[..., Any], *args: Any, gpu: str) -> list[KernelCode]:
    """Compile all Pallas Triton kernels that a program calls.

    Args:
        function: the program.
        args: its arguments: pytrees of `jax.ShapeDtypeStruct` or of arrays.
        gpu: a name of `GPUS`.

    Returns:
        The kernels in the order of the program, each once: calls with the same code, number of
        warps and number of stages are one kernel. Empty where the program calls none.

    Raises:
        KernelError: Triton or ptxas failed.
        RuntimeError: the `triton` wheel is not installed.
        ValueError: no such GPU is described here, or a kernel is not Triton's.
    """
    if gpu not in GPUS:
        raise ValueError(f"{gpu=} is not known: use one of {', '.join(GPUS)}")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "compiling kernels without a GPU needs triton: pip install 'vlcache-jax[offline]'"
        )
    with jax.sharding.use_abstract_mesh(abstract_mesh(GPUS[gpu])):
        lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    calls = triton_calls(lowered.compiler_ir("stablehlo"))
    return [_compile(call, GPUS[gpu].capability) for call in calls]


class _Call(NamedTuple):
    """A Pallas kernel in a lowered program; `code` is Triton IR in text form."""

    name: str
    code: str
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]


def triton_calls(module: Any) -> list[_Call]:
    """The different kernels of a lowered program, in order."""
    from jaxlib.triton import dialect

    dialect.register_dialect(module.context)  # JAX's own context knows the other dialects
    calls: dict[tuple[str, int, int], _Call] = {}

    def visit(operation: Any) -> ir.WalkResult:
        if operation.operation.name != "stablehlo.custom_call":
            return ir.WalkResult.ADVANCE
        target = operation.attributes["call_target_name"].value
        if target.startswith("mosaic_gpu"):  # before jax 0.11 what pallas_call takes by default
            mosaic.append(operation)
        if target == "__gpu$xla.gpu.triton":
            config = operation.attributes["mhlo.backend_config"]
            warps, stages, *grid = (
                config[name].value
                for name in ("num_warps", "num_stages", "grid_x", "grid_y", "grid_z")
            )
            # As text, which other versions of MLIR read too; without source locations.
            code = str(ir.Module.parse(config["ir"].value_bytes, module.context))
            call = _Call(config["name"].value, code, warps, stages, tuple(grid))
            calls.setdefault((code, warps, stages), call)
        return ir.WalkResult.ADVANCE

    mosaic: list[Any] = []
    module.operation.walk(visit)
    if mosaic:
        raise ValueError(
            "a kernel was lowered for Mosaic GPU: give it the compiler_params of Triton"
        )
    return list(calls.values())


# Runs in a process of its own: Triton's passes write their messages to the standard error stream,
# past Python, and LLVM ends the process at what it takes for a fault of its own.
_TRITON = """
import json, pathlib, sys
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas

path, arch, num_warps, num_stages = sys.argv[1], *map(int, sys.argv[2:])
target = GPUTarget("cuda", arch, 32)
# XLA begins with these passes (`MakeTTIR`), which triton.compile leaves out of code in text form.
# One of them has a product that is added to something begin with that, in the same registers.
context = ir.context()
ir.load_dialects(context)
CUDABackend(target).load_dialects(context)
module = ir.parse_mlir_module(path, context)
module.context = context
CUDABackend.make_ttir(module, {}, None, arch)
pathlib.Path(path).write_text(str(module), encoding="utf-8")
kernel = triton.compile(
    path, target=target, options={"num_warps": num_warps, "num_stages": num_stages}
)
pathlib.Path(path).with_suffix(".ptx").write_text(kernel.asm["ptx"], encoding="utf-8")
print(json.dumps({"shared": kernel.metadata.shared, "ptxas": get_ptxas(arch).path}))
"""


def _compile(call: _Call, capability: tuple[int, int]) -> KernelCode:
    arch = 10 * capability[0] + capability[1]
    with TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ttir")
        source.write_text(call.code, encoding="utf-8")
        numbers = map(str, (arch, call.num_warps, call.num_stages))
        made = _run(call, "triton", [sys.executable, "-c", _TRITON, str(source), *numbers])
        report = json.loads(made.stdout.splitlines()[-1])

        ptx = source.with_suffix(".ptx")
        target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"  # wgmma exists in sm_90a alone
        command = [report["ptxas"], "-v", f"-arch={target}", str(ptx), "-o", f"{folder}/cubin"]
        log = _run(call, "ptxas", command).stderr
        if not re.search(r"spill stores.* Used \d+ registers", log, re.DOTALL):
            raise KernelError(call.name, f"ptxas reports no registers\n{log}")
        instructions = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)\b", ptx.read_text("utf-8"))

    def sum_of(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, log))

    return KernelCode(
        name=call.name,
        registers=sum_of(r"Used (\d+) registers"),
        spill_bytes=sum_of(r"(\d+) bytes spill (?:stores|loads)"),
        shared_bytes=report["shared"] + sum_of(r"(\d+) bytes smem"),
        tensor_core_ops=len(instructions),
        num_warps=call.num_warps,
        num_stages=call.num_stages,
        grid=call.grid,
    )


def _run(call: _Call, tool: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    # Triton warns where nobody says whether a * b + c may be one instruction; in XLA it may.
    environment = os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise KernelError(call.name, f"{tool} failed ({done.returncode})\n{_gist(done.stderr)}")
    return done


def _gist(messages: str) -> str:
    """The lines that name an error, out of listings of code and stacks; else the last ones."""
    lines = messages.splitlines()
    return "\n".join([line for line in lines if "error" in line.lower()] or lines[-20:])
