"""Every kernel that reads a cache against its dense reference: see correctness.py."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import checks
from benchmarks.gpu_suite.checks import BOUNDS, DTYPES, Errors, Group, host
from benchmarks.gpu_suite.correctness import (
    GROUP,
    KV_HEADS,
    Shape,
    configs,
    label,
    named,
    odd,
    shapes,
)
from benchmarks.gpu_suite.stages import Context
from pallas_kernels import ragged_decode_attention as decode_op
from pallas_kernels import tiles
from pallas_kernels import window_scores as scores_op
from pallas_kernels.ragged_decode_attention import config as decode_config
from pallas_kernels.ragged_decode_attention import reference as decode_reference
from pallas_kernels.window_scores import config as scores_config
from pallas_kernels.window_scores import reference as scores_reference

THRESHOLD = 0.01
TAIL = 40


# Decode.


def decode(context: Context) -> dict[str, Any]:
    """The stage of the decode attention, without and with a new token, and of its merge."""
    rng = np.random.default_rng(context.seed)
    groups = [_decode_group(rng, *shape) for shape in shapes(context)]
    for shape, every in shapes(context):
        if (odd(shape) and not context.dry) or (every and shape[0] == "bfloat16"):
            groups.append(_append_group(rng, shape, every))
    parts = (3,) if context.dry else (2, 5, 34)
    groups += [_merge_group(rng, dtype, count) for dtype in DTYPES[:2] for count in parts]
    return checks.run(context, groups)


def cache(rng: np.random.Generator, shape: Shape) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A pool and a tail, NaN where nothing stands: k, v, offset, length; k, v, fill.

    The end of the pool, an empty layer, all of the pool, one token, nothing at all.
    """
    dtype, head_dim, _, rows = shape
    offset = np.array([rows // 3, rows // 2, 0, rows // 2, 0], np.int32)
    length = np.array([rows - rows // 3, 0, rows, 1, 0], np.int32)
    fill = np.array([TAIL - 1, 1, 0, TAIL // 2, 0], np.int32)
    pool = [host(rng, dtype, len(fill), KV_HEADS, rows, head_dim) for _ in range(2)]
    tail = [host(rng, dtype, len(fill), KV_HEADS, TAIL, head_dim) for _ in range(2)]
    for b in range(len(fill)):
        for x in pool:
            x[b, :, : offset[b]] = x[b, :, offset[b] + length[b] :] = np.nan
        for x in tail:
            x[b, :, fill[b] :] = np.nan
    return [*pool, offset, length], [*tail, fill]


def _decode_variants(
    kernel: Callable[..., Any], shape: Shape, every: bool
) -> dict[str, Callable[..., Any]]:
    dtype, head_dim, _, rows = shape
    ways: list[tuple[Any, int | None]]
    ways = [(config, 4) for config in configs(decode_config, dtype, tiles.padded(head_dim), every)]
    ways[1:1] = [(None, None), (None, 1)] if every else [(None, 1)]
    return {
        f"splits {splits or 'default'}, {named(config)}": functools.partial(
            kernel,
            scale=head_dim**-0.5,
            mean_rows=max(1, rows // 2),
            config=config,
            splits=splits,
        )
        for config, splits in ways
    }


def _decode_group(rng: np.random.Generator, shape: Shape, every: bool) -> Group:
    dtype, head_dim, group, _ = shape
    pool, tail = cache(rng, shape)
    inputs = (2 * host(rng, dtype, len(tail[-1]), KV_HEADS * group, head_dim), *pool, *tail)
    variants = _decode_variants(decode_op.triton.ragged_decode_attention, shape, every)

    def judge(results: list[np.ndarray], expected: np.ndarray) -> Errors:
        error = checks.relative_error(results[0], expected)
        return {"out": (error + checks.not_finite(results[0]), BOUNDS[dtype])}

    def expected() -> np.ndarray:
        arrays: Any = inputs
        return decode_reference.ragged_decode_attention(*arrays, scale=head_dim**-0.5)

    words = label(shape)
    return Group("ragged_decode_attention", words, inputs, variants, expected, judge)


def _append_group(rng: np.random.Generator, shape: Shape, every: bool) -> Group:
    dtype, head_dim, group, _ = shape
    pool, tail = cache(rng, shape)
    batch, fill = len(tail[-1]), tail[-1]
    qkv = host(rng, dtype, batch, KV_HEADS, group + 2, head_dim)
    angle = 6 * rng.random((batch, head_dim // 2), np.float32)
    inputs = (qkv, np.cos(angle), np.sin(angle), *pool, *tail)
    variants = _decode_variants(decode_op.triton.append_and_attend, shape, every)

    def expected() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q, *new = appended(qkv, rotated(qkv, *inputs[1:3]), tail)
        arrays: Any = (q, *pool, *new, fill + 1)
        out = decode_reference.ragged_decode_attention(*arrays, scale=head_dim**-0.5)
        return out, new[0], new[1]

    judge = judge_appended(dtype, fill)
    return Group("append_and_attend", label(shape), inputs, variants, expected, judge)


def rotated(qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The queries and the key of a new token's product, after RoPE: [B, K, G + 1, H]."""
    first, second = np.split(qkv[..., :-1, :].astype(np.float32), 2, axis=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(qkv.dtype)


def appended(
    qkv: np.ndarray, turned: np.ndarray, tail: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The queries [B, N, H], and the tail with the new token in it.

    Args:
        qkv: the new token's product [B, K, G + 2, H].
        turned: its queries and key as they meet the cache.
        tail: k, v, fill.
    """
    tail_k, tail_v, fill = (x.copy() for x in tail)
    for b, row in enumerate(fill):
        tail_k[b, :, row], tail_v[b, :, row] = turned[b, :, -1], qkv[b, :, -1]
    return turned[:, :, :-1].reshape(len(fill), -1, qkv.shape[-1]), tail_k, tail_v


def judge_appended(dtype: str, fill: np.ndarray) -> Callable[[list[np.ndarray], Any], Errors]:
    """Compares the attention, and the rows of the tails; what was NaN behind them must still be."""

    def judge(results: list[np.ndarray], expected: tuple[np.ndarray, ...]) -> Errors:
        error = checks.relative_error(results[0], expected[0])
        errors = {"out": (error + checks.not_finite(results[0]), BOUNDS[dtype])}
        for name, ours, other in zip(("tail k", "tail v"), results[1:], expected[1:], strict=True):
            used = np.broadcast_to((np.arange(TAIL) <= fill[:, None])[:, None], ours.shape[:3])
            touched = 0.0 if np.isnan(ours[~used].astype(np.float32)).all() else 1.0
            error = checks.relative_error(ours[used], other[used])
            errors[name] = error + touched, BOUNDS[dtype]
        return errors

    return judge


def _merge_group(rng: np.random.Generator, dtype: str, parts: int) -> Group:
    shape = (3, KV_HEADS, parts, GROUP)
    maximum, total = 4 * host(rng, "float32", *shape), 1 + rng.random(shape, np.float32)
    mixed = host(rng, "float32", *shape, 128)
    maximum[0, :, 0], total[0, :, 0], mixed[0, :, 0] = -np.inf, 0, 0  # a part without a key
    maximum[1], total[1], mixed[1] = -np.inf, 0, 0  # nothing but such parts

    def expected() -> np.ndarray:
        highest = maximum.max(axis=2, keepdims=True)
        weights = np.exp2(maximum - np.where(highest == -np.inf, 0, highest)).astype(np.float64)
        sums = (weights * total).sum(axis=2)
        return (weights[..., None] * mixed).sum(axis=2) / np.where(sums == 0, 1, sums)[..., None]

    def judge(results: list[np.ndarray], expected: np.ndarray) -> Errors:
        ours = results[0].reshape(expected.shape)
        return {"out": (checks.relative_error(ours, expected), BOUNDS[dtype])}

    merge = functools.partial(decode_op.triton.merge, dtype=jnp.dtype(dtype))
    words = f"{dtype}, {parts} parts"
    inputs = (maximum, total, mixed)
    return Group("merge_splits", words, inputs, {"default": merge}, expected, judge)


# Scores.


def scores(context: Context) -> dict[str, Any]:
    """The stage of the window scores."""
    rng = np.random.default_rng(context.seed)
    window = 9 if context.dry else 50
    groups = [_scores_group(rng, *shape, window) for shape in shapes(context)]
    if not context.dry:  # all rows, as H2O wants them
        groups += [_scores_group(rng, (dtype, 128, 2, 300), False, 300) for dtype in DTYPES]
    return checks.run(context, groups)


def _scores_group(rng: np.random.Generator, shape: Shape, every: bool, most: int) -> Group:
    dtype, head_dim, group, length = shape
    scale, window, heads = head_dim**-0.5, min(most, length), KV_HEADS * group
    start = np.array([length - window, max(0, length // 2 - window), 0], np.int32)
    lengths = np.array([length, length // 2 + 1, max(1, window - 3)], np.int32)
    q = host(rng, dtype, 3, window, heads, head_dim)
    k = host(rng, dtype, 3, length, KV_HEADS, head_dim)
    for b in range(3):
        k[b, lengths[b] :] = q[b, max(0, lengths[b] - start[b]) :] = np.nan
    stats = _row_stats(q, k, start, lengths, scale)
    kernel = scores_op.triton.window_scores

    def variant(config: Any, given: bool) -> Callable[..., Any]:
        def call(*arrays: jax.Array) -> Any:
            arrays = arrays if given else arrays[:4]
            return kernel(*arrays, threshold=THRESHOLD, scale=scale, config=config)

        return call

    ways = [(c, False) for c in configs(scores_config, dtype, tiles.padded(head_dim), every)]
    if every or odd(shape):
        ways.insert(1, (None, True))
    variants = {
        f"statistics {'given' if given else 'computed'}, {named(config)}": variant(config, given)
        for config, given in ways
    }

    def judge(results: list[np.ndarray], expected: tuple[np.ndarray, ...]) -> Errors:
        ours, zeroed, visible = results
        bound = 1e-3 if dtype != "float32" else BOUNDS[dtype]
        missed = np.abs(zeroed - expected[1]).max() / max(1, expected[2].max())
        wrong = 0.0 if (visible == expected[2]).all() else 1.0
        return {
            "scores": (checks.relative_error(ours, expected[0]), bound),
            "counts": (float(missed) + wrong, 1e-3),
        }

    def expected() -> tuple[np.ndarray, ...]:
        return scores_reference.window_scores(
            q, k, start, lengths, threshold=THRESHOLD, scale=scale
        )

    words = f"{label(shape)}, window {window}"
    inputs = (q, k, start, lengths, *stats)
    return Group("window_scores", words, inputs, variants, expected, judge)


def _row_stats(
    q: np.ndarray, k: np.ndarray, start: np.ndarray, lengths: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Maximum and log-sum-exp of the window's rows [B, N, W]; NaN beyond the lengths."""
    (batch, window, heads, _), kv_heads = q.shape, k.shape[2]
    maximum, lse = (np.full((batch, heads, window), np.nan, np.float32) for _ in range(2))
    for b in range(batch):
        rows = np.arange(max(0, min(window, lengths[b] - start[b])))
        seen = np.arange(lengths[b]) <= (start[b] + rows)[:, None]
        for n in range(heads):
            keys = k[b, : lengths[b], n // (heads // kv_heads)].astype(np.float64)
            logits = scale * q[b, rows, n].astype(np.float64) @ keys.T
            logits = np.where(seen, logits, -np.inf)
            maximum[b, n, rows] = logits.max(axis=1)
            lse[b, n, rows] = np.logaddexp.reduce(logits, axis=1)
    return maximum, lse
