"""Decode attention over packed rows, against the float64 version that reads them one by one."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantized_decode_attention as op
from pallas_kernels.hadamard import transform
from pallas_kernels.packing import join_affine, split_affine
from pallas_kernels.quantized_decode_attention import reference, triton, xla
from pallas_kernels.ragged_decode_attention.xla import append
from pallas_kernels.rope import rotate
from tests.kernels.cases import compiled

BATCH, KV_HEADS, WORDS, ROWS, TAIL = 2, 2, 24, 40, 8
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
DTYPES = {"xla": "float32", "triton": "float16"}
"""Of each backend: the most exact one that it has."""
CASES = {
    # dtype if not the backend's, bits, group of query heads, head dim, groups of a row, splits
    "two widths": (None, (4, 2), 2, 32, 1, 3),
    "bfloat16": ("bfloat16", (2,), 4, 128, 1, 1),
    "2 bit, odd group": (None, (2,), 7, 80, 1, 3),
    "8 bit, small head": (None, (8,), 1, 16, 1, 1),
    "4 bit, two groups": (None, (4,), 4, 128, 2, 3),
}


def arrays(dtype, bits, group, head_dim, groups, *, seed=0, key_group=None):
    """Random arguments: unequal rows, an empty run, no dense rows in the second sequence.

    Everything that must not be read is NaN, or random words with NaN for their scales.
    """
    rng = np.random.default_rng(seed)
    lanes, first_of_all = 32 // min(bits), (BATCH, KV_HEADS)
    rows = np.array([[37, 101], [0, 48]])[:, : len(bits)]
    first = np.array([[1, 9], [3, 12]])[:, : len(bits)]
    if key_group:
        first[:] = [[2], [4]]
    words = rng.integers(0, 2**32, (2, *first_of_all, WORDS, head_dim), dtype=np.uint32)

    def affine(shape):
        scale = rng.uniform(0.05, 0.3, shape).astype(np.float32)
        return scale, (rng.normal(size=shape) * 0.5).astype(np.float32)

    spoiled = np.ones((BATCH, WORDS, lanes), bool)
    for b in range(BATCH):
        for run, width in enumerate(bits):
            for row in range(rows[b, run]):
                word, lane = divmod(row, 32 // width)
                spoiled[b, first[b, run] + word, lane] = False
    spoiled = spoiled.reshape(BATCH, 1, 1, -1)
    by_token = (*first_of_all, groups, WORDS * lanes)
    scales = [affine(by_token) for _ in range(2)]
    scales = [[np.where(spoiled, np.nan, part) for part in one] for one in scales]
    if key_group:
        scales[0] = list(affine((*first_of_all, WORDS * lanes // key_group, head_dim)))
    affine_k, affine_v = (join_affine(*map(jnp.asarray, one)) for one in scales)

    def partly(count, used):
        x = rng.normal(size=(*first_of_all, count, head_dim))
        for b, own in enumerate(used):
            x[b, :, [i for i in range(count) if i not in own]] = np.nan
        return jnp.asarray(x, dtype)

    dense, tail = (range(3, 20), range(0)), (range(5), range(0))
    return {
        "q": jnp.asarray(rng.normal(size=(BATCH, KV_HEADS * group, head_dim)), dtype),
        "dense_k": partly(ROWS, dense),
        "dense_v": partly(ROWS, dense),
        "offset": jnp.array([3, 0], jnp.int32),
        "length": jnp.array([17, 0], jnp.int32),
        "words_k": jnp.asarray(words[0]),
        "words_v": jnp.asarray(words[1]),
        "affine_k": affine_k,
        "affine_v": affine_v,
        "first": jnp.asarray(first, jnp.int32),
        "rows": jnp.asarray(rows, jnp.int32),
        "tail_k": partly(TAIL, tail),
        "tail_v": partly(TAIL, tail),
        "fill": jnp.array([5, 0], jnp.int32),
    }


def error(found, expected):
    """The largest error, as a share of the largest value; NaN if there is one."""
    found = np.asarray(found).astype(np.float64)
    return np.max(np.abs(found - expected)) / np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", DTYPES)
def test_attention_is_that_of_the_rows_spelled_out(name, backend):
    dtype, bits, group, head_dim, groups, splits = CASES[name]
    dtype = dtype or DTYPES[backend]
    given = arrays(dtype, bits, group, head_dim, groups)
    scale = head_dim**-0.5
    expected = reference.quantized_decode_attention(*given.values(), bits=bits, scale=scale)
    static = {"bits": bits, "key_group": None, "scale": scale, "mean_words": WORDS}
    if backend == "xla":
        run = compiled(lambda *a: xla.quantized_decode_attention(*a, **static))
    else:
        run = compiled(lambda *a: triton.quantized_decode_attention(*a, **static, splits=splits))
    found = run(*given.values())
    assert found.dtype == dtype
    assert error(found, expected) < BOUNDS[dtype]
    assert np.array_equal(np.asarray(run(*given.values())), np.asarray(found))


@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize(("head_dim", "turned"), [(64, True), (64, False), (80, True)])
def test_a_new_token_is_turned_appended_and_attended(backend, turned, head_dim):
    group, bits, dtype = 2, (4,), DTYPES[backend]
    given = arrays(dtype, bits, group, head_dim, 1, seed=1)
    rng = np.random.default_rng(2)
    qkv = rng.normal(size=(BATCH, KV_HEADS, group + 2, head_dim)).astype(dtype)
    angle = rng.uniform(0, 6, (BATCH, head_dim // 2)).astype(np.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    q, *rest = given.values()
    out, tail_k, tail_v = compiled(
        lambda *a: op.append_and_attend(*a, bits=bits, transform=turned, backend=backend)
    )(jnp.asarray(qkv), cos, sin, *rest)
    rows = rotate(jnp.asarray(qkv[:, :, : group + 1]), cos[:, None, None], sin[:, None, None])
    rows = transform(rows) if turned else rows
    fill = given["fill"]
    new_k = append(given["tail_k"], rows[:, :, group:], fill)
    new_v = append(given["tail_v"], jnp.asarray(qkv[:, :, group + 1 :]), fill)
    for found, expected in ((tail_k, new_k), (tail_v, new_v)):
        np.testing.assert_allclose(found, expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    changed = {"q": rows[:, :, :group].reshape(q.shape), "tail_k": new_k, "tail_v": new_v}
    expected = reference.quantized_decode_attention(
        *{**given, **changed, "fill": fill + 1}.values(), bits=bits, scale=head_dim**-0.5
    )
    assert error(out, expected) < BOUNDS[dtype]


@pytest.mark.parametrize(("bits", "key_group"), [((4, 2), None), ((2,), 32)])
def test_runs_of_several_blocks(bits, key_group, monkeypatch):
    monkeypatch.setattr(xla, "ROW_BLOCK", 32)
    given = arrays("float32", bits, 3, 64, 1, seed=3, key_group=key_group)
    static = {"bits": bits, "key_group": key_group, "scale": 0.125}
    expected = reference.quantized_decode_attention(*given.values(), **static)
    run = compiled(lambda *a: xla.quantized_decode_attention(*a, **static, mean_words=WORDS))
    assert error(run(*given.values()), expected) < BOUNDS["float32"]


def test_keys_by_channel_are_for_xla():
    given = arrays("float32", (2,), 2, 64, 1, key_group=32)
    expected = reference.quantized_decode_attention(
        *given.values(), bits=(2,), key_group=32, scale=0.125
    )
    found = op.quantized_decode_attention(*given.values(), bits=(2,), key_group=32)
    assert error(found, expected) < BOUNDS["float32"]
    with pytest.raises(NotImplementedError):
        op.quantized_decode_attention(*given.values(), bits=(2,), key_group=32, backend="triton")


@pytest.mark.parametrize(("dtype", "groups"), [("float32", 1), ("bfloat16", 2)])
def test_float32_and_small_groups_are_for_xla(dtype, groups):
    given = arrays(dtype, (2,), 2, 64, groups)
    with pytest.raises(NotImplementedError, match=r"float32|2 groups"):
        op.quantized_decode_attention(*given.values(), bits=(2,), backend="triton")


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_queries_and_values_of_any_size(size):
    """Codes meet float16: nothing that is small or large may leave its range."""
    given = arrays("bfloat16", (2,), 1, 16, 1)
    parts = [split_affine(given[name]) for name in ("affine_k", "affine_v")]
    sizes = 1 / size, size
    keys, values = (join_affine(*(x * y for x in one)) for one, y in zip(parts, sizes, strict=True))
    none = {name: jnp.zeros_like(given[name]) for name in ("length", "fill")}
    given |= {"q": given["q"] * size, "affine_k": keys, "affine_v": values, **none}
    expected = reference.quantized_decode_attention(*given.values(), bits=(2,), scale=0.25)
    run = compiled(
        lambda *a: op.quantized_decode_attention(*a, bits=(2,), scale=0.25, backend="triton")
    )
    found = run(*given.values())
    assert error(found, expected) < BOUNDS["bfloat16"]


def test_nothing_to_attend_to_is_zero():
    for backend in ("xla", "triton"):
        given = arrays(DTYPES[backend], (2,), 2, 64, 1)
        none = {name: jnp.zeros_like(given[name]) for name in ("length", "rows", "fill")}
        run = functools.partial(op.quantized_decode_attention, bits=(2,), backend=backend)
        assert not np.asarray(compiled(run)(*{**given, **none}.values())).any()


@pytest.mark.parametrize(
    ("changed", "bits", "message"),
    [
        ({}, (3,), "bits"),
        ({}, (), "bits"),
        ({"words_k": jnp.zeros((2, 2, 3, 64), jnp.uint32)}, (2,), "words_k"),
        ({"words_k": jnp.zeros((2, 2, WORDS, 64)), "words_v": jnp.zeros((2, 2, WORDS, 64))}, (2,),
         "uint32"),
        ({"rows": jnp.zeros((2, 2), jnp.int32)}, (2,), "first and rows"),
        ({"affine_v": jnp.zeros((2, 2, 3, 4), jnp.uint32)}, (2,), "affine"),
        ({"fill": jnp.zeros((3,), jnp.int32)}, (2,), "fill"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(changed, bits, message):
    given = arrays("float32", (2,), 2, 64, 1)
    with pytest.raises(ValueError, match=message):
        op.quantized_decode_attention(*{**given, **changed}.values(), bits=bits)
