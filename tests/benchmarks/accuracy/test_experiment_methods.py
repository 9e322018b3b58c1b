"""What the experiments' own scores and methods keep, against plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accuracy.experiments import compared, scores
from benchmarks.accuracy.experiments.compared import OneLayer
from benchmarks.accuracy.experiments.row_score import RowScore
from vlcache_jax import H2O, Custom, VLCache
from vlcache_jax.cache.budget import Budget, Prompt
from vlcache_jax.cache.method import Observation
from vlcache_jax.cache.score import ColumnSum, Layer, PostVisionRows, RowMaximum
from vlcache_jax.cache.state import Pool


@pytest.fixture(scope="module")
def layer():
    """Two prompts of 40 rows; rows 3..20 and 2..30 are visual, the second ends after 36."""
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, 40, heads, 16)).astype(np.float32) * 2 for heads in (6, 2))
    q[1, 36:], k[1, 36:] = np.nan, np.nan  # never to be read
    visual = np.zeros((2, 40), bool)
    visual[0, 3:21] = visual[1, 2:31] = True
    prompt = Prompt(jnp.array([40, 36]), jnp.array(visual), 3, Budget.parse(0.5).data)
    return Layer(0, jnp.array(q), jnp.array(k), jnp.array(k), prompt)


def in_numpy(score, layer, b):
    """The score of one prompt [K, m], row by row and head by head."""
    m = int(layer.prompt.length[b])
    q, k = (np.asarray(x[b, :m], np.float64) for x in (layer.q, layer.k))
    first = max((21, 31)[b], m - score.last)
    found = np.zeros((2, 3, m - first, m))
    for head, row in np.ndindex(6, m - first):
        logits = k[: first + row + 1, head // 3] @ q[first + row, head] / 4
        weights = np.exp(logits - logits.max())
        found[head // 3, head % 3, row, : first + row + 1] = weights / weights.sum()
        if score.half_life:
            found[head // 3, head % 3, row] *= 0.5 ** ((m - 1 - first - row) / score.half_life)
    reduce = {"sum": np.sum, "max": np.max}
    found = reduce[score.group](reduce[score.rows](found, axis=2), axis=1)
    if score.heads == "max":
        found[:] = found.max(axis=0)
    if score.pool > 1:
        side = score.pool // 2
        padded = np.pad(found, ((0, 0), (side, side)))
        found = np.stack([padded[:, i : i + score.pool].mean(1) for i in range(m)], axis=1)
    return found


@pytest.mark.parametrize("name", scores.SCORES)
def test_a_score_is_what_numpy_says(name, layer):
    score = scores.SCORES[name]
    found = np.asarray(score(layer))
    for b, m in enumerate(layer.prompt.length.tolist()):
        np.testing.assert_allclose(found[b, :, :m], in_numpy(score, layer, b), rtol=1e-4, atol=1e-6)


def test_without_changes_it_is_the_score_of_vl_cache(layer):
    expected, found = ColumnSum(PostVisionRows())(layer), RowScore()(layer)
    assert expected is not None
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1, :, :36], expected[1, :, :36], rtol=1e-5)


def test_the_best_one_is_the_score_of_the_library(layer):
    best, library = RowScore(rows="max", pool=9), RowMaximum(PostVisionRows(maximum=128))
    np.testing.assert_allclose(library(layer), best(layer), rtol=1e-5, atol=1e-6)
    rows = jnp.array([[30, 10, 8], [30, 10, 2]])
    for ours, expected in zip(
        library.always(rows, layer.prompt), best.always(rows, layer.prompt), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


def test_the_question_is_kept_as_far_as_it_may(layer):
    rows = jnp.array([[30, 10, 8], [30, 10, 2]])
    for share, expected in (
        (1.0, [[19, 10, 8], [5, 5, 2]]),
        (0.5, [[15, 5, 4], [5, 5, 1]]),
        (0.0, [[3, 1, 0], [3, 1, 0]]),
    ):
        first, last = RowScore(question=share).always(rows, layer.prompt)
        assert not first.any()
        np.testing.assert_array_equal(last, expected)


@pytest.mark.parametrize("bad", [{"pool": 2}, {"half_life": 0}, {"question": 2}, {"last": 0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"must be|pool"):
        RowScore(**bad)


def test_one_layer_alone_is_compressed(layer):
    prompt = layer.prompt
    seen = Observation(jnp.array(np.random.default_rng(1).random((2, 3, 2, 40)), jnp.float32))
    even = Custom(0.5, allocation="uniform").plan(seen, prompt)
    method = OneLayer(0.5, allocation="uniform", layer=1)
    plan = method.plan(seen, prompt)
    np.testing.assert_array_equal(plan.budgets, [[40, 20, 40], [36, 18, 36]])
    kept = np.asarray(plan.kept(prompt))
    assert kept[0, [0, 2]].all()
    assert kept[1, [0, 2], :, :36].all()
    assert not kept[1, :, :, 36:].any()
    np.testing.assert_array_equal(kept[:, 1], np.asarray(even.kept(prompt))[:, 1])
    rows = jnp.zeros((2, 2, 128, 16))
    pool = method.build(rows, rows, plan, prompt)
    assert isinstance(pool, Pool)
    assert pool.k.shape[2] >= 3 * 40


def test_the_pairs_hold_vl_cache():
    pair = Custom(
        0.1, score=compared.SCORES["post-vision"], allocation=compared.ALLOCATIONS["sparsity"]
    )
    assert pair.rules() == VLCache(0.1).rules()
    score, sizes = compared.SCORES["full prompt"], compared.ALLOCATIONS["uniform"]
    assert Custom(0.1, score=score, allocation=sizes, recent_ratio=0.5).rules() == H2O(0.1).rules()
