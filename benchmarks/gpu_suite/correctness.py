"""The operations on prompts and rows against their dense references, on fresh random inputs.

What a kernel must not read is NaN; what it must write is NaN before (see `checks`). The kernels on
a cache, and long prompts, are in correctness_cache.py.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.gpu_suite import checks
from benchmarks.gpu_suite.checks import BOUNDS, Errors, Group, host, variants
from benchmarks.gpu_suite.stages import Context
from benchmarks.operations import kernel, prompt
from pallas_kernels import prefill_attention as prefill_op
from pallas_kernels import sample_tokens as sample_op
from pallas_kernels import window_scores as scores_op
from pallas_kernels.add_rms_norm import reference as norm_reference
from pallas_kernels.prefill_attention import reference as prefill_reference
from pallas_kernels.rows import LayerRows
from pallas_kernels.sample_tokens import reference as sample_reference
from pallas_kernels.window_scores import reference as scores_reference

DTYPES = ("bfloat16", "float16", "float32")
KV_HEADS, GROUP = 2, 4

FAR = 10_000
"""Rows from which on a dense reference would take too long: XLA's version in float32 stands for
it, and there are fewer sequences."""

Shape = tuple[str, int, int, int]
"""Type, head dim, query heads of a kv head, length."""


def shapes(context: Context) -> Iterator[tuple[Shape, bool]]:
    """The inputs' shapes, the most important first, and whether all configurations run on them."""
    if context.dry:
        yield ("bfloat16", 16, 2, 40), True
        yield ("float32", 24, 1, 17), False
        return
    for dtype in DTYPES:
        for head_dim in (128, 64):
            yield (dtype, head_dim, GROUP, 1000), True
    for dtype in DTYPES:
        yield (dtype, 80, GROUP, 1000), False
    for dtype, head_dim in (("bfloat16", 128), ("float32", 64), ("float16", 80)):
        for length in (4097, 17, 1):
            yield (dtype, head_dim, GROUP, length), False
    for dtype, head_dim in (("bfloat16", 64), ("float32", 128), ("float16", 128)):
        for group in (7, 1):
            yield (dtype, head_dim, group, 1000), False


def label(shape: Shape) -> str:
    """A shape in words."""
    dtype, head_dim, group, length = shape
    return f"{dtype}, {KV_HEADS * group}/{KV_HEADS} heads of {head_dim}, length {length}"


def prefill(context: Context) -> dict[str, Any]:
    """The stage of the prefill attention, Triton and cuDNN."""
    rng = np.random.default_rng(context.seed)
    groups = [prefill_group(rng, *shape) for shape in shapes(context)]
    groups += [
        prefill_group(rng, shape, every, causal=False)
        for shape, every in shapes(context)
        if not every and (shape[1] == 80 or shape[2] != GROUP)
    ]
    rows = (9,) if context.dry else (1, 50, 300)
    groups += [
        chunk_group(rng, shape, every, most)
        for most in rows
        for shape, every in shapes(context)
        if shape[3] > most and (context.dry or shape[1] == 128)
    ]
    return checks.run(context, groups)


def prefill_group(
    rng: np.random.Generator, shape: Shape, every: bool, *, causal: bool = True
) -> Group:
    """Prompts of several lengths, with NaN behind them."""
    dtype, head_dim, group, length = shape
    settings: dict[str, Any] = {"causal": causal, "scale": head_dim**-0.5}
    lengths = np.array([length, length // 2 + 1, min(17, length), 1], np.int32)
    lengths = lengths[: 2 if length > 1000 else 4]
    if length > FAR:
        lengths = lengths[:1] - 5
    heads = KV_HEADS * group, KV_HEADS
    q, k, v = prompt(functools.partial(host, rng), dtype, len(lengths), length, heads, head_dim)
    there = np.arange(length) < lengths[:, None]  # [B, T]
    k[~there] = v[~there] = np.nan
    inputs = 2 * q, k, v, lengths
    ways = variants(
        "prefill_attention", dtype, head_dim, every=every, prefix="triton, ", causal=causal
    )
    for backend in [*["triton"] * every, *["cudnn"] * (dtype != "float32")]:
        ways[backend] = functools.partial(prefill_op.prefill_attention, backend=backend, **settings)

    def judge(results: list[np.ndarray], expected: np.ndarray) -> Errors:
        error = checks.relative_error(results[0][there], expected[there])
        return {"out": (error + checks.not_finite(results[0]), BOUNDS[dtype])}

    def expected() -> np.ndarray:
        if length > FAR:
            return checks.in_float32(prefill_op.xla.prefill_attention, *inputs, **settings)[0]
        return np.asarray(_dense_prefill(*inputs, **settings))

    words = f"{label(shape)}, {'causal' if causal else 'bidirectional'}"
    return Group("prefill_attention", words, inputs, ways, expected, judge)


_dense_prefill = jax.jit(prefill_reference.prefill_attention, static_argnames=("causal", "scale"))
_dense_chunk = jax.jit(prefill_reference.chunk_attention, static_argnames="scale")


def windows(length: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Where so many rows begin in three prompts, and the prompts' lengths.

    They end where the prompt does, in it, and behind it.
    """
    start = np.array([length - rows, max(0, length // 2 - rows), 0], np.int32)
    return start, np.array([length, length // 2 + 1, max(1, rows - 3)], np.int32)


def second_of_three(k: np.ndarray, v: np.ndarray) -> LayerRows:
    """Keys and values [B, T, K, H] as the second layer of three, of which the others are NaN."""
    buffers = []
    for rows in (k, v):
        layer = rows.swapaxes(1, 2)
        nothing = np.full_like(layer, np.nan)
        buffers.append(np.concatenate([nothing, layer, nothing], axis=2))
    first: Any = np.array(k.shape[1], np.int32)
    return LayerRows(*buffers, first=first, rows=k.shape[1])


def chunk_group(rng: np.random.Generator, shape: Shape, every: bool, most: int) -> Group:
    """Chunks of prompts whose keys are in the prefill's buffer, with NaN around them."""
    dtype, head_dim, group, length = shape
    rows, scale = min(most, length), head_dim**-0.5
    start, lengths = windows(length, rows)
    q = host(rng, dtype, len(start), rows, KV_HEADS * group, head_dim)
    k, v = (host(rng, dtype, len(start), length, KV_HEADS, head_dim) for _ in range(2))
    beyond = np.arange(length) >= lengths[:, None]
    k[beyond] = v[beyond] = np.nan
    there = start[:, None] + np.arange(rows) < lengths[:, None]  # [B, rows]
    inputs = 2 * q, second_of_three(k, v), start, lengths

    def judge(results: list[np.ndarray], expected: np.ndarray) -> Errors:
        error = checks.relative_error(results[0][there], expected[there])
        return {"out": (error + checks.not_finite(results[0]), BOUNDS[dtype])}

    def expected() -> np.ndarray:
        return np.asarray(_dense_chunk(*inputs, scale=scale))

    ways = variants("prefill_attention", dtype, head_dim, every=every)
    return Group(
        "prefill_attention", f"{label(shape)}, chunk of {rows}", inputs, ways, expected, judge
    )


def scores(context: Context) -> dict[str, Any]:
    """The stage of the window scores."""
    rng = np.random.default_rng(context.seed)
    window = 9 if context.dry else 50
    groups = [scores_group(rng, *shape, window) for shape in shapes(context)]
    if not context.dry:  # all rows, as H2O wants them
        groups += [scores_group(rng, (dtype, 128, 2, 300), False, 300) for dtype in DTYPES]
    shape = "bfloat16", *((16, 2, 40) if context.dry else (128, GROUP, 1000))
    groups.append(scores_group(rng, shape, False, window, of_layer=True))
    return checks.run(context, groups)


def scores_group(
    rng: np.random.Generator, shape: Shape, every: bool, most: int, *, of_layer: bool = False
) -> Group:
    """Windows of prompts, with NaN beyond; `of_layer` has the keys in the prefill's buffer."""
    dtype, head_dim, group, length = shape
    settings: dict[str, Any] = {"threshold": 0.01, "scale": head_dim**-0.5}
    window = min(most, length)
    start, lengths = windows(length, window)
    if length > FAR:
        start, lengths = start[:1], lengths[:1] - 3
    q = host(rng, dtype, len(start), window, KV_HEADS * group, head_dim)
    k = host(rng, dtype, len(start), length, KV_HEADS, head_dim)
    for b in range(len(start)):
        k[b, lengths[b] :] = q[b, max(0, lengths[b] - start[b]) :] = np.nan
    plain = q, k, start, lengths
    inputs = q, second_of_three(k, k) if of_layer else k, start, lengths

    def judge(results: list[np.ndarray], expected: list[np.ndarray]) -> Errors:
        ours, zeroed, *maxima = results
        bound = 1e-3 if dtype != "float32" else BOUNDS[dtype]
        missed = np.abs(zeroed.astype(np.int64) - expected[1]).max() / max(1, expected[2].max())
        errors = {
            "scores": (checks.relative_error(ours, expected[0]), bound),
            "counts": (float(missed), 1e-3),
        }
        for found in maxima:
            errors["maxima"] = checks.relative_error(found, expected[3]), bound
        return errors

    def expected() -> list[np.ndarray]:
        if length > FAR:
            dense = functools.partial(scores_op.window_scores, maxima=True, backend="xla")
            return checks.in_float32(dense, *inputs, **settings)
        return list(scores_reference.window_scores(*plain, **settings))

    words = f"{label(shape)}, window {window}{', of a layer' if of_layer else ''}"
    ways = variants("window_scores", dtype, head_dim, every=every)
    ways["maxima"] = kernel("window_scores", head_dim, maxima=True)
    return Group("window_scores", words, inputs, ways, expected, judge)


def norm(context: Context) -> dict[str, Any]:
    """The stage of the addition and norm."""
    rng = np.random.default_rng(context.seed)
    widths = (80,) if context.dry else (4096, 7168)
    dtypes = DTYPES[:1] if context.dry else DTYPES
    return checks.run(context, [_norm_group(rng, d, width) for width in widths for d in dtypes])


def _norm_group(rng: np.random.Generator, dtype: str, width: int) -> Group:
    x, delta = (host(rng, dtype, 2, 5, width) for _ in range(2))
    inputs = x, delta, 1 + host(rng, dtype, width)

    def judge(results: list[np.ndarray], expected: tuple[np.ndarray, ...]) -> Errors:
        named = zip(("sum", "norm"), results, expected, strict=True)
        return {name: (checks.relative_error(*pair), BOUNDS[dtype]) for name, *pair in named}

    expected = functools.partial(norm_reference.add_rms_norm, *inputs, eps=1e-5)
    ways = variants("add_rms_norm", dtype, width)
    return Group("add_rms_norm", f"{dtype}, width {width}", inputs, ways, expected, judge)


def sample(context: Context) -> dict[str, Any]:
    """The stage of the draw of tokens: greedy and sampled rows in one batch."""
    rng = np.random.default_rng(context.seed)
    sizes = (70,) if context.dry else (4096, 32001, 151936)
    return checks.run(context, [_sample_group(rng, vocabulary) for vocabulary in sizes])


def _sample_group(rng: np.random.Generator, vocabulary: int) -> Group:
    logits = 3 * host(rng, "float32", 32, vocabulary)
    logits[::2] = logits[::2].round()  # ties
    logits[:, ::7] = -np.inf
    settings = (rng.choice(x, 32) for x in ([0.0, 0.5, 1.0], [0, 1, 50], [0.3, 0.9, 1.0]))
    temperature, top_k, top_p = settings
    uniform = rng.random(32, np.float32)
    inputs = (logits, np.float32(temperature), np.int32(top_k), np.float32(top_p), uniform)
    ways = variants("sample_tokens", "float32", vocabulary)
    ways["xla"] = functools.partial(sample_op.sample_tokens, backend="xla")

    def judge(results: list[np.ndarray], near: np.ndarray) -> Errors:
        return {"wrong tokens": (float((results[0] != near).all(0).sum()), 0.0)}

    expected = functools.partial(sample_reference.near, *inputs)
    return Group("sample_tokens", f"vocabulary {vocabulary}", inputs, ways, expected, judge)
