"""The decode attention over packed rows against its dense reference: see correctness.py."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import checks
from benchmarks.gpu_suite.checks import Group
from benchmarks.gpu_suite.correctness import KV_HEADS, Shape, configs, label, named, shapes
from benchmarks.gpu_suite.correctness_cache import appended, judge_appended, layer, rotated
from benchmarks.gpu_suite.stages import Context
from pallas_kernels import hadamard
from pallas_kernels import quantized_decode_attention as op
from pallas_kernels.packing import per_word
from pallas_kernels.quantized_decode_attention import reference
from pallas_kernels.rows import PackedRows, Tail

RUNS = ((8,), (2,), (4, 2))
"""Widths of the runs: all of them where all configurations run, else the last ones; of a dry run
the first, whose kernel is the smallest."""


def packed(context: Context) -> dict[str, Any]:
    """The stage, with the new token."""
    rng = np.random.default_rng(context.seed)
    groups = []
    for shape, every in shapes(context):
        if shape[0] == "float32":  # is left to XLA
            continue
        runs = RUNS[:1] if context.dry else RUNS if every else RUNS[-1:]
        groups += [_group(rng, shape, bits, every) for bits in runs]
    return checks.run(context, groups)


def _runs(rng: np.random.Generator, shape: Shape, bits: tuple[int, ...]) -> PackedRows:
    """Packed rows whose scales are NaN where no row is.

    The last run of the pool's first sequence ends where the pool does; some runs are empty.
    """
    _, head_dim, _, length = shape
    counts = np.array([length, 0, 1, length // 2 + 1, 0, 1], np.int32)
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
    words: Any = [rng.integers(0, 2**32, size, np.uint32) for _ in range(2)]
    affine: Any = [half(0.05, 0.3) | half(-1.0, 0.5) << 16 for _ in range(2)]
    runs: Any = np.broadcast_to(first, rows.shape).copy(), rows
    return PackedRows(*words, *affine, *runs, bits=bits)


def _group(rng: np.random.Generator, shape: Shape, bits: tuple[int, ...], every: bool) -> Group:
    dtype, head_dim, _, rows = shape
    new, dense, tail = layer(rng, shape)
    runs, scale = _runs(rng, shape, bits), head_dim**-0.5
    operation = "quantized_decode_attention"
    ways = [(config, 3) for config in configs(operation, dtype, head_dim, every)]
    variants = {
        f"splits {splits or 'default'}, {named(config)}": functools.partial(
            op.triton.append_and_attend,
            transform=True,
            scale=scale,
            most_rows=rows,
            most_words=-(-rows // per_word(min(bits))),
            config=config,
            splits=splits,
        )
        for config, splits in [*ways, (None, None), (None, 1)]
    }

    def expected() -> tuple[np.ndarray, ...]:
        turned = rotated(new).astype(np.float32)
        turned = turned @ hadamard.signs(head_dim).astype(np.float32) * hadamard.factor(head_dim)
        q, *rest = appended(new, turned.astype(new.qkv.dtype), tail)
        grown: Any = Tail(*rest, tail.fill + 1)
        return reference.quantized_decode_attention(q, dense, runs, grown, scale=scale), *rest

    words = f"{label(shape)}, runs of {' and '.join(map(str, bits))} bits"
    inputs, judge = (new, dense, runs, tail), judge_appended(dtype, tail.fill)
    return Group("quantized_append_and_attend", words, inputs, variants, expected, judge)
