"""Window statistics against dense rows of the attention matrix."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.window_scores import average_pool, reference, window_scores


def case(length, window, heads, kv_heads, starts, lengths, seed=0, sharpness=3.0) -> Any:
    rng = np.random.default_rng(seed)
    q = sharpness * rng.standard_normal((len(starts), window, heads, 16)).astype(np.float32)
    k = rng.standard_normal((len(starts), length, kv_heads, 16)).astype(np.float32)
    return q, k, np.array(starts, np.int32), np.array(lengths, np.int32)


@pytest.mark.parametrize(
    ("length", "window", "heads", "kv_heads", "starts", "lengths"),
    [
        (1, 1, 4, 4, [0], [1]),
        (17, 17, 4, 2, [0, 0, 16], [17, 5, 17]),  # all rows, a short prompt, a single row
        (257, 32, 7, 1, [225, 100, 0], [257, 101, 31]),
        (600, 130, 2, 1, [470, 0], [600, 3]),
        (1000, 300, 8, 2, [700], [990]),
    ],
)
def test_scores_and_counts(length, window, heads, kv_heads, starts, lengths):
    q, k, start, true = case(length, window, heads, kv_heads, starts, lengths)
    expected = reference.window_scores(q, k, start, true, threshold=0.01, scale=0.25)
    for b, n in enumerate(true):  # what is not there must not matter
        k[b, n:] = np.nan
        q[b, max(0, n - start[b]) :] = np.nan
    run = jax.jit(partial(window_scores, threshold=0.01))
    ours, again = run(q, k, start, true), run(q, k, start, true)
    np.testing.assert_allclose(ours.scores, expected[0], atol=2e-5 * window)
    assert ours.zeroed.tolist() == expected[1].tolist()
    assert ours.visible.tolist() == expected[2].tolist()
    assert np.asarray(ours.scores).sum() == pytest.approx(
        heads * np.minimum(window, true - start).sum(), rel=1e-5
    )
    for one, other in zip(ours, again, strict=True):
        assert np.array_equal(one, other)


def test_equal_logits_are_all_visible_and_none_is_zeroed():
    q, k, start, true = case(40, 8, 4, 2, [32], [40])
    ours = window_scores(0 * q, k, start, true, threshold=0.01)
    assert (np.asarray(ours.zeroed) == 0).all()
    assert (np.asarray(ours.visible) == sum(range(33, 41))).all()


def test_sharp_attention_is_sparse():
    q, k, start, true = case(300, 16, 2, 2, [284], [300], sharpness=50.0)
    ours = window_scores(q, k, start, true, threshold=0.01)
    assert (np.asarray(ours.zeroed) > 0.9 * np.asarray(ours.visible)).all()


def test_never_a_square_matrix():
    length = 4096
    q, k = (jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32) for _ in range(2))
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    memory = jax.jit(window_scores).lower(q, k, one, one).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * length * length * 4 / 4


def test_bfloat16_input_gives_float32_sums():
    q, k, start, true = case(200, 20, 4, 2, [180], [200], sharpness=1.0)
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in (q, k))
    ours = window_scores(q, k, start, true)
    q, k = (np.asarray(x, np.float32) for x in (q, k))
    expected = reference.window_scores(q, k, start, true, threshold=0.01, scale=0.25)
    assert ours.scores.dtype == jnp.float32
    np.testing.assert_allclose(ours.scores, expected[0], atol=1e-4)


def test_without_a_threshold_nothing_is_counted():
    q, k, start, true = case(40, 8, 4, 2, [32], [40])
    counted = window_scores(q, k, start, true, threshold=0.01)
    ours = window_scores(q, k, start, true)
    assert ours.zeroed is ours.visible is None
    np.testing.assert_allclose(ours.scores, counted.scores, rtol=1e-5)


def test_counts_beyond_32_bits_are_refused_and_sums_are_not():
    length = 131072
    q, k = (jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32) for _ in range(2))
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match="32 bits"):
        jax.eval_shape(partial(window_scores, threshold=0.01), q, k, one, one)
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
    q, k, start, true = case(10, 4, 4, 2, [6], [10])
    with pytest.raises(ValueError, match="multiple of"):
        window_scores(q[:, :, :3], k, start, true)
    with pytest.raises(ValueError, match="must be"):
        window_scores(q, k, start[:0], true)
    with pytest.raises(ValueError, match="odd"):
        average_pool(jnp.zeros((1, 1, 4)), jnp.array([4]), 4)
    with pytest.raises(NotImplementedError, match="no backend 'cudnn'"):
        window_scores(q, k, start, true, backend="cudnn")
