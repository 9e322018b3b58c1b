"""Compile a whole program for a named GPU on a machine that has none.

`compile_for("h200", function, *args)` gives the executable that a machine with that GPU would run:
its byte counts (`Memory`) and its optimised code (`compiled.as_text()`), of models that no laptop
could hold, since arguments are shapes alone. `loop_copies` finds in that code what a cache must
never be: written anew at every step of a loop. Autotuning needs the GPU and is left out.

It needs the CUDA plugin, `pip install 'vlcache-jax[cuda]'`. Without a GPU the plugin starts only
where nobody asks it for one: with `JAX_PLATFORMS=cpu` in the environment.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies


@dataclass(frozen=True)
class Gpu:
    """What the compiler asks of a GPU.

    Attributes:
        name: as the driver spells it; JAX's `device_kind`.
        capability: compute capability, (major, minor).
        features: "ACCELERATED_FEATURES" for code of this architecture alone (sm_90a), or "NONE".
        memory: bytes of device memory.
        bandwidth: of that memory, in bytes per second.
        l2_cache: bytes.
        cores: streaming multiprocessors.
        lanes: float32 units of one core.
        clock_ghz: highest clock.
        shared_memory: bytes of shared memory of one core.
        block_shared_memory: the most of it that one block may ask for, in bytes.
    """

    name: str
    capability: tuple[int, int]
    features: str
    memory: int
    bandwidth: int
    l2_cache: int
    cores: int
    lanes: int
    clock_ghz: float
    shared_memory: int
    block_shared_memory: int

    def target_config(self) -> str:
        """The description as XLA reads it: a GpuTargetConfigProto in text form."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block_optin: {self.block_shared_memory}
              core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock_ghz}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_cache}
              device_memory_size: {self.memory}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              cuda_compute_capability {{
                major: {major} minor: {minor} feature_extension: {self.features}
              }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.name}"
        """


GPUS: Mapping[str, Gpu] = {
    "h200": Gpu(
        name="NVIDIA H200",
        capability=(9, 0),
        features="ACCELERATED_FEATURES",
        memory=150_754_820_096,
        bandwidth=4_800_000_000_000,
        l2_cache=62_914_560,
        cores=132,
        lanes=128,
        clock_ghz=1.98,
        shared_memory=233_472,
        block_shared_memory=232_448,
    ),
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        features="ACCELERATED_FEATURES",
        memory=84_942_979_072,
        bandwidth=3_352_320_000_000,
        l2_cache=52_428_800,
        cores=132,
        lanes=128,
        clock_ghz=1.98,
        shared_memory=233_472,
        block_shared_memory=232_448,
    ),
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        features="NONE",
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        l2_cache=41_943_040,
        cores=108,
        lanes=64,
        clock_ghz=1.41,
        shared_memory=167_936,
        block_shared_memory=166_912,
    ),
}
"""The GPUs that can be named. Memory and caches as the driver reports them."""


@dataclass(frozen=True)
class Memory:
    """Bytes of device memory that a program needs.

    Attributes:
        arguments: what is passed in.
        outputs: what is handed back, the aliased part included.
        temporaries: what lives only inside.
        aliased: outputs that lie in donated arguments.
        peak: most that is in use at one time, everything included.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    peak: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Memory":
        """The byte counts of a compiled program."""
        stats: Any = compiled.memory_analysis()
        return cls(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            peak=stats.peak_memory_in_bytes,
        )


def compile_for(
    gpu: str, function: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """Compile `jax.jit(function)` for a GPU that need not be there.

    Args:
        gpu: a name of `GPUS`.
        function: the program.
        args: its arguments: pytrees of `jax.ShapeDtypeStruct`, or of arrays, of which only shape
            and type are used.
        donate_argnums: arguments whose memory the program may use, as in `jax.jit`.

    Raises:
        ValueError: no such GPU is described here.
        RuntimeError: the CUDA plugin is not installed, or did not start.
    """
    sharding = _sharding(gpu)

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    jitted = jax.jit(function, donate_argnums=donate_argnums)
    with jax.sharding.use_abstract_mesh(abstract_mesh(GPUS[gpu])), warnings.catch_warnings():
        # Where compiled programs are kept, those for a GPU that is not there cannot be read back.
        warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
        return jitted.lower(*jax.tree.map(place, args)).compile()


def abstract_mesh(gpu: Gpu) -> jax.sharding.AbstractMesh:
    """No mesh, on this GPU: what Pallas asks for the device, since jax sees none."""
    device = jax.sharding.AbstractDevice(device_kind=gpu.name, num_cores=gpu.cores, platform="gpu")
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


def _sharding(gpu: str) -> jax.sharding.Sharding:
    """Of arrays that lie on the GPU."""
    if gpu not in GPUS:
        raise ValueError(f"{gpu=} is not known: use one of {', '.join(GPUS)}")
    try:
        topology = topologies.get_topology_desc(
            "", "cuda", target_config=GPUS[gpu].target_config(), topology="1x1x1"
        )
    except NotImplementedError:  # no plugin has registered
        raise RuntimeError(_missing_plugin()) from None
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def plugin_version() -> str | None:
    """Version of the installed CUDA plugin, None where there is none."""
    found = (item.version for item in metadata.distributions() if _is_plugin(item.name))
    return next(found, None)


def _is_plugin(name: str | None) -> bool:
    return re.fullmatch(r"jax[-_]cuda\d+[-_]plugin", name or "") is not None


def _missing_plugin() -> str:
    version = plugin_version()
    if version is None:
        return "compiling for a GPU needs the CUDA plugin: pip install 'vlcache-jax[cuda]'"
    return (
        f"the CUDA plugin {version} is installed and did not start: without a GPU it does so only "
        "with JAX_PLATFORMS=cpu in the environment before jax is imported"
    )


def loop_copies(hlo_text: str, shape: tuple[int, ...]) -> list[str]:
    """Find what writes a whole array of this size inside a loop.

    Every computation that a while loop reaches is read: nested loops, branches, calls, fusions.
    Listed is each instruction there that fills a buffer of as many elements: copies, transposes,
    selects, conversions, and an update of a part that cannot happen in place, because the array
    before the update is still needed. XLA merges, splits and permutes dimensions as it likes, so
    an array is known by the number of its elements.

    Args:
        hlo_text: optimised, scheduled code: `compile_for(...).as_text()`.
        shape: of the array that should stay where it is.

    Returns:
        The instructions, without metadata; empty where such arrays are only read or updated in
        place.
    """
    size = math.prod(shape)
    computations = _parse(hlo_text)
    return [
        instruction.text
        for name in _reached_by_loops(computations)
        for instruction in computations[name].values()
        if size in instruction.sizes and _fills(instruction, computations[name], computations, size)
    ]


def loop_floats(hlo_text: str, least: int) -> list[str]:
    """Find what writes a large array of floating-point numbers inside a loop.

    So a quantised cache is found out that is made into one of full width at every step. The same
    computations are read as by `loop_copies`, and the same instructions are listed.

    Args:
        hlo_text: likewise.
        least: elements from which on an array is large.
    """
    computations = _parse(hlo_text)
    return [
        instruction.text
        for name in _reached_by_loops(computations)
        for instruction in computations[name].values()
        if any(
            kind in _FLOATS
            and size >= least
            and _fills(instruction, computations[name], computations, size)
            for kind, size in zip(instruction.kinds, instruction.sizes, strict=True)
        )
    ]


_FLOATS = ("f16", "bf16", "f32", "f64")


@dataclass(frozen=True)
class _Instruction:
    """One line of HLO.

    Attributes:
        name: without the percent sign.
        root: it is the result of its computation.
        sizes: elements of its result, one number for each part of a tuple.
        kinds: their types, likewise.
        opcode: what it does.
        operands: names of instructions of the same computation.
        index: number of a parameter or of a tuple's element; None for other opcodes.
        called: names of computations.
        text: the line without metadata.
    """

    name: str
    root: bool
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    opcode: str
    operands: tuple[str, ...]
    index: int | None
    called: tuple[str, ...]
    text: str


_Computation = dict[str, _Instruction]  # in the order in which they run

_NAME = re.compile(r"%([\w.-]+)")
_HEAD = re.compile(r"(?:ENTRY )?%([\w.-]+) .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_INDEX = re.compile(r"(?:, index=| parameter\()(\d+)")
_CALLED = re.compile(
    r" (?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations)=(%[\w.-]+|\{[^}]*\})"
)


def _parse(hlo_text: str) -> dict[str, _Computation]:
    computations: dict[str, _Computation] = {}
    current: _Computation = {}
    for line in hlo_text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[1]] = {}
        elif match := _LINE.match(line):
            current[match[2]] = _read_line(match)
    return computations


def _read_line(match: re.Match[str]) -> _Instruction:
    """`  ROOT %name = type opcode(operands), attributes, metadata={...}`."""
    rest = match[3]
    kind_end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[kind_end:].strip().partition("(")
    start = rest.index("(", kind_end)
    stop = _closing(rest, start)
    attributes = re.split(", (?:metadata|backend_config)=", rest[stop:], maxsplit=1)[0]
    arrays = _ARRAY.findall(rest[:kind_end])
    index = _INDEX.search(f" {opcode}{rest[start:stop]}{attributes}")
    return _Instruction(
        name=match[2],
        root=match[1] is not None,
        sizes=tuple(
            math.prod(int(side) for side in sides.split(",") if side) for _, sides in arrays
        ),
        kinds=tuple(kind for kind, _ in arrays),
        opcode=opcode,
        operands=tuple(_NAME.findall(rest[start:stop])),
        index=int(index[1]) if index else None,
        called=tuple(
            name for names in _CALLED.findall(attributes) for name in _NAME.findall(names)
        ),
        text=f"%{match[2]} = {rest[:stop]}{attributes}",
    )


def _closing(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"no closing bracket in {text[start : start + 80]!r}: is this HLO text?")


def _reached_by_loops(computations: Mapping[str, _Computation]) -> list[str]:
    """Conditions and bodies of all loops, and what they call; a fusion is one instruction."""
    reached: dict[str, None] = {}
    waiting = [
        name
        for computation in computations.values()
        for instruction in computation.values()
        if instruction.opcode == "while"
        for name in instruction.called
    ]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached[name] = None
            for instruction in computations[name].values():
                if instruction.opcode != "fusion":
                    waiting += instruction.called
    return list(reached)


# These hand on what they are given, or stand for a computation that is read by itself.
_FORWARD = frozenset(["bitcast", "get-tuple-element", "tuple"])
_NO_WRITE = _FORWARD | {"parameter", "constant", "while", "conditional", "call", "copy-done"}
_NO_WRITE |= {"async-start", "async-update", "async-done", "optimization-barrier", "add-dependency"}
_UPDATE = frozenset(["dynamic-update-slice", "scatter"])


def _fills(
    instruction: _Instruction,
    computation: _Computation,
    computations: Mapping[str, _Computation],
    size: int,
) -> bool:
    """Whether an instruction with a result of `size` elements writes all of them."""
    if instruction.opcode in _NO_WRITE:
        return False
    if instruction.opcode in _UPDATE:
        return _needed(instruction.operands[0], instruction, computation)
    if instruction.opcode == "fusion":
        inner = computations[instruction.called[0]]
        return any(
            size in result.sizes and not _in_place(result, inner, instruction, computation)
            for result in _results(inner)
        )
    return "output_to_operand_aliasing=" not in instruction.text  # a custom call may update, too


def _results(fused: _Computation) -> Iterator[_Instruction]:
    """What a fusion computes last: its root, or each part of a tuple."""
    root = next(instruction for instruction in fused.values() if instruction.root)
    for name in root.operands if root.opcode == "tuple" else (root.name,):
        yield fused[_source(name, fused)[0]]


def _in_place(
    result: _Instruction, fused: _Computation, fusion: _Instruction, computation: _Computation
) -> bool:
    """Whether a fusion's result can be its operand, with nothing but a part of it written."""
    if result.opcode not in _UPDATE:
        return False
    target = fused[_source(result.operands[0], fused)[0]]
    if target.opcode != "parameter" or target.index is None:
        return False
    # The old values may be read, in the same run, only at the place that is written.
    for reader in fused.values():
        reads = reader.opcode not in _FORWARD and any(
            _source(name, fused)[0] == target.name for name in reader.operands
        )
        same_place = reader.opcode == "dynamic-slice" and _starts(reader) == _starts(result)
        if reads and reader.name != result.name and not same_place:
            return False
    return not _needed(fusion.operands[target.index], fusion, computation)


def _starts(instruction: _Instruction) -> tuple[str, ...]:
    """Where a dynamic-slice reads or a dynamic-update-slice writes."""
    return instruction.operands[2 if instruction.opcode in _UPDATE else 1 :]


def _needed(name: str, user: _Instruction, computation: _Computation) -> bool:
    """Whether an array that `user` may overwrite is read later, or twice by `user` itself."""
    array = _source(name, computation)
    order = list(computation.values())
    if sum(_overlap(array, other, computation) for other in user.operands) > 1:
        return True
    return any(
        (later.opcode not in _FORWARD or later.root)
        and any(_overlap(array, other, computation) for other in later.operands)
        for later in order[order.index(user) + 1 :]
    )


_Array = tuple[str, int | None]  # the instruction that makes it; which part of a tuple


def _source(name: str, computation: _Computation) -> _Array:
    """The array that a name stands for, seen through bitcasts and tuples."""
    instruction = computation[name]
    while instruction.opcode == "bitcast":
        instruction = computation[instruction.operands[0]]
    if instruction.opcode != "get-tuple-element" or instruction.index is None:
        return instruction.name, None
    whole, part = _source(instruction.operands[0], computation)
    if part is None and computation[whole].opcode == "tuple":
        return _source(computation[whole].operands[instruction.index], computation)
    return whole, instruction.index


def _overlap(array: _Array, name: str, computation: _Computation) -> bool:
    """Whether the value called `name` is the array or a tuple with it inside."""
    whole, part = _source(name, computation)
    if part is None and computation[whole].opcode == "tuple":
        return any(_overlap(array, inner, computation) for inner in computation[whole].operands)
    return whole == array[0] and (part == array[1] or part is None)
