"""The text of a compiled program: in which named scope each instruction was traced."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.hlo import Computation, Instruction, parse

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

_CONTROL = ("while", "conditional", "call")
_FAR = 4
"""Instructions that are followed from one without a name to the nearest that has one."""


def scope_of(path: str) -> str:
    """The outermost of `SCOPES` in an instruction's path, such as jit(f)/while/body/mlp/dot."""
    return next((part for part in path.split("/") if part in SCOPES), OTHER)


class _Text:
    """The instructions of all computations, and what reads the result of each."""

    def __init__(self, text: str):
        self.computations = parse(text)
        self.instructions: Computation = {}
        self.readers: dict[str, list[Instruction]] = defaultdict(list)
        for computation in self.computations.values():
            self.instructions |= computation
            for reader in computation.values():
                inner = self._inner(reader)
                for position, operand in enumerate(reader.operands):
                    # A fusion reads by its own parameter.
                    own = [
                        one for one in inner if (one.opcode, one.index) == ("parameter", position)
                    ]
                    self.readers[operand] += own or [reader]

    def _inner(self, instruction: Instruction) -> list[Instruction]:
        """What a fusion is made of."""
        called = instruction.called if instruction.opcode == "fusion" else ()
        return [one for name in called for one in self.computations[name].values()]

    def scope(self, found: Instruction, far: int = _FAR) -> str:
        """The scope of an instruction.

        A fusion's name is that of its last instruction: where there is a product in it, the
        product's counts, and where it has no name, the one that most of its instructions have.
        Else an instruction without a name has the scope of those that read its result.
        """
        inner = [one for one in self._inner(found) if one.path]
        products = [scope_of(one.path or "") for one in inner if one.opcode == "dot"]
        if found.path is not None:
            return next((scope for scope in products if scope != OTHER), scope_of(found.path))
        named = Counter(products or [scope_of(one.path or "") for one in inner])
        if named:
            return named.most_common(1)[0][0]
        readers = self.readers.get(found.name, ()) if far else ()
        scopes = (self.scope(reader, far - 1) for reader in readers)
        return next((scope for scope in scopes if scope != OTHER), OTHER)


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
        read = _Text(text)
        control = {n for n, one in read.instructions.items() if one.opcode in _CONTROL}
        return cls(
            module=text.split(maxsplit=2)[1].rstrip(","),
            scopes={name: read.scope(one) for name, one in read.instructions.items()},
            control=frozenset(control),
        )
