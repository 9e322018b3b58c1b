"""Every kernel against its dense reference, in all its configurations, on fresh random inputs.

What a kernel must not read is NaN; what it must write is NaN before (see `checks`). Lengths up to
some thousands; longer ones are in long.py, and the kernels on a cache in correctness_cache.py.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.gpu_suite import checks
from benchmarks.gpu_suite.checks import BOUNDS, DTYPES, Errors, Group, host
from benchmarks.gpu_suite.stages import Context
from pallas_kernels import add_rms_norm as norm_op
from pallas_kernels import prefill_attention as prefill_op
from pallas_kernels import sample_tokens as sample_op
from pallas_kernels.add_rms_norm import reference as norm_reference
from pallas_kernels.backends import current_device
from pallas_kernels.prefill_attention import reference as prefill_reference
from pallas_kernels.sample_tokens import reference as sample_reference
from pallas_kernels.tuning import candidates

KV_HEADS, GROUP = 2, 4

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


def odd(shape: Shape) -> bool:
    """Whether a shape is of the smaller set, for what needs no more."""
    return shape[1] == 80 or shape[2] != GROUP


def label(shape: Shape) -> str:
    """A shape in words."""
    dtype, head_dim, group, length = shape
    return f"{dtype}, {KV_HEADS * group}/{KV_HEADS} heads of {head_dim}, length {length}"


def configs(operation: str, dtype: str, size: int, every: bool) -> list[Any]:
    """The configurations to run: all of them, or that of the device (None)."""
    if not every:
        return [None]
    capability = current_device().capability or 90
    return checks.variants_of(candidates(operation, capability, dtype, size))


def named(config: Any) -> str:
    """A configuration in words."""
    return "default" if config is None else checks.short(config)


# Prefill.


def prefill(context: Context) -> dict[str, Any]:
    """The stage of the prefill attention, Triton and cuDNN."""
    rng = np.random.default_rng(context.seed)
    groups = [_prefill_group(rng, *shape, causal=True) for shape in shapes(context)]
    for shape, every in shapes(context):
        if odd(shape) and not every:
            groups.append(_prefill_group(rng, shape, every, causal=False))
    return checks.run(context, groups)


def _prefill_group(rng: np.random.Generator, shape: Shape, every: bool, *, causal: bool) -> Group:
    dtype, head_dim, group, length = shape
    scale = head_dim**-0.5
    lengths = np.array([length, length // 2 + 1, min(17, length), 1], np.int32)
    lengths = lengths[: 2 if length > 1000 else 4]
    batch, heads = len(lengths), KV_HEADS * group
    q = 2 * host(rng, dtype, batch, length, heads, head_dim)
    k, v = (host(rng, dtype, batch, length, KV_HEADS, head_dim) for _ in range(2))
    there = np.arange(length) < lengths[:, None]  # [B, T]
    k[~there] = v[~there] = np.nan
    variants: dict[str, Callable[..., Any]] = {
        f"triton, {named(config)}": functools.partial(
            prefill_op.triton.prefill_attention, causal=causal, scale=scale, config=config
        )
        for config in configs("prefill_attention", dtype, head_dim, every)
    }
    for backend in ("triton", "cudnn"):
        if (backend == "triton" and not every) or (backend == "cudnn" and dtype == "float32"):
            continue
        variants[backend] = functools.partial(
            prefill_op.prefill_attention, causal=causal, scale=scale, backend=backend
        )

    def judge(results: list[np.ndarray], expected: np.ndarray) -> Errors:
        error = checks.relative_error(results[0][there], expected[there])
        return {"out": (error + checks.not_finite(results[0]), BOUNDS[dtype])}

    def expected() -> np.ndarray:
        arrays = (*(x.astype(np.float32) for x in (q, k, v)), lengths)
        return np.asarray(_dense_prefill(*arrays, causal=causal, scale=scale))

    words = f"{label(shape)}, {'causal' if causal else 'bidirectional'}"
    return Group("prefill_attention", words, (q, k, v, lengths), variants, expected, judge)


_dense_prefill = jax.jit(prefill_reference.prefill_attention, static_argnames=("causal", "scale"))


# The norm.


def norm(context: Context) -> dict[str, Any]:
    """The stage of the addition and norm."""
    rng = np.random.default_rng(context.seed)
    widths = (80,) if context.dry else (4096, 7168)
    dtypes = DTYPES[:1] if context.dry else DTYPES
    return checks.run(context, [_norm_group(rng, d, width) for width in widths for d in dtypes])


def _norm_group(rng: np.random.Generator, dtype: str, width: int) -> Group:
    x, delta = (host(rng, dtype, 2, 5, width) for _ in range(2))
    weight = 1 + host(rng, dtype, width)
    variants = {
        named(config): functools.partial(norm_op.triton.add_rms_norm, eps=1e-5, config=config)
        for config in configs("add_rms_norm", dtype, width, True)
    }

    def judge(results: list[np.ndarray], expected: tuple[np.ndarray, ...]) -> Errors:
        errors = map(checks.relative_error, results, expected)
        return {
            name: (error, BOUNDS[dtype])
            for name, error in zip(("sum", "norm"), errors, strict=True)
        }

    def expected() -> tuple[np.ndarray, ...]:
        return norm_reference.add_rms_norm(x, delta, weight, eps=1e-5)

    words = f"{dtype}, width {width}"
    return Group("add_rms_norm", words, (x, delta, weight), variants, expected, judge)


# The draw.


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
    variants: dict[str, Callable[..., Any]] = {
        named(config): functools.partial(sample_op.triton.sample_tokens, config=config)
        for config in configs("sample_tokens", "float32", vocabulary, True)
    }
    variants["xla"] = functools.partial(sample_op.sample_tokens, backend="xla")

    def judge(results: list[np.ndarray], near: np.ndarray) -> Errors:
        return {"wrong tokens": (float((results[0] != near).all(0).sum()), 0.0)}

    words = f"vocabulary {vocabulary}"
    expected = functools.partial(sample_reference.near, *inputs)
    return Group("sample_tokens", words, inputs, variants, expected, judge)
