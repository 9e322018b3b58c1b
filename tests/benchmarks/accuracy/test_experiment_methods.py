"""What the experiments' own scores and methods keep, against plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accuracy.experiments import compared
from benchmarks.accuracy.experiments.compared import OneLayer
from vlcache_jax import H2O, Custom, VLCache
from vlcache_jax.cache.budget import Budget, Prompt
from vlcache_jax.cache.method import Observation
from vlcache_jax.cache.score import Layer
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
