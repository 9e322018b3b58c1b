"""Window statistics, every backend against dense rows of the attention matrix."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.window_scores import average_pool, reference, window_scores
from tests.kernels.cases import (
    assert_close,
    both_backends,
    compiled,
    covering,
    draw,
    full_product,
    int32,
    kv_heads,
    poison,
    same_bits,
)

THRESHOLD = 0.01
WINDOW = 133
"""Rows of a window that is not the whole prompt: odd, and more than one block of any backend."""

run = compiled(window_scores, "threshold", "maxima", "scale", "backend")


def cut(q, start, rows):
    """The window's rows of all queries [B, T, N, H]; NaN where they go beyond the end."""
    window = np.full((q.shape[0], rows, *q.shape[2:]), np.nan, q.dtype)
    for b, first in enumerate(start):
        part = q[b, first : first + rows]
        window[b, : len(part)] = part
    return window


def place(length, lengths, window):
    """First position of each sequence's window, and its number of rows."""
    rows = {"one": 1, "all": length}.get(window, min(WINDOW, length))
    # Inside, a block of keys begins with the last row of a block of rows.
    inside = np.minimum(64 * (lengths // 192) + 1, lengths - 1)
    start = {"inside": inside, "last": lengths - rows, "one": lengths - 1}.get(window, 0 * lengths)
    return np.maximum(start, 0), rows


@functools.lru_cache(maxsize=1)  # both backends run a case one after the other
def make(dtype, head_dim, group, length, window) -> Any:
    """Inputs of a batch of unequal lengths, one of them 0, and what is expected of them.

    Also the entries of each head that are so close to the threshold that float32 may count them on
    either side.
    """
    heads = kv_heads(group)
    q, k = draw((3, length, heads * group, head_dim), (3, length, heads, head_dim), dtype=dtype)
    lengths = int32(length, length // 2, 0)
    start, rows = place(length, lengths, window)
    there = (np.arange(length) < lengths[:, None])[:, :, None, None]
    q, k = cut(poison(q, there), start, rows), poison(k, there)
    exact = q.astype(np.float64), k.astype(np.float64), start, lengths
    expected = reference.window_scores(*exact, threshold=THRESHOLD, scale=head_dim**-0.5)
    return (q, k, start, lengths), expected, near_the_threshold(*exact)


def near_the_threshold(q, k, start, lengths):
    found = np.zeros((len(q), q.shape[2]), int)
    for b in np.flatnonzero(lengths):
        rows, n = min(q.shape[1], lengths[b] - start[b]), lengths[b]
        grouped = q[b, :rows].reshape(rows, k.shape[2], -1, q.shape[3]) * q.shape[3] ** -0.5
        logits = np.einsum("rkgh,skh->rkgs", grouped, k[b, :n], optimize=True).reshape(rows, -1, n)
        seen = np.arange(n) <= start[b] + np.arange(rows)[:, None, None]
        logits = np.where(seen, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        found[b] = (np.abs(weights / THRESHOLD - 1) < 1e-4).sum((0, 2))
    return found


def check(case, backend):
    (q, k, start, lengths), (scores, zeroed, visible, maxima), near = make(*case)
    settings = {"threshold": THRESHOLD, "maxima": True, "backend": backend}
    ours = run(q, k, start, lengths, **settings)
    assert same_bits(ours, run(q, k, start, lengths, **settings))
    for found, expected in ((ours.scores, scores), (ours.maxima, maxima)):
        assert found.dtype == jnp.float32
        assert_close(found, expected, "float32")
        assert (np.asarray(found)[expected == 0] == 0).all()
    true_rows = np.clip(lengths - start, 0, q.shape[1])
    assert np.asarray(ours.scores).sum() == pytest.approx(q.shape[2] * true_rows.sum(), rel=1e-5)
    assert (np.abs(ours.zeroed - zeroed) <= near).all()
    assert ours.visible.tolist() == visible.tolist()


@both_backends
@covering("window_scores")
def test_against_the_reference(case, backend):
    check(case, backend)


@pytest.mark.slow
@both_backends
@full_product("window_scores")
def test_every_combination(case, backend):
    check(case, backend)


def test_counts_of_the_cases_are_exact():
    """Few entries are near the threshold, so that comparing the counts means something."""
    for window in ("first", "inside", "last", "one", "all"):
        _, (_, zeroed, visible, _), near = make("float32", 64, 4, 257, window)
        assert near.sum() <= 1e-3 * visible.sum()
        assert 0.1 * visible.sum() < zeroed.sum() < visible.sum()


def case(length, window, heads, kv_heads, start, sharpness=3.0) -> Any:
    q, k = draw((1, window, heads, 16), (1, length, kv_heads, 16), sharpness=sharpness)
    return q, k, int32(start), int32(length)


@both_backends
@pytest.mark.parametrize("length", [1, 40, 257, 700])
def test_rows_at_positions_of_their_own(backend, length):
    """Some rows of each prompt, all of them, one and none; a window of more than one block."""
    q, k = draw((4, length, 4, 16), (4, length, 2, 16), dtype="float32")
    lengths = int32(length, max(1, length // 2), length, 1)
    rng = np.random.default_rng(length)
    taken = [rng.random(length) < share for share in (0.4, 0.8, 1.0, 0.0)]
    rows = max(min(133, length), *(own.sum() for own in taken))
    start = np.full((4, rows), length + 3, np.int32)  # not there
    for b, own in enumerate(taken):
        at = np.flatnonzero(own[: lengths[b]])
        start[b, : at.size] = at
    there = (np.arange(length) < lengths[:, None])[:, :, None, None]
    q = np.take_along_axis(poison(q, there), np.minimum(start, length - 1)[..., None, None], 1)
    q = np.where((start < lengths[:, None])[..., None, None], q, np.nan)
    settings = {"threshold": THRESHOLD, "scale": 0.25}
    exact = (x.astype(np.float64) for x in (q, k))
    expected = reference.window_scores(*exact, start, lengths, **settings)
    ours = run(q, poison(k, there), start, lengths, backend=backend, **settings)
    assert_close(ours.scores, expected[0], "float32")
    assert np.abs(ours.zeroed - expected[1]).max() <= 1
    assert ours.visible.tolist() == expected[2].tolist()


@both_backends
@pytest.mark.parametrize(("rows", "kv_heads"), [(1, 1), (133, 1), (300, 2)])
def test_rows_that_count_more_or_less(backend, rows, kv_heads):
    q, k, start, lengths = case(300, rows, 4, 2, min(300 - rows, 280))
    lengths = int32(290)  # of many rows the last ten are not there
    weights = np.random.default_rng(rows).integers(0, 4, (1, kv_heads, rows)).astype(np.float32)
    weights[..., 0] = 2
    ours = run(q, k, start, lengths, weights=weights, threshold=THRESHOLD, maxima=True,
               backend=backend)  # fmt: skip
    settings = {"threshold": THRESHOLD, "scale": 0.25}
    expected = reference.window_scores(q, k, start, lengths, weights=weights, **settings)
    assert_close(ours.scores, expected[0], "float32")
    assert_close(ours.maxima, expected[3], "float32")
    plain = run(q, k, start, lengths, threshold=THRESHOLD, maxima=True, backend=backend)
    assert same_bits(ours.zeroed, plain.zeroed)
    once = run(q, k, start, lengths, weights=np.ones_like(weights), maxima=True, backend=backend)
    assert_close(once.scores, np.asarray(plain.scores), "float32")


@both_backends
@pytest.mark.parametrize("window", [1, 7, 40])
def test_positions_one_after_the_other_are_a_window(backend, window):
    q, k, start, lengths = case(40, window, 4, 2, 40 - window)
    settings = {"threshold": THRESHOLD, "backend": backend}
    rows = start[:, None] + int32(*range(window))
    assert same_bits(run(q, k, rows, lengths, **settings), run(q, k, start, lengths, **settings))


@both_backends
def test_equal_logits_are_all_visible_and_none_is_zeroed(backend):
    q, k, start, lengths = case(40, 8, 4, 2, 32)
    ours = run(0 * q, k, start, lengths, threshold=THRESHOLD, maxima=True, backend=backend)
    assert (np.asarray(ours.zeroed) == 0).all()
    assert (np.asarray(ours.visible) == sum(range(33, 41))).all()
    largest = 2 / np.maximum(np.arange(40) + 1, 33)  # of the first row that sees a key; two heads
    np.testing.assert_allclose(ours.maxima, np.broadcast_to(largest, (1, 2, 40)), rtol=1e-6)


@both_backends
def test_sharp_attention_is_sparse(backend):
    ours = run(*case(300, 16, 2, 2, 284, sharpness=50.0), threshold=THRESHOLD, backend=backend)
    assert (np.asarray(ours.zeroed) > 0.9 * np.asarray(ours.visible)).all()


@both_backends
@pytest.mark.parametrize("maxima", [False, True])
def test_never_a_square_matrix(backend, maxima):
    length = 4096
    q, k = (jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32) for _ in range(2))
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    program = run.lower(q, k, one, one, maxima=maxima, backend=backend).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * length * length * 4 / 4


@both_backends
def test_what_is_not_asked_for_is_not_there(backend):
    arrays = case(40, 8, 4, 2, 32)
    everything = run(*arrays, threshold=THRESHOLD, maxima=True, backend=backend)
    for threshold, maxima in ((None, False), (None, True), (THRESHOLD, False)):
        ours = run(*arrays, threshold=threshold, maxima=maxima, backend=backend)
        assert (ours.zeroed is None) == (ours.visible is None) == (threshold is None)
        assert (ours.maxima is None) == (not maxima)
        for found, expected in zip(ours, everything, strict=True):
            if found is not None:
                np.testing.assert_allclose(found, expected, rtol=1e-5)


@both_backends
def test_of_one_row_and_one_head_the_maximum_is_the_sum(backend):
    ours = run(*case(300, 1, 2, 2, 299), maxima=True, backend=backend)
    np.testing.assert_array_equal(ours.maxima, ours.scores)


def test_counts_beyond_32_bits_are_refused_and_sums_are_not():
    length = 131072
    q, k = (jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32) for _ in range(2))
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match="32 bits"):
        jax.eval_shape(partial(window_scores, threshold=THRESHOLD), q, k, one, one)
    assert jax.eval_shape(window_scores, q, k, one, one).scores.shape == (1, 1, length)


@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_pooling_counts_zeros_at_the_ends(kernel):
    scores = np.random.default_rng(0).random((2, 3, 20)).astype(np.float32)
    last = np.array([20, 11])
    ours = np.asarray(average_pool(jnp.asarray(scores), jnp.asarray(last), kernel))
    half = kernel // 2
    for b, n in enumerate(last):
        padded = np.pad(scores[b, :, :n], ((0, 0), (half, half)))
        expected = sum(padded[:, i : i + n] for i in range(kernel)) / kernel
        np.testing.assert_allclose(ours[b, :, :n], expected, rtol=1e-5)
        assert (ours[b, :, n:] == 0).all()


def test_shapes_that_do_not_fit_are_refused():
    q, k, start, lengths = case(10, 4, 4, 2, 6)
    with pytest.raises(ValueError, match="multiple of"):
        window_scores(q[:, :, :3], k, start, lengths)
    with pytest.raises(ValueError, match="must be"):
        window_scores(q, k, start[:0], lengths)
    with pytest.raises(ValueError, match=r"expected \[B, W, N, H\]"):
        window_scores(q[..., :8], k, start, lengths)
    with pytest.raises(ValueError, match=r"expected \[B, 1, W\] or \[B, K, W\]"):
        window_scores(q, k, start, lengths, weights=jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="odd"):
        average_pool(jnp.zeros((1, 1, 4)), jnp.array([4]), 4)
    with pytest.raises(NotImplementedError, match="no backend 'cudnn'"):
        window_scores(q, k, start, lengths, backend="cudnn")
