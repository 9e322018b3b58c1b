"""The text of a compiled program, `compiled.as_text()`, as data."""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: without the percent sign.
        root: it is the result of its computation.
        sizes: elements of its result, one number for each part of a tuple.
        kinds: their types: "bf16", "s32", ...
        opcode: what it does.
        operands: names of instructions of the same computation.
        index: number of a parameter or of a tuple's element; None for other opcodes.
        called: names of computations.
        path: where it was traced, such as "jit(f)/while/body/mlp/dot"; None where XLA does not say.
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
    path: str | None
    text: str


Computation = dict[str, Instruction]
"""By their names, in the order in which they run."""

_NAME = re.compile(r"%([\w.-]+)")
_HEAD = re.compile(r"(?:ENTRY )?%([\w.-]+) .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_INDEX = re.compile(r"(?:, index=| parameter\()(\d+)")
_PATH = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(
    r" (?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations)=(%[\w.-]+|\{[^}]*\})"
)


def parse(hlo_text: str) -> dict[str, Computation]:
    """The computations by their names.

    Raises:
        ValueError: it is no HLO text.
    """
    computations: dict[str, Computation] = {}
    current: Computation = {}
    for line in hlo_text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[1]] = {}
        elif match := _LINE.match(line):
            current[match[2]] = _read_line(match)
    return computations


def _read_line(match: re.Match[str]) -> Instruction:
    """`  ROOT %name = type opcode(operands), attributes, metadata={...}`."""
    rest = match[3]
    kind_end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[kind_end:].strip().partition("(")
    start = rest.index("(", kind_end)
    stop = _closing(rest, start)
    attributes = re.split(", (?:metadata|backend_config)=", rest[stop:], maxsplit=1)[0]
    arrays = [
        (kind, math.prod(int(side) for side in sides.split(",") if side))
        for kind, sides in _ARRAY.findall(rest[:kind_end])
    ]
    index = _INDEX.search(f" {opcode}{rest[start:stop]}{attributes}")
    path = _PATH.search(rest[stop:])
    return Instruction(
        name=match[2],
        root=match[1] is not None,
        sizes=tuple(size for _, size in arrays),
        kinds=tuple(kind for kind, _ in arrays),
        opcode=opcode,
        operands=tuple(_NAME.findall(rest[start:stop])),
        index=int(index[1]) if index else None,
        called=tuple(_NAME.findall(" ".join(_CALLED.findall(attributes)))),
        path=path[1] if path else None,
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
