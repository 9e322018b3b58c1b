"""Kernels compared with references: the parts that all checks share.

A `Group` is one set of inputs with its reference, and the variants of the kernel that must all give
it. Programs are compiled by several threads, ahead of the ones that run.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite.stages import Context
from benchmarks.measure import reason
from benchmarks.operations import candidates, kernel, short

BOUNDS = {"bfloat16": 1e-2, "float16": 1e-2, "float32": 1e-4}
"""Largest error, of the norm of the difference to that of the reference."""

NOT_RUN = "not run: no time"

Errors = dict[str, tuple[float, float]]
"""What was compared → its error and the bound of it."""


@dataclass(frozen=True)
class Group:
    """One set of inputs.

    Attributes:
        kernel: the operation.
        label: what the inputs are.
        inputs: arrays, or trees of them, of the host, or of the device where they are large.
        variants: functions of the inputs by what is special about them.
        expected: makes the reference; called once, when the first result is there.
        judge: compares the leaves of a result with the reference.
    """

    kernel: str
    label: str
    inputs: tuple[Any, ...]
    variants: dict[str, Callable[..., Any]]
    expected: Callable[[], Any]
    judge: Callable[[list[np.ndarray], Any], Errors]


def relative_error(ours: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference to that of the reference; NaN where anything is not finite."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(ours - expected) / (norm if norm > 0 else 1.0))


def not_finite(*arrays: np.ndarray) -> float:
    """0 where all numbers are finite, else NaN, to be added to an error."""
    return 0.0 if all(np.isfinite(np.asarray(x, np.float32)).all() for x in arrays) else math.nan


def run(
    context: Context, groups: Iterable[Group], rows: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Run every variant of every group, twice each; `rows` are of the same stage, from before.

    Returns:
        The stage's result: {"rows": a row for each comparison, "not_run", "ok", "headline"}.
    """
    pool = ThreadPoolExecutor(2 if context.dry else min(8, os.cpu_count() or 1))
    planned: list[tuple[Group, str, Future[Any]]] = []
    for group in groups:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), group.inputs)
        names = list(group.variants)
        if context.dry:
            names = list(dict.fromkeys([names[0], names[-1]]))
        planned += [
            (group, name, pool.submit(_compile, group.variants[name], shapes)) for name in names
        ]
    rows = list(rows)
    expected: dict[int, Any] = {}
    saved = time.monotonic()
    for group, name, program in planned:
        row = {"kernel": group.kernel, "case": f"{group.label}; {name}"}
        if context.late():
            rows.append({**row, "ok": None, "note": NOT_RUN})
            continue
        try:
            results, again = _run_twice(program.result(), group.inputs)
            if id(group) not in expected:
                expected = {id(group): group.expected()}
            errors = group.judge(results, expected[id(group)])
        except NotImplementedError as error:
            rows.append({**row, "ok": None, "note": f"not available: {error}"})
        except Exception as error:  # one row's trouble is that row's alone
            rows.append({**row, "ok": False, "exception": reason(error)})
        else:
            rows += [_row(row, what, *numbers, again) for what, numbers in errors.items()]
        if time.monotonic() - saved > 2:  # what is there if the next one ends the process
            context.save(rows=rows, error="the process ended before the stage did")
            saved = time.monotonic()
    pool.shutdown(cancel_futures=True)
    return summary(rows)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, whether they are right, and how many."""
    right = sum(row["ok"] is True for row in rows)
    wrong = sum(row["ok"] is False for row in rows)
    headline = f"{right} of {right + wrong} right"
    compared = [row for row in rows if row.get("error") is not None and row["bound"] > 0]
    if shares := [row["error"] / row["bound"] for row in compared]:
        headline += f", worst {max(shares):.2f} of its bound"
    if others := len(rows) - right - wrong:
        headline += f", {others} not run or not available"
    not_run = sum(row.get("note") == NOT_RUN for row in rows)
    ok = wrong == 0 and right > 0
    return {"rows": rows, "ok": ok, "not_run": not_run, "headline": headline}


def _row(row: dict[str, Any], what: str, error: float, bound: float, again: bool) -> dict[str, Any]:
    number = error if math.isfinite(error) else None  # JSON has no NaN
    good = number is not None and number <= bound and again
    numbers = {"what": what, "error": number, "bound": bound, "repeatable": again}
    return {**row, **numbers, "ok": good}


def _compile(function: Callable[..., Any], shapes: Sequence[Any]) -> Any:
    return jax.jit(function).lower(*shapes).compile()


def _run_twice(program: Any, inputs: tuple[Any, ...]) -> tuple[list[np.ndarray], bool]:
    """The leaves of a result, and whether the second run gives the same bits."""
    placed = jax.device_put(inputs)
    results = []
    for _ in range(2):
        _poison(program)
        results.append([np.asarray(leaf) for leaf in jax.tree.leaves(program(*placed))])
    same = all(x.tobytes() == y.tobytes() for x, y in zip(*results, strict=True))
    return results[0], same


def _poison(program: Any) -> None:
    """Fill memory with NaN that the program is likely to get for its results and temporaries.

    Blocks of their sizes are allocated and freed just before it runs, and the allocator hands freed
    blocks out again: an element that nothing writes is then NaN, most probably. Where it
    chose other blocks the check is weaker, never wrong.
    """
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.out_info)]
    with contextlib.suppress(AttributeError, NotImplementedError):
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    blocks = [
        jax.device_put(_nan_block(size)) for size in sizes for _ in range(2) if 0 < size < 2**30
    ]
    jax.block_until_ready(blocks)


@functools.lru_cache(maxsize=4)
def _nan_block(size: int) -> np.ndarray:
    return np.full(-(-size // 4), np.nan, np.float32)


def host(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    """Normally distributed numbers on the host; random bits of "uint32"."""
    if dtype == "uint32":
        return rng.integers(0, 2**32, shape, np.uint32)
    return rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))


def variants(
    operation: str, dtype: str, size: int, *, every: bool = True, prefix: str = "", **settings: Any
) -> dict[str, Callable[..., Any]]:
    """An operation's Triton version in its configurations, by their names.

    Args:
        operation: a name of `operations.OPERATIONS`.
        dtype: of the inputs.
        size: head dim, width or vocabulary.
        every: all configurations, and the first of them with other numbers of warps; else that of
            the device alone.
        prefix: of the names.
        settings: arguments of the kernel.
    """
    run = kernel(operation, size, **settings)
    if not every:
        return {f"{prefix}default": run}
    found = candidates(operation, dtype, size)
    found = dict.fromkeys([*found, *(replace(found[0], num_warps=w) for w in (2, 4, 8))])
    return {prefix + short(config): functools.partial(run, config=config) for config in found}


def in_float32(function: Callable[..., Any], *inputs: Any, **settings: Any) -> list[np.ndarray]:
    """The leaves of what a function gives for the same numbers in float32."""

    def wide(x: Any) -> Any:
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    found = jax.jit(lambda *arrays: function(*jax.tree.map(wide, arrays), **settings))(*inputs)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]
