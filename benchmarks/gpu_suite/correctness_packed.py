"""The decode attention over packed rows against its dense reference: see correctness.py."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import checks
from benchmarks.gpu_suite.checks import BOUNDS, Errors, Group, host
from benchmarks.gpu_suite.correctness import KV_HEADS, Shape, configs, label, named, odd, shapes
from benchmarks.gpu_suite.correctness_cache import appended, cache, judge_appended, rotated
from benchmarks.gpu_suite.stages import Context
from pallas_kernels import hadamard, tiles
from pallas_kernels import quantized_decode_attention as op
from pallas_kernels.packing import per_word
from pallas_kernels.quantized_decode_attention import config as packed_config
from pallas_kernels.quantized_decode_attention import reference

RUNS = ((8,), (2,), (4, 2))
"""Widths of the runs: all of them where all configurations run, else the last ones; of a dry run
the first, whose kernel is the smallest."""


def packed(context: Context) -> dict[str, Any]:
    """The stage, without and with a new token."""
    rng = np.random.default_rng(context.seed)
    groups = []
    for shape, every in shapes(context):
        if shape[0] == "float32":  # is left to XLA
            continue
        runs = RUNS[:1] if context.dry else RUNS if every else RUNS[-1:]
        groups += [_attend_group(rng, shape, bits, every) for bits in runs]
        if odd(shape) or every:
            groups.append(_append_group(rng, shape, runs[-1]))
    return checks.run(context, groups)


def _runs(rng: np.random.Generator, shape: Shape, bits: tuple[int, ...]) -> list[np.ndarray]:
    """Words and scales of keys and values, first and rows; scales are NaN where no row is.

    The last run of the pool's first sequence ends where the pool does; some runs are empty.
    """
    _, head_dim, _, length = shape
    counts = np.array([length, 0, 1, length // 2 + 1, 0], np.int32)
    rows = np.stack([np.roll(counts, -run) for run in reversed(range(len(bits)))], axis=1)
    most = [-(-length // per_word(width)) for width in bits]
    total, lanes = sum(most) + 3, per_word(min(bits))
    first = np.array([total - sum(most[run:]) for run in range(len(bits))], np.int32)
    there = np.zeros((len(counts), total * lanes), bool)
    for b, run in np.ndindex(rows.shape):
        row, each = np.arange(int(rows[b, run])), per_word(bits[run])
        there[b, (first[run] + row // each) * lanes + row % each] = True

    def half(low: float, high: float) -> np.ndarray:
        x = rng.uniform(low, high, (len(counts), KV_HEADS, 1, total * lanes))
        x = np.where(there[:, None, None], x, np.nan).astype(jnp.bfloat16)
        return x.view(np.uint16).astype(np.uint32)

    size = len(counts), KV_HEADS, total, head_dim
    words = [rng.integers(0, 2**32, size, np.uint32) for _ in range(2)]
    affine = [half(0.05, 0.3) | half(-1.0, 0.5) << 16 for _ in range(2)]
    return [*words, *affine, np.broadcast_to(first, rows.shape).copy(), rows]


def _variants(
    kernel: Callable[..., Any], shape: Shape, bits: tuple[int, ...], every: bool, **static: Any
) -> dict[str, Callable[..., Any]]:
    dtype, head_dim, _, rows = shape
    ways = [(config, 3) for config in configs(packed_config, dtype, tiles.padded(head_dim), every)]
    return {
        f"splits {splits}, {named(config)}": functools.partial(
            kernel,
            bits=bits,
            key_group=None,
            scale=head_dim**-0.5,
            mean_words=max(1, rows // per_word(min(bits))),
            config=config,
            splits=splits,
            **static,
        )
        for config, splits in [*ways, (None, 1)]
    }


def _words(shape: Shape, bits: tuple[int, ...]) -> str:
    return f"{label(shape)}, runs of {' and '.join(map(str, bits))} bits"


def _attend_group(
    rng: np.random.Generator, shape: Shape, bits: tuple[int, ...], every: bool
) -> Group:
    dtype, head_dim, group, _ = shape
    pool, tail = cache(rng, shape)
    q = 2 * host(rng, dtype, len(tail[-1]), KV_HEADS * group, head_dim)
    inputs = (q, *pool, *_runs(rng, shape, bits), *tail)
    variants = _variants(op.triton.quantized_decode_attention, shape, bits, every)

    def judge(results: list[np.ndarray], expected: np.ndarray) -> Errors:
        error = checks.relative_error(results[0], expected)
        return {"out": (error + checks.not_finite(results[0]), BOUNDS[dtype])}

    def expected() -> np.ndarray:
        arrays: Any = inputs
        return reference.quantized_decode_attention(*arrays, bits=bits, scale=head_dim**-0.5)

    words = _words(shape, bits)
    return Group("quantized_decode_attention", words, inputs, variants, expected, judge)


def _append_group(rng: np.random.Generator, shape: Shape, bits: tuple[int, ...]) -> Group:
    dtype, head_dim, group, _ = shape
    pool, tail = cache(rng, shape)
    runs, batch = _runs(rng, shape, bits), len(tail[-1])
    qkv = host(rng, dtype, batch, KV_HEADS, group + 2, head_dim)
    angle = 6 * rng.random((batch, head_dim // 2), np.float32)
    inputs = (qkv, np.cos(angle), np.sin(angle), *pool, *runs, *tail)
    variants = _variants(op.triton.append_and_attend, shape, bits, False, transform=True)

    def expected() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        turned = rotated(qkv, *inputs[1:3]).astype(np.float32)
        turned = turned @ hadamard.signs(head_dim).astype(np.float32) * hadamard.factor(head_dim)
        q, *new = appended(qkv, turned.astype(qkv.dtype), tail)
        arrays: Any = (q, *pool, *runs, *new, tail[-1] + 1)
        out = reference.quantized_decode_attention(*arrays, bits=bits, scale=head_dim**-0.5)
        return out, new[0], new[1]

    words, judge = _words(shape, bits), judge_appended(dtype, tail[-1])
    return Group("quantized_append_and_attend", words, inputs, variants, expected, judge)
