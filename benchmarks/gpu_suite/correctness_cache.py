"""Every kernel that reads a cache against its dense reference: see correctness.py."""

import functools
from collections.abc import Callable
from typing import Any

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
    shapes,
)
from benchmarks.gpu_suite.stages import Context
from pallas_kernels import ragged_decode_attention as decode_op
from pallas_kernels import window_scores as scores_op
from pallas_kernels.ragged_decode_attention import reference as decode_reference
from pallas_kernels.rows import NewToken, Segment, Tail
from pallas_kernels.window_scores import reference as scores_reference

THRESHOLD = 0.01
TAIL = 40


# Decode.


def decode(context: Context) -> dict[str, Any]:
    """The stage of the decode attention, with the new token, and of its merge."""
    rng = np.random.default_rng(context.seed)
    groups = [_decode_group(rng, *shape) for shape in shapes(context)]
    parts = (3,) if context.dry else (2, 5, 34)
    groups += [_merge_group(rng, dtype, count) for dtype in DTYPES[:2] for count in parts]
    return checks.run(context, groups)


def layer(rng: np.random.Generator, shape: Shape) -> tuple[NewToken, Segment, Tail]:
    """A new token, a layer's rows and its tail, NaN where nothing stands.

    The end of the pool, an empty layer, all of the pool, one token, nothing at all; the last tail
    has no room left.
    """
    dtype, head_dim, group, rows = shape
    offset: Any = np.array([rows // 3, rows // 2, 0, rows // 2, 0, 0], np.int32)
    length: Any = np.array([rows - rows // 3, 0, rows, 1, 0, 1], np.int32)
    fill: Any = np.array([TAIL - 1, 1, 0, TAIL // 2, 0, TAIL], np.int32)
    pool: Any = [host(rng, dtype, len(fill), KV_HEADS, rows, head_dim) for _ in range(2)]
    tail: Any = [host(rng, dtype, len(fill), KV_HEADS, TAIL, head_dim) for _ in range(2)]
    for b in range(len(fill)):
        for x in pool:
            x[b, :, : offset[b]] = x[b, :, offset[b] + length[b] :] = np.nan
        for x in tail:
            x[b, :, fill[b] :] = np.nan
    qkv: Any = host(rng, dtype, len(fill), KV_HEADS, group + 2, head_dim)
    angle: Any = 6 * rng.random((len(fill), head_dim // 2), np.float32)
    new = NewToken(qkv, np.cos(angle), np.sin(angle))
    return new, Segment(pool[0], pool[1], offset, length), Tail(tail[0], tail[1], fill)


def _decode_group(rng: np.random.Generator, shape: Shape, every: bool) -> Group:
    dtype, head_dim, _, rows = shape
    inputs = new, pool, tail = layer(rng, shape)
    ways: list[tuple[Any, int | None]]
    operation = "ragged_decode_attention"
    ways = [(config, 4) for config in configs(operation, dtype, head_dim, every)]
    ways[1:1] = [(None, None), (None, 1)] if every else [(None, 1)]
    scale = head_dim**-0.5
    variants = {
        f"splits {splits or 'default'}, {named(config)}": functools.partial(
            decode_op.triton.append_and_attend,
            scale=scale,
            most_rows=rows,
            config=config,
            splits=splits,
        )
        for config, splits in ways
    }

    def expected() -> tuple[np.ndarray, ...]:
        q, *rest = appended(new, rotated(new), tail)
        grown: Any = Tail(*rest, tail.fill + 1)
        return decode_reference.ragged_decode_attention(q, pool, grown, scale=scale), *rest

    judge = judge_appended(dtype, tail.fill)
    return Group("append_and_attend", label(shape), inputs, variants, expected, judge)


def rotated(new: NewToken) -> np.ndarray:
    """The queries and the key of a new token's product, after RoPE: [B, K, G + 1, H]."""
    qkv = np.asarray(new.qkv)
    first, second = np.split(qkv[..., :-1, :].astype(np.float32), 2, axis=-1)
    cos, sin = (np.asarray(x)[:, None, None] for x in (new.cos, new.sin))
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(qkv.dtype)


def appended(
    new: NewToken, turned: np.ndarray, tail: Tail
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The queries [B, N, H], and the tail's rows with the new token in it, where there is room.

    Args:
        new: the new token.
        turned: its queries and key as they meet the cache.
        tail: the tail without it.
    """
    tail_k, tail_v = (np.array(x) for x in (tail.k, tail.v))
    for b in np.flatnonzero(np.asarray(tail.fill) < TAIL):
        row = int(tail.fill[b])
        tail_k[b, :, row], tail_v[b, :, row] = turned[b, :, -1], new.qkv[b, :, -1]
    return turned[:, :, :-1].reshape(len(turned), -1, turned.shape[-1]), tail_k, tail_v


def judge_appended(dtype: str, fill: Any) -> Callable[[list[np.ndarray], Any], Errors]:
    """Compares the attention, and the rows of the tails; what was NaN behind them must still be.

    The attention of a token that found no room has no meaning, but is finite.
    """
    room = fill < TAIL

    def judge(results: list[np.ndarray], expected: tuple[np.ndarray, ...]) -> Errors:
        error = checks.relative_error(results[0][room], expected[0][room])
        errors = {"out": (error + checks.not_finite(results[0]), BOUNDS[dtype])}
        for name, ours, other in zip(("tail k", "tail v"), results[1:3], expected[1:], strict=True):
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
    variants = {
        named(config): functools.partial(
            scores_op.triton.window_scores, threshold=THRESHOLD, scale=scale, config=config
        )
        for config in configs("window_scores", dtype, head_dim, every)
    }

    def judge(results: list[np.ndarray], expected: tuple[np.ndarray, ...]) -> Errors:
        ours, zeroed = results
        bound = 1e-3 if dtype != "float32" else BOUNDS[dtype]
        missed = np.abs(zeroed - expected[1]).max() / max(1, expected[2].max())
        return {
            "scores": (checks.relative_error(ours, expected[0]), bound),
            "counts": (float(missed), 1e-3),
        }

    def expected() -> tuple[np.ndarray, ...]:
        return scores_reference.window_scores(
            q, k, start, lengths, threshold=THRESHOLD, scale=scale
        )

    words = f"{label(shape)}, window {window}"
    return Group("window_scores", words, (q, k, start, lengths), variants, expected, judge)
