"""Decode attention over packed rows, against the float64 version that reads them one by one."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantized_decode_attention as op
from pallas_kernels.hadamard import transform
from pallas_kernels.packing import join_affine, split_affine
from pallas_kernels.quantized_decode_attention import reference, triton, xla
from pallas_kernels.rows import NewToken, PackedRows, Segment, Tail
from tests.kernels.cases import compiled, put, rotate, same_bits

BATCH, KV_HEADS, WORDS, ROWS, TAIL = 2, 2, 24, 40, 8
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
DTYPES = {"xla": "float32", "triton": "float16"}
"""Of each backend: the most exact one that it has."""
CASES = {
    # dtype if not the backend's, bits, group of query heads, head dim, groups of a row, splits
    "two widths": (None, (4, 2), 2, 80, 1, 3),
    "bfloat16": ("bfloat16", (2,), 8, 128, 1, 1),
    "2 bit, odd group": (None, (2,), 7, 128, 1, 3),
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

    def partly(count, used):
        x = rng.normal(size=(*first_of_all, count, head_dim))
        for b, own in enumerate(used):
            x[b, :, [i for i in range(count) if i not in own]] = np.nan
        return jnp.asarray(x, dtype)

    dense, tail = (range(3, 20), range(0)), (range(5), range(0))
    qkv: Any = rng.normal(size=(BATCH, KV_HEADS, group + 2, head_dim))
    angle: Any = rng.uniform(0, 6, (BATCH, head_dim // 2)).astype(np.float32)
    numbers = [jnp.array(x, jnp.int32) for x in ([3, 0], [17, 0], first, rows, [5, 0])]
    offset, length, first, rows, fill = numbers
    words_k, words_v = map(jnp.asarray, words)
    affine_k, affine_v = (join_affine(*map(jnp.asarray, one)) for one in scales)
    packed = words_k, words_v, affine_k, affine_v, first, rows
    return (
        NewToken(qkv.astype(jnp.dtype(dtype)), np.cos(angle), np.sin(angle)),
        Segment(partly(ROWS, dense), partly(ROWS, dense), offset, length),
        PackedRows(*packed, bits=bits, key_group=key_group),
        Tail(partly(TAIL, tail), partly(TAIL, tail), fill),
    )


def expect(new, dense, packed, tail, *, scale, turned=False) -> Any:
    """Attention and tail: the token is turned, appended and attended, one after the other."""
    rows: Any = rotate(new.qkv[:, :, :-1], new.cos, new.sin)
    if turned:
        rows = np.asarray(transform(jnp.asarray(rows)))
    tail_k = put(tail.k, tail.fill, rows[:, :, -1])
    tail_v = put(tail.v, tail.fill, new.qkv[:, :, -1])
    q = rows[:, :, :-1].reshape(BATCH, -1, rows.shape[-1])
    grown = Tail(tail_k, tail_v, tail.fill + 1)
    out = reference.quantized_decode_attention(q, dense, packed, grown, scale=scale)
    return out, tail_k, tail_v


def check(given, found, *, turned=False, scale=None):
    """An operation's result is the expected one."""
    new, dtype = given[0], given[0].qkv.dtype.name
    scale = new.qkv.shape[-1] ** -0.5 if scale is None else scale
    out, tail = found
    expected, *tails = expect(*given, scale=scale, turned=turned)
    assert out.dtype == dtype
    assert error(out, expected) < BOUNDS[dtype]
    assert (tail.fill == given[-1].fill + 1).all()
    for ours, theirs in zip((tail.k, tail.v), tails, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


def error(found, expected):
    """The largest error, as a share of the largest value; NaN if there is one."""
    found = np.asarray(found).astype(np.float64)
    return np.max(np.abs(found - expected)) / np.abs(expected).max()


@functools.cache  # to compile once for tests of the same shapes
def operation(backend, splits, **static):
    """The public function, or the kernel with so many splits."""
    if backend == "triton" and splits is not None:
        sizes = {"most_rows": ROWS, "most_words": WORDS, "splits": splits}
        return compiled(lambda *a: triton.append_and_attend(*a, **sizes, **static))
    return compiled(lambda *a: op.append_and_attend(*a, **static, backend=backend))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", DTYPES)
def test_attention_is_that_of_the_rows_spelled_out(name, backend):
    dtype, bits, group, head_dim, groups, splits = CASES[name]
    given = arrays(dtype or DTYPES[backend], bits, group, head_dim, groups)
    run = operation(backend, splits, scale=head_dim**-0.5, transform=False)
    found = run(*given)
    check(given, found)
    assert same_bits(*map(jax.tree.leaves, (found, run(*given))))


@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize(("head_dim", "turned"), [(64, True), (64, False), (80, True)])
def test_a_new_token_is_turned_appended_and_attended(backend, turned, head_dim):
    given = arrays(DTYPES[backend], (4,), 2, head_dim, 1, seed=1)
    check(given, operation(backend, None, transform=turned)(*given), turned=turned)


def test_splits_that_nothing_is_left_for():
    """One sequence has 9 blocks and the other 2."""
    given = arrays("float16", (4, 2), 2, 32, 1)
    run = operation("triton", 40, scale=32**-0.5, transform=False)
    check(given, run(*given))


@pytest.mark.parametrize("backend", ["xla", "xla, together", "triton"])
def test_a_full_tail_is_left_as_it_is(backend):
    backend, *together = backend.split(", ")
    static = {"scale": 32**-0.5, "transform": False}
    run = operation(backend, 3, **static, **({"together": True} if together else {}))
    *given, tail = arrays(DTYPES[backend], (4, 2), 2, 32, 1)
    for rows in (TAIL, TAIL + 9):
        full = jnp.full((BATCH,), rows, jnp.int32)
        tail = Tail(jnp.nan_to_num(tail.k), jnp.nan_to_num(tail.v), full)
        out, after = run(*given, tail)
        assert same_bits([after.k, after.v], [tail.k, tail.v])
        assert np.isfinite(np.asarray(out)).all()


@pytest.mark.parametrize(("bits", "key_group"), [((4, 2), None), ((2,), 32)])
def test_runs_of_several_blocks(bits, key_group, monkeypatch):
    monkeypatch.setattr(xla, "ROW_BLOCK", 32)
    given = arrays("float32", bits, 3, 64, 1, seed=3, key_group=key_group)
    check(given, compiled(lambda *a: op.append_and_attend(*a, backend="xla"))(*given))


def test_keys_by_channel_are_for_xla():
    given = arrays("float32", (2,), 2, 64, 1, key_group=32)
    check(given, op.append_and_attend(*given))
    with pytest.raises(NotImplementedError, match="by channel"):
        op.append_and_attend(*given, backend="triton")


@pytest.mark.parametrize(("dtype", "groups"), [("float32", 1), ("bfloat16", 2)])
def test_float32_and_small_groups_are_for_xla(dtype, groups):
    with pytest.raises(NotImplementedError, match=r"float32|2 groups"):
        op.append_and_attend(*arrays(dtype, (2,), 2, 64, groups), backend="triton")


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_queries_and_values_of_any_size(size):
    """Codes meet float16: nothing that is small or large may leave its range."""
    new, dense, packed, tail = arrays("bfloat16", (2,), 1, 16, 1)
    parts = [split_affine(x) for x in (packed.affine_k, packed.affine_v)]
    sizes = 1 / size, size
    keys, values = (join_affine(*(x * y for x in one)) for one, y in zip(parts, sizes, strict=True))
    factor = np.array([size, *sizes])[:, None]  # of the query, the key, the value
    none = jnp.zeros((BATCH,), jnp.int32)
    given = (
        replace(new, qkv=(new.qkv * factor).astype(new.qkv.dtype)),
        replace(dense, length=none),
        replace(packed, affine_k=keys, affine_v=values),
        replace(tail, fill=none),
    )
    out, _ = operation("triton", None, scale=0.25)(*given)
    assert error(out, expect(*given, scale=0.25)[0]) < BOUNDS["bfloat16"]


@pytest.mark.parametrize("backend", DTYPES)
def test_a_token_alone_attends_to_itself(backend):
    new, dense, packed, tail = arrays(DTYPES[backend], (4, 2), 2, 32, 1)
    none = jnp.zeros((BATCH,), jnp.int32)
    packed = replace(packed, rows=jnp.zeros_like(packed.rows))
    given = new, replace(dense, length=none), packed, replace(tail, fill=none)
    for splits in (1, 3):
        out, _ = operation(backend, splits, scale=32**-0.5, transform=False)(*given)
        assert same_bits([out], [np.repeat(new.qkv[:, :, -1], 2, axis=1)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": (3,)}, "bits"),
        ({"bits": ()}, "bits"),
        ({"words_k": jnp.zeros((2, 2, 3, 64), jnp.uint32)}, "words_k"),
        ({"words_k": jnp.zeros((2, 2, WORDS, 64)), "words_v": jnp.zeros((2, 2, WORDS, 64))},
         "uint32"),
        ({"rows": jnp.zeros((2, 2), jnp.int32)}, "first and rows"),
        ({"affine_v": jnp.zeros((2, 2, 3, 4), jnp.uint32)}, "affine"),
        ({"fill": jnp.zeros((3,), jnp.int32)}, "fill"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(changed, message):
    new, dense, packed, tail = arrays("float32", (2,), 2, 64, 1)
    if "fill" in changed:
        tail = replace(tail, **changed)
    else:
        packed = replace(packed, **changed)
    with pytest.raises(ValueError, match=message):
        op.append_and_attend(new, dense, packed, tail)
