"""Where the time of a program goes: a trace by `jax.profiler`, summed up by named scopes.

An event of the trace names the instruction that ran; the compiled program's text says for every
instruction in which scope it was traced. Only JAX is needed to read either.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from benchmarks.speed.cases import Case, Variant
from benchmarks.speed.decoding import Decoding
from benchmarks.speed.hlo import Code
from benchmarks.speed.rows import described
from vlcache_jax.models.llava import Params

UNKNOWN = "unknown"
"""Of events that name no instruction of the program."""

CALLS = 3
"""Steady-state calls in a trace."""


@dataclass(frozen=True)
class Event:
    """One run of an instruction.

    Attributes:
        instruction: its name in the program's text; a kernel's name where the trace has no other.
        start_ns: when it began.
        seconds: how long it took.
    """

    instruction: str
    start_ns: float
    seconds: float


def events_of(trace: Any, module: str) -> list[Event]:
    """All that ran on the device in a `ProfileData`; on a CPU, of the program `module` alone.

    A GPU has planes of its own, one line for each stream. The CPU's events stand among the host's:
    one where a thread starts an instruction and one, "end: NAME", where it is done, perhaps by
    other threads.
    """
    planes = [plane for plane in trace.planes if plane.name.startswith("/device:GPU")]
    if planes:
        lines = (line for plane in planes for line in plane.lines)
        streams = (line for line in lines if line.name.startswith("Stream"))
        return [_device_event(event) for line in streams for event in line.events]
    starts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    ends: dict[str, list[float]] = defaultdict(list)
    for plane in trace.planes:
        for event in (event for line in plane.lines for event in line.events):
            if event.name.startswith("end: "):
                ends[event.name.removeprefix("end: ")].append(event.start_ns)
                continue
            stats = dict(event.stats)
            if stats.get("hlo_module") == module:
                starts[str(stats["hlo_op"])].append((event.start_ns, event.duration_ns))
    return [event for name, begun in starts.items() for event in _paired(name, begun, ends[name])]


def _device_event(event: Any) -> Event:
    stats = dict(event.stats)
    return Event(str(stats.get("hlo_op", event.name)), event.start_ns, event.duration_ns / 1e9)


def _paired(name: str, begun: list[tuple[float, float]], ends: list[float]) -> Iterable[Event]:
    """Runs of one instruction, which follow each other, with their ends where all have one."""
    begun, ends = sorted(begun), sorted(ends)
    complete = len(begun) == len(ends) and all(
        start <= end for (start, _), end in zip(begun, ends, strict=True)
    )
    for index, (start, duration) in enumerate(begun):
        last = max(start + duration, ends[index]) if complete else start + duration
        yield Event(name, start, (last - start) / 1e9)


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
    for event in events:
        if event.instruction not in code.control:
            time[event.instruction] += event.seconds / calls
            count[event.instruction] += 1
    total = sum(time.values())
    scope = {name: code.scopes.get(name, UNKNOWN) for name in time}
    rows = [
        {
            "scope": wanted,
            "seconds": (seconds := sum(time[name] for name in time if scope[name] == wanted)),
            "share": seconds / total,
            "launches": sum(count[name] for name in time if scope[name] == wanted) / calls,
        }
        for wanted in dict.fromkeys(scope.values())
    ]
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
        arguments: what it is compiled for.
        call: calls the compiled program, which may use up its arguments: it brings its own.
    """

    stage: str
    variant: Variant
    function: Any
    arguments: tuple[Any, ...]
    call: Callable[[Any], Any]


STAGES = ("prefill", "decode")
"""Whose programs are traced."""


def programs_of(
    case: Case, variants: Sequence[Variant], params: Params, stages: Sequence[str] = STAGES
) -> Iterator[Program]:
    """The programs of some of `STAGES` of every variant; no more than one is kept in memory."""
    inputs = jax.device_put(case.inputs())
    for variant in variants if "prefill" in stages else ():
        generate = case.generate(variant, 1)
        prompt = params, inputs, generate.settings(case.batch)
        call = lambda compiled, prompt=prompt: compiled(*prompt)  # noqa: E731
        yield Program("prefill", variant, jax.jit(generate.stages.begin), prompt, call)
    for variant in variants if "decode" in stages else ():
        decoding = Decoding(case, variant, params)
        state = jax.eval_shape(decoding.start)
        arguments = params, decoding.pool, state
        yield Program("decode", variant, decoding.program, arguments, decoding.run_once)


def profile(program: Program, folder: Path) -> dict[str, Any]:
    """Trace a few calls of a program, and sum them up.

    Args:
        program: what to trace.
        folder: where the trace is written, for XProf.

    Raises:
        RuntimeError: the trace has no event of the program.
    """
    compiled = program.function.lower(*program.arguments).compile()
    code = Code.of(compiled.as_text() or "")
    for _ in range(2):
        jax.block_until_ready(program.call(compiled))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # else the host's Python fills the trace
    before = set(folder.glob("**/*.xplane.pb"))
    with jax.profiler.trace(folder, profiler_options=options):
        for _ in range(CALLS):
            jax.block_until_ready(program.call(compiled))
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
    variants: Sequence[Variant],
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
        name = f"{program.stage} {program.variant}".replace(" ", "-")
        try:
            rows.append({**row, **profile(program, folder / name)})
        except Exception as error:  # whatever the compiler, the driver or the profiler may raise
            rows.append({**row, "exception": f"{type(error).__name__}: {error}"[:2000]})
    return rows


def dump_hlo(
    case: Case,
    variants: Sequence[Variant],
    params: Params,
    folder: Path,
    stages: Sequence[str] = STAGES,
) -> None:
    """Write every program as XLA optimised it, as text."""
    folder.mkdir(parents=True, exist_ok=True)
    for program in programs_of(case, variants, params, stages):
        compiled = program.function.lower(*program.arguments).compile()
        size = f"{case.model}-{case.context}x{case.batch}"
        name = f"{size}-{program.stage}-{program.variant}.hlo.txt".replace(" ", "-")
        (folder / name).write_text(compiled.as_text() or "", encoding="utf-8")
