"""What a device can do, measured by the plainest programs, and the floor of a stage on it."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import measure
from benchmarks.device import memory_limit
from benchmarks.roofline import BFLOAT16, Device, Stage, Work

COPIES: dict[str, Callable[[jax.Array], jax.Array]] = {"copy": jnp.copy, "x + 1": lambda x: x + 1}
"""Programs that read an array and write another one of the same size."""

IN_PLACE = "x + 1 in place"
"""What stands for a copy on a CPU, where writing to new memory is as slow as the system hands out
pages: some 1 GB/s."""


def measured(dtype: str, effort: measure.Effort) -> tuple[Device, list[dict[str, Any]]]:
    """The device of this run, and how it was measured.

    Bandwidth is that of the best copy, read and written bytes together; operations are those of a
    product of two large matrices in the given type.
    """
    gpu = jax.default_backend() == "gpu"
    size, side = (2**30, 8192) if gpu else (2**28, 1024)
    if effort == measure.DRY:
        size, side = 2**16, 64
    precision = lax.Precision.HIGHEST if dtype == "float32" else None

    def draw(*shape: int) -> jax.Array:
        return measure.normal(jax.random.key(0), shape, dtype)

    array = draw(size // jnp.dtype(dtype).itemsize)
    moves = {name: measure.chain(move, [(array,)] * 2) for name, move in COPIES.items()}
    product = measure.chain(
        lambda a, b: jnp.dot(a, b, precision=precision), [(draw(side, side), draw(side, side))] * 2
    )
    copied = measure.compare(moves if gpu else {IN_PLACE: _in_place(array)}, calls=2, effort=effort)
    found = copied | measure.compare({"product": product}, calls=2, effort=effort)
    rows = []
    for name, timing in found.items():
        if isinstance(timing, Exception):
            raise timing
        amount = 2 * side**3 if name == "product" else 2 * size
        row = {"name": name, "dtype": dtype, "amount": amount, "per_s": amount / timing.seconds}
        rows.append({**row, **timing.record()})
    best = max(rows[:-1], key=lambda row: row["per_s"])
    return Device(
        name=jax.devices()[0].device_kind,
        bandwidth=best["per_s"],
        flops=rows[-1]["per_s"],
        memory=memory_limit() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        source=f"measured in this run: {best['name']}, product of {dtype}",
    ), rows


def _in_place(array: jax.Array) -> Callable[[], jax.Array]:
    """What adds 1 to an array twice."""
    add, held = jax.jit(lambda x: x + 1, donate_argnums=0), [array]

    def run() -> jax.Array:
        for _ in range(2):
            held[0] = add(held[0])
        return held[0]

    return run


def in_type(stage: Stage, dtype: str) -> Stage:
    """The same work in another type than bfloat16.

    Only where every byte is a weight's or a cached value's: in a prefill and a decode step.
    """
    wider = jnp.dtype(dtype).itemsize / BFLOAT16.itemsize
    return Stage(
        {name: Work(part.bytes * wider, part.operations) for name, part in stage.parts.items()}
    )
