"""The text of a compiled program: in which named scope each instruction was traced."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

SCOPES = (
    "vision",
    "prefill_attention",
    "scores",
    "select",
    "compact",
    "decode_attention",
    "projections",
    "mlp",
    "head",
    "sampling",
)
"""The named scopes of `vlcache_jax`; what is in none of them is "other": norms, the residual
stream, embeddings, the loop, the prompt's keys and values on their way into the cache."""

OTHER = "other"

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^| )([a-z][\w-]*)\(([^)]*)\)")
_NAMED = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"calls=%?([\w.-]+)")
_CONTROL = ("while", "conditional", "call")
_FAR = 4
"""Instructions that are followed from one without a name to the nearest that has one."""


def scope_of(path: str) -> str:
    """The outermost of `SCOPES` in an instruction's path, such as jit(f)/while/body/mlp/dot."""
    return next((part for part in path.split("/") if part in SCOPES), OTHER)


@dataclass(frozen=True)
class _Instruction:
    operation: str
    operands: tuple[str, ...]
    scope: str | None  # None where XLA left it without a name
    called: str | None  # a fusion's computation


@dataclass
class _Text:
    """What the lines say."""

    instructions: dict[str, _Instruction] = field(default_factory=dict)
    computations: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    parameters: dict[tuple[str, str], str] = field(default_factory=dict)
    readers: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))

    def read(self, text: str) -> None:
        computation = ""
        for line in text.splitlines():
            if line.rstrip().endswith("{") and " = " not in line.split("(")[0]:
                computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                continue
            found = _INSTRUCTION.match(line)
            operation = found and _OPERATION.search(found[2])
            if not found or not operation:
                continue
            name, rest = found.groups()
            named, called = _NAMED.search(rest), _CALLED.search(rest)
            operands = tuple(re.findall(r"%([\w.-]+)", operation[2]))
            self.instructions[name] = _Instruction(
                operation[1],
                operands,
                None if named is None else scope_of(named[1]),
                None if called is None else called[1],
            )
            self.computations[computation].append(name)
            if operation[1] == "parameter":
                self.parameters[computation, operation[2]] = name
            for position, operand in enumerate(operands):
                self.readers[operand].append((name, position))

    def scope(self, name: str, far: int = _FAR) -> str:
        """The scope of an instruction.

        A fusion's name is that of its last instruction: where there is a product in it, the
        product's counts, and where it has no name, the one that most of its instructions have.
        Else an instruction without a name has the scope of those that read its result.
        """
        found = self.instructions[name]
        inner = [
            self.instructions[other] for other in self.computations.get(found.called or "", ())
        ]
        products = [one.scope for one in inner if one.operation == "dot" and one.scope]
        if found.scope is not None:
            return next((scope for scope in products if scope != OTHER), found.scope)
        named = Counter(products or [one.scope for one in inner if one.scope])
        if named:
            return named.most_common(1)[0][0]
        if far == 0:
            return OTHER
        scopes = (self.scope(reader, far - 1) for reader in self._readers(name))
        return next((scope for scope in scopes if scope != OTHER), OTHER)

    def _readers(self, name: str) -> Iterator[str]:
        """What reads a result: of a fusion, its own parameter for it."""
        for reader, position in self.readers.get(name, ()):
            called = self.instructions[reader].called
            yield self.parameters.get((called or "", str(position)), reader)


@dataclass(frozen=True)
class Code:
    """What the text of a compiled program says.

    Attributes:
        module: the program's name.
        scopes: the scope of each instruction.
        control: instructions that only run others, whose time is that of the others.
    """

    module: str
    scopes: Mapping[str, str]
    control: frozenset[str]

    @classmethod
    def of(cls, text: str) -> "Code":
        """Read it."""
        read = _Text()
        read.read(text)
        control = {n for n, one in read.instructions.items() if one.operation in _CONTROL}
        return cls(
            module=text.split(maxsplit=2)[1].rstrip(","),
            scopes={name: read.scope(name) for name in read.instructions},
            control=frozenset(control),
        )
