"""Times of programs on a device that works behind the host's back.

A sample is the time from the first launch to the end of the last one, of several launches in a row,
so that the host's part of a launch hides behind the device's work; the last synchronisation, some
30 us, is spread over at least `SAMPLE_S`. Small operations are called many times in one program,
over input sets that together are larger than the cache: see `program_of`.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

L2_BYTES = 60 * 2**20
"""The largest L2 cache of the GPUs in question, the H200's."""

SAMPLE_S = 0.01
"""Least time of one sample, where a program is called more than once for it."""


@dataclass(frozen=True)
class Effort:
    """How thoroughly things are timed.

    Attributes:
        warm_ups: programs run before the first sample.
        repeats: samples.
        sample_s: least time of a sample.
    """

    warm_ups: int = 3
    repeats: int = 20
    sample_s: float = SAMPLE_S


DRY = Effort(1, 2, 0.0)
"""Of a dry run: nothing is to be learned from its times."""

BRIEF = Effort(2, 10, 0.005)
"""Of a sweep over many variants."""


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        samples: seconds of one call, from each sample.
        compile_s: seconds of the first call.
        calls: calls in one program.
        programs: programs run in one sample.
    """

    samples: list[float]
    compile_s: float
    calls: int
    programs: int

    @property
    def seconds(self) -> float:
        """Of one call: the median."""
        return statistics.median(self.samples)

    def record(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "seconds": self.seconds,
            "spread": [min(self.samples), max(self.samples)],
            "samples": self.samples,
            "compile_s": self.compile_s,
            "calls_per_program": self.calls,
            "programs_per_sample": self.programs,
        }


def difference(longer: Timing, shorter: Timing, parts: int = 1) -> Timing:
    """What a program costs more than another one that took turns with it, sample by sample.

    Args:
        longer: its times.
        shorter: those of the other one.
        parts: equal parts that it does more, of which one is asked for.
    """
    pairs = zip(longer.samples, shorter.samples, strict=True)
    compile_s = max(longer.compile_s, shorter.compile_s)
    samples = [(long - short) / parts for long, short in pairs]
    return Timing(samples, compile_s, parts, longer.programs)


@contextmanager
def compilations() -> Iterator[list[float]]:
    """Seconds of every program that XLA compiles inside of the block."""
    seen: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Normally distributed numbers, made on the device."""
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def sets_for(set_bytes: int, *, dry: bool, most: int = 64) -> int:
    """How many input sets are together larger than twice the L2 cache; at least two."""
    return 2 if dry else min(most, max(2, math.ceil(2 * L2_BYTES / set_bytes)))


def program_of(operation: Callable[..., Any], *, carries: bool = False) -> Any:
    """One program that calls an operation once for every input set, one call after the other.

    Each call waits for the one before: its first argument is tied to that one's result. Else XLA
    could merge calls, or run them side by side.

    Args:
        operation: a function of the arrays of an input set and of those that all sets share; both
            may be trees of arrays.
        carries: it gives its result, and what the next call shares instead: what is written in
            place is copied once, not by each call.

    Returns:
        A jitted function of (input sets, shared arrays).
    """
    inner = jax.jit(operation)  # a function of the program, traced once

    @jax.jit
    def program(sets: Sequence[Sequence[Any]], shared: Sequence[Any]) -> list[Any]:
        results: list[Any] = []
        for first, *others in sets:
            if results:
                first, results[-1] = lax.optimization_barrier((first, results[-1]))
            result = inner(first, *others, *shared)
            if carries:
                result, *shared = result
            results.append(result)
        return results

    return program


def chain(
    operation: Callable[..., Any],
    sets: Sequence[Any],
    shared: Sequence[Any] = (),
    *,
    carries: bool = False,
) -> Callable[[], Any]:
    """What launches the program of `program_of` on these arrays, and does not wait for it."""
    program = program_of(operation, carries=carries)
    return lambda: program(sets, shared)


def compare(
    programs: dict[str, Callable[[], Any]], *, calls: int, effort: Effort
) -> dict[str, Timing | Exception]:
    """Time programs, taking turns, so that what changes with the time changes for all of them.

    Args:
        programs: by name; each launches its program and does not wait for it.
        calls: calls of the operation in each.
        effort: how thoroughly.

    Returns:
        What was measured, or why a program did not run.
    """
    found: dict[str, Timing | Exception] = {}
    launches: dict[str, tuple[float, int]] = {}
    for name, program in programs.items():
        try:
            began = time.perf_counter()
            jax.block_until_ready(program())
            compile_s = time.perf_counter() - began
            for _ in range(effort.warm_ups - 1):
                jax.block_until_ready(program())
            once = _sample(program, 1)
        except Exception as error:  # whatever the compiler and the driver may raise
            found[name] = error.with_traceback(None)  # which would keep what was allocated
            continue
        launches[name] = compile_s, max(1, min(100, math.ceil(effort.sample_s / once)))
    samples: dict[str, list[float]] = {name: [] for name in launches}
    for _ in range(effort.repeats):
        for name, (_, count) in launches.items():
            samples[name].append(_sample(programs[name], count) / (count * calls))
    for name, (compile_s, count) in launches.items():
        found[name] = Timing(samples[name], compile_s, calls, count)
    return {name: found[name] for name in programs}


def reason(error: Exception) -> str:
    """What a result file says of an exception."""
    return f"{type(error).__name__}: {error}"[:2000]


def _sample(program: Callable[[], Any], count: int) -> float:
    result = None
    began = time.perf_counter()
    for _ in range(count):
        result = program()
    jax.block_until_ready(result)
    return time.perf_counter() - began
