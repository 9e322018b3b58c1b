"""The scores by themselves: of one layer with random queries and keys."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.window_scores import window_scores
from vlcache_jax.cache import score
from vlcache_jax.cache.budget import Budget, Prompt
from vlcache_jax.cache.score import (
    AllRows,
    LastRows,
    Layer,
    Look,
    PooledWindow,
    PostVisionRows,
    RowMaximum,
)

LENGTHS = (40, 33, 21, 40, 1)
PICTURES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((3, 21),),
    ((1, 9), (12, 20)),  # two of them
    (),
    ((5, 40),),  # no text behind it
    (),
)
"""First and last position behind each picture, for each prompt."""


def make_layer(*rows: int, heads: int = 6, width: int = 40) -> Layer:
    """Some of the prompts in one batch; what stands behind them is NaN."""
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(len(LENGTHS), 40, n, 16)).astype(np.float32) for n in (heads, 2))
    visual = np.zeros((len(LENGTHS), width), bool)
    filled = [np.full((len(LENGTHS), width, *x.shape[2:]), np.nan, np.float32) for x in (q, k)]
    for row, length in enumerate(LENGTHS):
        for first, last in PICTURES[row]:
            visual[row, first:last] = True
        for ours, values in zip(filled, (2 * q, k), strict=True):
            ours[row, :length] = values[row, :length]
    q, k, visual = (jnp.asarray(x[list(rows)]) for x in (*filled, visual))
    lengths = jnp.asarray(np.array(LENGTHS, np.int32)[list(rows)])
    return Layer(0, q, k, k, Prompt(lengths, visual, 3, Budget.parse(0.5).data))


def largest(layer: Layer, row: int, first: int, kernel: int) -> np.ndarray:
    """`RowMaximum` of one prompt [K, m] in float64: row by row, head by head, key by key."""
    m = int(layer.prompt.length[row])
    q, k = (np.asarray(x[row, :m], np.float64) for x in (layer.q, layer.k))
    heads, kv_heads = q.shape[1], k.shape[1]
    found = np.zeros((kv_heads, m))
    for head in range(heads):
        highest = np.zeros(m)
        for position in range(first, m):
            logits = k[: position + 1, head // (heads // kv_heads)] @ q[position, head] / 4
            weights = np.exp(logits) / np.exp(logits).sum()
            highest[: position + 1] = np.maximum(highest[: position + 1], weights)
        found[head // (heads // kv_heads)] += highest
    side = kernel // 2
    around = [
        [found[h, max(0, j - side) : j + side + 1] for j in range(m)] for h in range(kv_heads)
    ]
    return np.array([[values.sum() / kernel for values in head] for head in around])


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("kernel", [1, 9])
@pytest.mark.parametrize(
    ("window", "first"),
    [
        (PostVisionRows(), (21, 20, 0, 8, 0)),
        (PostVisionRows(fallback=4, maximum=5), (35, 28, 17, 36, 0)),
        (AllRows(), (0, 0, 0, 0, 0)),
    ],
)
def test_the_row_maximum_is_its_formula(window, first, kernel, heads):
    layer = make_layer(*range(len(LENGTHS)), heads=heads)
    found = np.asarray(RowMaximum(window, kernel=kernel)(layer))
    assert found.dtype == np.float32
    for row, m in enumerate(LENGTHS):
        expected = largest(layer, row, first[row], kernel)
        np.testing.assert_allclose(found[row, :, :m], expected, rtol=1e-5, atol=1e-7)
        assert (found[row, :, m:] == 0).all()


def test_the_row_maximum_of_a_prompt_is_the_same_in_any_batch_and_bucket():
    every = np.asarray(RowMaximum()(make_layer(*range(len(LENGTHS)))))
    for row in range(len(LENGTHS)):
        alone = RowMaximum()(make_layer(row, width=64))
        np.testing.assert_allclose(alone[0, :, :40], every[row], rtol=1e-5, atol=1e-7)


def test_the_largest_attention_is_seen_where_the_sum_forgets_it():
    layer = make_layer(0)
    key = layer.k[0, 7]
    q = layer.q.at[:, 22:].set(0.0).at[0, 21].set(100 * jnp.repeat(key, 3, axis=0))
    found = RowMaximum(kernel=1)(Layer(0, q, layer.k, layer.v, layer.prompt))
    np.testing.assert_array_equal(jnp.argmax(found, axis=-1), 7)
    np.testing.assert_allclose(found[..., 7], 3.0, rtol=1e-5)  # of three query heads


@pytest.mark.parametrize("kind", [RowMaximum, PooledWindow])
@pytest.mark.parametrize("kernel", [0, 2, -1])
def test_kernels_must_be_odd(kind, kernel):
    with pytest.raises(ValueError, match=f"kernel={kernel} must be odd"):
        kind(kernel=kernel)


def test_a_window_is_observed_once_with_all_that_is_asked_of_it(monkeypatch):
    calls = []

    def counted(*arrays, **settings):
        calls.append((settings["threshold"], settings["maxima"]))
        return window_scores(*arrays, **settings)

    monkeypatch.setattr(score, "window_scores", counted)
    post, last = PostVisionRows(), LastRows(4)
    looks = [Look(post), Look(last), Look(post, maxima=True), Look(post, 0.01), Look(post, 0.2)]
    layer = make_layer(0, 1).seeing(looks)
    assert calls == [(0.01, True), (None, False)]
    assert layer.watch(post) is layer.watch(post, 0.01) is layer.watch(post, maxima=True)
    assert layer.seeing(looks).watch(last) is layer.watch(last)
    assert len(calls) == 2
    found = layer.watch(last, maxima=True)  # nobody had asked for it beforehand
    assert calls[2:] == [(None, True)]
    np.testing.assert_array_equal(found.scores, layer.watch(last).scores)
    layer.watch(post, 0.2)
    assert calls[3:] == [(0.2, False)]
