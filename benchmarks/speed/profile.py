"""Where the time of a program goes: a trace by `jax.profiler`, summed up by named scopes.

An event of the trace names the instruction that ran; the compiled program's text says for every
instruction in which scope it was traced. Only JAX is needed to read either.
"""

import functools
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from benchmarks.hlo import Instruction, parse
from benchmarks.measure import reason
from benchmarks.speed.cases import Case, Variants, name_of
from benchmarks.speed.decoding import Decoding
from benchmarks.speed.rows import described
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.models.families import Params

SCOPES = (
    "vision", "prefill_attention", "scores", "select", "compact", "decode_attention",
    "projections", "mlp", "head", "sampling",
)  # fmt: skip
"""The named scopes of `vlcache_jax`; what is in none of them is "other": norms, the residual
stream, embeddings, the loop, the prompt's keys and values on their way into the cache."""

OTHER = "other"

UNKNOWN = "unknown"
"""Of events that name no instruction of the program."""

CALLS = 3
"""Steady-state calls in a trace."""

_FAR = 4
"""Instructions that are followed from one without a name to the nearest that has one."""


def scope_of(path: str) -> str:
    """The outermost of `SCOPES` in an instruction's path, such as jit(f)/while/body/mlp/dot."""
    return next((part for part in path.split("/") if part in SCOPES), OTHER)


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
        """Read it.

        A fusion's name is that of its last instruction: where there is a product in it, the
        product's counts, and where it has no name, the one that most of its instructions have.
        Else an instruction without a name has the scope of those that read its result.
        """
        computations = parse(text)
        instructions = {n: one for each in computations.values() for n, one in each.items()}
        readers: dict[str, list[Instruction]] = defaultdict(list)

        def inner(one: Instruction) -> list[Instruction]:
            """What a fusion is made of."""
            called = one.called if one.opcode == "fusion" else ()
            return [part for name in called for part in computations[name].values()]

        for reader in instructions.values():
            parts = inner(reader)
            for position, operand in enumerate(reader.operands):
                # A fusion reads by its own parameter.
                own = [
                    part for part in parts if (part.opcode, part.index) == ("parameter", position)
                ]
                readers[operand] += own or [reader]

        def scope(found: Instruction, far: int = _FAR) -> str:
            parts = [part for part in inner(found) if part.path]
            products = [scope_of(part.path or "") for part in parts if part.opcode == "dot"]
            if found.path is not None:
                return next((name for name in products if name != OTHER), scope_of(found.path))
            if named := Counter(products or [scope_of(part.path or "") for part in parts]):
                return named.most_common(1)[0][0]
            scopes = (scope(reader, far - 1) for reader in (readers[found.name] if far else ()))
            return next((name for name in scopes if name != OTHER), OTHER)

        control = ("while", "conditional", "call")
        return cls(
            module=text.split(maxsplit=2)[1].rstrip(","),
            scopes={name: scope(one) for name, one in instructions.items()},
            control=frozenset(n for n, one in instructions.items() if one.opcode in control),
        )


Event = tuple[str, float]
"""One run: the instruction's name in the program's text, a kernel's name where the trace has no
other; and its seconds."""


def events_of(trace: Any, module: str) -> list[Event]:
    """All that ran on the device in a `ProfileData`; on a CPU, of the program `module` alone.

    A GPU has planes of its own, one line for each stream. The CPU's events stand among the host's:
    one where a thread starts an instruction and one, "end: NAME", where it is done, perhaps by
    other threads.
    """
    if planes := [plane for plane in trace.planes if plane.name.startswith("/device:GPU")]:
        return [
            (str(dict(e.stats).get("hlo_op", e.name)), e.duration_ns / 1e9)
            for plane in planes
            for line in plane.lines
            if line.name.startswith("Stream")
            for e in line.events
        ]
    starts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    ends: dict[str, list[float]] = defaultdict(list)
    for event in (e for plane in trace.planes for line in plane.lines for e in line.events):
        if event.name.startswith("end: "):
            ends[event.name.removeprefix("end: ")].append(event.start_ns)
            continue
        stats = dict(event.stats)
        if stats.get("hlo_module") == module:
            starts[str(stats["hlo_op"])].append((event.start_ns, event.duration_ns))
    return [event for name, begun in starts.items() for event in _paired(name, begun, ends[name])]


def _paired(name: str, begun: list[tuple[float, float]], ends: list[float]) -> Iterable[Event]:
    """Runs of one instruction, which follow each other, with their ends where all have one."""
    begun, ends = sorted(begun), sorted(ends)
    complete = len(begun) == len(ends) and all(
        start <= end for (start, _), end in zip(begun, ends, strict=True)
    )
    for index, (start, duration) in enumerate(begun):
        last = max(start + duration, ends[index]) if complete else start + duration
        yield name, (last - start) / 1e9


def summarize(events: Iterable[Event], code: Code, calls: int) -> dict[str, Any]:
    """Time by scope and by instruction.

    Args:
        events: what ran.
        code: the program.
        calls: calls of it in the trace.

    Returns:
        "seconds" of all instructions in one call (on a CPU some may run side by side), "launches",
        "scopes" (scope, seconds, share, launches; the longest first) and the ten longest
        "instructions".
    """
    time: dict[str, float] = defaultdict(float)
    count: Counter[str] = Counter()
    for name, seconds in events:
        if name not in code.control:
            time[name] += seconds / calls
            count[name] += 1
    total = sum(time.values())
    scope = {name: code.scopes.get(name, UNKNOWN) for name in time}
    rows = []
    for wanted in dict.fromkeys(scope.values()):
        names = [name for name in time if scope[name] == wanted]
        seconds, launches = (sum(of[name] for name in names) for of in (time, count))
        row = {"scope": wanted, "seconds": seconds, "share": seconds / total}
        rows.append({**row, "launches": launches / calls})
    longest = sorted(time, key=lambda name: -time[name])[:10]
    return {
        "seconds": total,
        "launches": sum(count.values()) / calls,
        "scopes": sorted(rows, key=lambda row: -row["seconds"]),
        "instructions": [
            {"name": name, "scope": scope[name], "seconds": time[name], "share": time[name] / total}
            for name in longest
        ],
    }


@dataclass(frozen=True)
class Program:
    """A program of a case.

    Attributes:
        stage: "prefill" (up to the first token) or "decode" (a chunk of steps).
        variant: how the cache is kept.
        function: jitted.
        arguments: makes what it is given; it may use them up.
    """

    stage: str
    variant: CacheMethod
    function: Any
    arguments: Callable[[], tuple[Any, ...]]

    def __str__(self) -> str:
        return f"{self.stage} {name_of(self.variant)}".replace(" ", "-")

    def compile(self) -> Any:
        """Compiled, as XLA optimised it."""
        return self.function.lower(*self.arguments()).compile()


STAGES = ("prefill", "decode")
"""Whose programs are traced."""


def programs_of(
    case: Case, variants: Variants, params: Params, stages: Sequence[str]
) -> Iterator[Program]:
    """The programs of some of `STAGES` of every variant; no more than one is kept in memory."""
    inputs = jax.device_put(case.inputs())
    for variant in variants if "prefill" in stages else ():
        generate = case.generate(variant, 1)
        prompt = params, inputs, generate.settings(case.batch)
        given = functools.partial(tuple, prompt)
        yield Program("prefill", variant, jax.jit(generate.stages.begin), given)
    for variant in variants if "decode" in stages else ():
        decoding = Decoding(case, variant, params)
        yield Program("decode", variant, decoding.program, decoding.arguments)


def profile(program: Program, folder: Path) -> dict[str, Any]:
    """Trace a few calls of a program into a folder, for XProf, and sum them up.

    Raises:
        RuntimeError: the trace has no event of the program.
    """
    compiled = program.compile()
    code = Code.of(compiled.as_text() or "")
    for _ in range(2):
        jax.block_until_ready(compiled(*program.arguments()))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # else the host's Python fills the trace
    before = set(folder.glob("**/*.xplane.pb"))
    with jax.profiler.trace(folder, profiler_options=options):
        for _ in range(CALLS):
            jax.block_until_ready(compiled(*program.arguments()))
    (written,) = set(folder.glob("**/*.xplane.pb")) - before
    with warnings.catch_warnings():
        # Of jaxlib's types, made at their first use; as an error it would abort the process.
        warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
        events = events_of(ProfileData.from_file(str(written)), code.module)
    if not events:
        raise RuntimeError(f"the trace {written} has no event of {code.module}")
    return {"trace": str(written), **summarize(events, code, CALLS)}


def profile_rows(
    case: Case,
    variants: Variants,
    params: Params,
    folder: Path,
    stages: Sequence[str] = STAGES,
) -> list[dict[str, Any]]:
    """The programs of some of `STAGES` of every variant, each in a folder of its own."""
    rows = []
    for program in programs_of(case, variants, params, stages):
        row = {"stage": program.stage, **described(case, program.variant)}
        if program.stage == "decode":
            row["steps"] = case.chunk
        try:
            rows.append({**row, **profile(program, folder / str(program))})
        except Exception as error:  # whatever the compiler, the driver or the profiler may raise
            rows.append({**row, "exception": reason(error)})
    return rows


def dump_hlo(
    case: Case,
    variants: Variants,
    params: Params,
    folder: Path,
    stages: Sequence[str] = STAGES,
) -> None:
    """Write every program as XLA optimised it, as text."""
    folder.mkdir(parents=True, exist_ok=True)
    for program in programs_of(case, variants, params, stages):
        name = f"{case.model}-{case.context}x{case.batch}-{program}.hlo.txt"
        (folder / name).write_text(program.compile().as_text() or "", encoding="utf-8")
