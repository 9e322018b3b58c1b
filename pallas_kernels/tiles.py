"""What the Triton kernels share: tiles of rows, products, launch parameters.

A tile is [rows, padded(H)]: Triton's arrays have sizes of powers of two, so head dims of 80 or 96
are loaded with zeros behind them, and any number of rows by a mask.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.backends import current_device
from pallas_kernels.rows import LayerRows

SMALLEST = 16
"""Least side of a matrix product on tensor cores."""

LOG2_E = 1.4426950408889634
"""Softmax is computed in powers of two, for which there is an instruction."""


def padded(size: int) -> int:
    """The next power of two, at least `SMALLEST`."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


Index = tuple[jax.Array | int, ...]


def gather(ref: Any, index: Index, valid: jax.Array | None) -> jax.Array:
    """Entries of a reference; zeros where not valid, which are never read.

    Args:
        ref: where to read.
        index: an integer or int32 array for each axis, which broadcast to the result's shape.
        valid: bool, which broadcasts to it too; None where all of them are.
    """
    if valid is None:
        return plgpu.load(ref.at[index])
    shape = jnp.broadcast_shapes(*map(jnp.shape, index))
    return plgpu.load(ref.at[index], mask=jnp.broadcast_to(valid, shape), other=0)


def scatter(ref: Any, index: Index, valid: jax.Array, values: jax.Array) -> None:
    """Write entries to a reference, in its type.

    Args:
        ref: where to write.
        index: an integer or int32 array for each axis, which broadcast to the shape of `values`.
        valid: which are written, bool, which broadcasts to it too.
        values: the entries.
    """
    plgpu.store(ref.at[index], values.astype(ref.dtype), mask=jnp.broadcast_to(valid, values.shape))


def load(ref: Any, rows: jax.Array, valid: jax.Array | None, *, middle: Index = ()) -> jax.Array:
    """Rows [R] of a reference as a tile [R, padded(H)]; zeros where not valid.

    Args:
        ref: [rows, *middle, H].
        rows: which rows, int32 [R]; those that are not valid are never read.
        valid: bool [R], or None where all of them are.
        middle: where to read along the axes between.
    """
    columns, mask = _tile(ref, valid)
    return gather(ref, (rows[:, None], *middle, columns[None, :]), mask)


def store(
    ref: Any, rows: jax.Array, valid: jax.Array, tile: jax.Array, *, lead: Index = ()
) -> None:
    """Write a tile's valid rows to a reference [*lead, rows, H], in its type."""
    columns, mask = _tile(ref, valid)
    scatter(ref, (*lead, rows[:, None], columns[None, :]), mask, tile)


def _tile(ref: Any, valid: jax.Array | None) -> tuple[jax.Array, Any]:
    """Columns of a tile, and which of its entries are there: None where all are."""
    head_dim = ref.shape[-1]
    columns = jnp.arange(padded(head_dim), dtype=jnp.int32)
    mask = None if valid is None else valid[:, None]
    if head_dim != columns.size:
        inside = columns[None, :] < head_dim
        mask = inside if mask is None else mask & inside
    return columns, mask


def dot(a: jax.Array, b: jax.Array, *, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
    """Product of two tiles, summed in float32; of float32 tiles, really float32 (no TF32)."""
    exact = a.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else None
    return plgpu.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision)


def of_kv_head(rows: jax.Array | LayerRows, each: int = 1) -> pl.BlockSpec:
    """What a program sees of keys or values: those of its sequence's kv head, [rows, H].

    Args:
        rows: an array [B, T, K, H]; or a layer, of whose buffers all rows of the head are seen.
        each: programs of a kv head, along the grid's last axis but one; the last are the sequences.
    """
    if isinstance(rows, LayerRows):
        sides = rows.k.shape[2:]
        return pl.BlockSpec((None, None, *sides), lambda *at: (at[-1], at[-2] // each, 0, 0))
    _, length, _, head_dim = rows.shape
    return pl.BlockSpec((None, length, None, head_dim), lambda *at: (at[-1], 0, at[-2] // each, 0))


def call(
    kernel: Callable[..., None],
    name: str,
    *,
    grid: tuple[int, ...],
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    aliases: dict[int, int] | None = None,
    config: Any,
    cost: pl.CostEstimate,
    **static: Any,
) -> Callable[..., Any]:
    """`pl.pallas_call` for the Triton backend; where there is no GPU the kernel is interpreted.

    Interpreted kernels are for tests: they compute the same numbers, slowly.

    Args:
        kernel: takes the references and `static`.
        name: of the kernel, in programs and traces.
        grid: number of programs along each axis, the first varying fastest.
        in_specs: of the inputs, which may be trees of arrays; None for one that is not there.
        out_specs: of the outputs.
        out_shape: of the outputs.
        aliases: input array's number to that of the output array that is the same memory.
        config: has `num_warps` of one program, and `num_stages`: trips of a loop loaded ahead.
        cost: operations and bytes, for XLA's scheduler.
        static: compile-time arguments of the kernel.
    """
    body = functools.partial(kernel, **static)
    body.__name__ = name  # pyright: ignore[reportAttributeAccessIssue]  the kernel's name in the code
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        cost_estimate=cost,
        interpret=current_device().platform == "cpu",
        name=name,
    )
