"""Long prompts, and pools of more than 2^31 elements.

A 32-bit index fails first here. The references run on the device itself: the plain XLA version on
inputs made float32, or dense rows of it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import device, measure
from benchmarks.gpu_suite import checks
from benchmarks.gpu_suite.checks import BOUNDS, Errors, Group
from benchmarks.gpu_suite.stages import Context
from pallas_kernels import prefill_attention as prefill_op
from pallas_kernels import ragged_decode_attention as decode_op
from pallas_kernels import window_scores as scores_op
from pallas_kernels.rows import NewToken, Segment, Tail

DTYPE, HEAD_DIM = "bfloat16", 128
SCALE = HEAD_DIM**-0.5
NEEDED_BYTES = 24 * 10**9
"""Device memory from which on the large pools are tried: two of 4.3 GB, and what makes them."""


def long(context: Context) -> dict[str, Any]:
    """The stage."""
    lengths = (64,) if context.dry else (32768, 131072)
    makers: list[functools.partial[Group]] = []
    for length in lengths:
        makers.append(functools.partial(_decode_group, context, length))
        makers.append(functools.partial(_prefill_group, context, length))
        makers.append(functools.partial(_scores_group, context, length, min(50, length)))
    makers.append(functools.partial(_scores_group, context, lengths[0], lengths[0]))
    result: dict[str, Any] = {"rows": []}
    limit = device.memory_limit()
    for kv_heads in (8,) if context.dry else (1, 8):
        if limit is None or limit >= NEEDED_BYTES:
            makers.insert(1, functools.partial(_large_pool_group, context, kv_heads))
        else:
            why = f"not available: {limit / 1e9:.0f} GB of memory are less than the 24 GB it needs"
            case = f"pool beyond 2^31 elements, {kv_heads} kv heads"
            result["rows"].append(
                {"kernel": "append_and_attend", "case": case, "ok": None, "note": why}
            )
    for make in makers:  # one at a time: each has the memory to itself
        try:
            result = checks.run(context, [make()], result["rows"])
        except Exception as error:  # inputs that could not be made, say
            row = {"kernel": make.func.__name__, "case": str(make.args[1:]), "ok": False}
            why = f"{type(error).__name__}: {error}"[:2000]
            result = checks.summary([*result["rows"], {**row, "exception": why}])
    return result


def _random(context: Context, *shape: int) -> jax.Array:
    return measure.normal(context.key(), shape, DTYPE)


def _wide(*arrays: Any) -> Any:
    """The same numbers in float32."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, arrays
    )


@functools.partial(jax.jit, static_argnames="axis")
def _poisoned(x: jax.Array, begin: jax.Array, end: jax.Array, axis: int) -> jax.Array:
    """NaN outside of the rows begin..end [B] along an axis."""
    at = jnp.arange(x.shape[axis])
    there = (at >= begin[:, None]) & (at < end[:, None])
    shape = [x.shape[0], *[1] * (x.ndim - 1)]
    shape[axis] = x.shape[axis]
    return jnp.where(there.reshape(shape), x, jnp.nan)


def _close(results: list[np.ndarray], expected: np.ndarray) -> Errors:
    error = checks.relative_error(results[0], expected)
    return {"out": (error + checks.not_finite(results[0]), BOUNDS[DTYPE])}


def _prefill_group(context: Context, length: int) -> Group:
    true = jnp.array([length - 5], jnp.int32)
    q = _random(context, 1, length, 2, HEAD_DIM)
    k, v = (
        _poisoned(_random(context, 1, length, 1, HEAD_DIM), jnp.zeros_like(true), true, axis=1)
        for _ in range(2)
    )
    rng = np.random.default_rng(context.seed)
    edge = min(64, (length - 5) // 2)
    some = rng.choice(length - 5, min(256, length // 2), replace=False)
    rows = np.unique([*range(edge), *some, *range(length - 5 - edge, length - 5)])

    @jax.jit
    def dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Some rows of the attention, [rows, N, H]."""
        there = (jnp.arange(length) < true)[:, None]
        q, k, v = _wide(
            q[0, rows], jnp.where(there, k[0, :, 0], 0), jnp.where(there, v[0, :, 0], 0)
        )
        logits = SCALE * jnp.einsum("rnh,th->nrt", q, k, precision="highest")
        logits = jnp.where(jnp.arange(length) <= rows[:, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1)
        return jnp.einsum("nrt,th->rnh", weights, v, precision="highest")

    def judge(results: list[np.ndarray], expected: np.ndarray) -> Errors:
        error = checks.relative_error(results[0][0, rows], expected)
        return {"out": (error + checks.not_finite(results[0]), BOUNDS[DTYPE])}

    variants = {
        backend: functools.partial(
            prefill_op.prefill_attention, scale=SCALE, backend=backend, causal=True
        )
        for backend in ("triton", "cudnn")
    }
    words = f"{DTYPE}, 2/1 heads of {HEAD_DIM}, length {length}, causal, {len(rows)} rows compared"
    inputs = (q, k, v, true)

    def expected() -> np.ndarray:
        return np.asarray(dense(q, k, v))

    return Group("prefill_attention", words, inputs, variants, expected, judge)


def _decode_group(context: Context, length: int) -> Group:
    offset = jnp.array([512, 0], jnp.int32)
    true = jnp.array([length, length - length // 3], jnp.int32)
    pool = [
        _poisoned(_random(context, 2, 2, length + 512, HEAD_DIM), offset, offset + true, axis=2)
        for _ in range(2)
    ]
    new, tail = _new_token(context, 2, 2, jnp.array([31, 7], jnp.int32))
    words = f"{DTYPE}, 8/2 heads of {HEAD_DIM}, length {length}"
    pool = Segment(*pool, offset=offset, length=true)
    return _pool_group(words, (new, pool, tail), pool, length)


def _new_token(
    context: Context, batch: int, kv_heads: int, fill: jax.Array
) -> tuple[NewToken, Tail]:
    """A token of 4 query heads for each kv head, which RoPE does not turn, and a tail."""
    qkv = _random(context, batch, kv_heads, 6, HEAD_DIM)
    still = jnp.zeros((batch, HEAD_DIM // 2))
    tail = [_random(context, batch, kv_heads, 32, HEAD_DIM) for _ in range(2)]
    return NewToken(qkv, still + 1, still), Tail(*tail, fill=fill)


def _large_pool_group(context: Context, kv_heads: int) -> Group:
    """The last layer of a pool of 2^31 + 2^20 elements; all other layers are NaN."""
    capacity = (512 if context.dry else 2**24 + 2**13) // kv_heads
    length = 50 if context.dry else 3000
    offset = jnp.array([capacity - length], jnp.int32)
    true = jnp.array([length], jnp.int32)

    @jax.jit
    def place(rows: jax.Array) -> jax.Array:
        pool = jnp.full((1, kv_heads, capacity, HEAD_DIM), jnp.nan, DTYPE)
        return lax.dynamic_update_slice_in_dim(pool, rows, capacity - length, axis=2)

    rows = [_random(context, 1, kv_heads, length, HEAD_DIM) for _ in range(2)]
    new, tail = _new_token(context, 1, kv_heads, jnp.array([9], jnp.int32))
    pool = Segment(*(place(x) for x in rows), offset=offset, length=true)
    sliced = Segment(*rows, offset=jnp.zeros_like(offset), length=true)
    elements = kv_heads * capacity * HEAD_DIM
    words = f"{DTYPE}, {4 * kv_heads}/{kv_heads} heads of {HEAD_DIM}, pool of {elements} elements"
    return _pool_group(words, (new, pool, tail), sliced, length)


def _pool_group(
    words: str, inputs: tuple[NewToken, Segment, Tail], sliced: Segment, most_rows: int
) -> Group:
    """Decode attention; `sliced` is a pool with the same rows for the reference."""
    settings = {"scale": SCALE, "most_rows": most_rows}
    variants = {
        f"splits {splits or 'default'}": functools.partial(
            decode_op.triton.append_and_attend, **settings, splits=splits
        )
        for splits in (None, 4, 1)
    }
    new, _, tail = inputs
    reference = functools.partial(decode_op.xla.append_and_attend, **settings, together=False)

    def expected() -> np.ndarray:
        out, _ = jax.jit(lambda *arrays: reference(*_wide(*arrays)))(new, sliced, tail)
        return np.asarray(out)

    return Group("append_and_attend", words, inputs, variants, expected, _close)


def _scores_group(context: Context, length: int, window: int) -> Group:
    true = jnp.array([length - 3], jnp.int32)
    start = true - jnp.int32(min(window, length - 3))
    q = _random(context, 1, window, 2, HEAD_DIM)
    zero = jnp.zeros_like(true)
    k = _poisoned(_random(context, 1, length, 1, HEAD_DIM), zero, true, axis=1)
    q = _poisoned(q, zero, true - start, axis=1)
    variants = {
        "default": functools.partial(scores_op.triton.window_scores, threshold=0.01, scale=SCALE)
    }

    def expected() -> list[np.ndarray]:
        reference = functools.partial(
            scores_op.window_scores, threshold=0.01, scale=SCALE, backend="xla"
        )
        found = jax.jit(lambda *arrays: reference(*_wide(*arrays)))(q, k, start, true)
        return [np.asarray(x) for x in found]

    def judge(results: list[np.ndarray], expected: list[np.ndarray]) -> Errors:
        missed = np.abs(results[1].astype(np.int64) - expected[1]).max()
        return {
            "scores": (checks.relative_error(results[0], expected[0]), 1e-3),
            "counts": (float(missed) / float(expected[2].max()), 1e-3),
        }

    words = f"{DTYPE}, 2/1 heads of {HEAD_DIM}, length {length}, window {window}"
    return Group("window_scores", words, (q, k, start, true), variants, expected, judge)
