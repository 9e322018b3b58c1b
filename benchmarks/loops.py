"""What a compiled program does inside of its loops: what they write anew, and what they launch.

`loop_copies` finds in the optimised code what a cache must never be: written anew at every step.
`step_launches` reads XLA's list of what a decode step launches.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from benchmarks.hlo import Computation, Instruction, parse


def loop_copies(hlo_text: str, shape: tuple[int, ...]) -> list[str]:
    """Find what writes a whole array of this size inside a loop.

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
    wanted = math.prod(shape)
    return _written(hlo_text, _loops, lambda kind, size: size == wanted)


def copies(hlo_text: str, shape: tuple[int, ...]) -> list[str]:
    """`loop_copies`, anywhere in the program."""
    wanted = math.prod(shape)
    return _written(hlo_text, _entry, lambda kind, size: size == wanted)


def loop_floats(hlo_text: str, least: int) -> list[str]:
    """Find what writes a floating-point array of at least so many elements inside a loop.

    So a quantized cache is found out that is made into one of full width at every step.
    """
    floats = ("f16", "bf16", "f32", "f64")
    return _written(hlo_text, _loops, lambda kind, size: kind in floats and size >= least)


def _written(
    hlo_text: str,
    begin: Callable[[Mapping[str, Computation]], list[str]],
    wanted: Callable[[str, int], bool],
) -> list[str]:
    """What fills a buffer of a wanted type and size in any computation that is reached."""
    computations = parse(hlo_text)
    return [
        instruction.text
        for name in _reached(computations, begin(computations))
        for instruction in computations[name].values()
        if any(
            wanted(kind, size) and _fills(instruction, computations[name], computations, size)
            for kind, size in zip(instruction.kinds, instruction.sizes, strict=True)
        )
    ]


def _loops(computations: Mapping[str, Computation]) -> list[str]:
    """Conditions and bodies of all loops."""
    return [
        name
        for computation in computations.values()
        for instruction in computation.values()
        if instruction.opcode == "while"
        for name in instruction.called
    ]


def _entry(computations: Mapping[str, Computation]) -> list[str]:
    """What nothing calls: the program itself."""
    called = {
        name
        for computation in computations.values()
        for instruction in computation.values()
        for name in instruction.called
    }
    return [name for name in computations if name not in called]


def _reached(computations: Mapping[str, Computation], waiting: list[str]) -> list[str]:
    """These and what they call; a fusion is one instruction."""
    reached: dict[str, None] = {}
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
    instruction: Instruction,
    computation: Computation,
    computations: Mapping[str, Computation],
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


def _results(fused: Computation) -> Iterator[Instruction]:
    """What a fusion computes last: its root, or each part of a tuple."""
    root = next(instruction for instruction in fused.values() if instruction.root)
    for name in root.operands if root.opcode == "tuple" else (root.name,):
        yield fused[_source(name, fused)[0]]


def _in_place(
    result: Instruction, fused: Computation, fusion: Instruction, computation: Computation
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


def _starts(instruction: Instruction) -> tuple[str, ...]:
    """Where a dynamic-slice reads or a dynamic-update-slice writes."""
    return instruction.operands[2 if instruction.opcode in _UPDATE else 1 :]


def _needed(name: str, user: Instruction, computation: Computation) -> bool:
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


def _source(name: str, computation: Computation) -> _Array:
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


def _overlap(array: _Array, name: str, computation: Computation) -> bool:
    """Whether the value called `name` is the array or a tuple with it inside."""
    whole, part = _source(name, computation)
    if part is None and computation[whole].opcode == "tuple":
        return any(_overlap(array, inner, computation) for inner in computation[whole].operands)
    return whole == array[0] and (part == array[1] or part is None)


_THUNK = re.compile(r"(\s*)\d+: k(\w+)\s+\[[^]]*\]\s*(\S*)")
_ATTENTION = ("append_and_attend", "quantized_append_and_attend")
_KERNELS = (*_ATTENTION, "merge_splits", "add_rms_norm", "sample_tokens")


def step_launches(thunks: str) -> dict[str, Any]:
    """What a decode step launches, by the innermost loop that has the decode kernel in it.

    Args:
        thunks: XLA's list of launches, `*.thunk_sequence_after_thunk_passes.txt`.

    Returns:
        "kernels_per_step": how often each Pallas kernel is launched in one step;
        "launches_per_layer": from one layer's attention to the next one's, the median;
        "one_command_buffer": the loop's body is a single command buffer. None for both where the
        attention is not a kernel.
    """
    body = list(_innermost(thunks))
    names = [name for _, kind, name in body if kind != "CommandBuffer"]
    attention = [i for i, name in enumerate(names) if name in _ATTENTION]
    gaps = [b - a for a, b in pairwise(attention)]
    top = [kind for depth, kind, _ in body if depth == min(other for other, _, _ in body)]
    return {
        "kernels_per_step": dict(Counter(name for name in names if name in _KERNELS)),
        "launches_per_step": len(names),
        "launches_per_layer": statistics.median(gaps) if gaps else None,
        "one_command_buffer": top == ["CommandBuffer"] if attention else None,
    }


def _innermost(thunks: str) -> Iterator[tuple[int, str, str]]:
    """Depth, kind and name of each launch in the body of the last loop with a decode kernel."""
    lines = thunks.splitlines()
    bodies = [i for i, line in enumerate(lines) if line.strip() == "body:"]
    for start in reversed(bodies):
        depth = len(lines[start]) - len(lines[start].lstrip())
        body = []
        for line in lines[start + 1 :]:
            if line.strip() and len(line) - len(line.lstrip()) <= depth:
                break
            if match := _THUNK.match(line):
                # Where a program calls a kernel in two shapes, XLA numbers the second: name__1.
                body.append((len(match[1]), match[2], match[3].split("__")[0]))
        if any(name in _ATTENTION for _, _, name in body):
            yield from body
            return
