"""The allocation by the best tokens of all layers, against a sorted list in plain Python."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.cache import numpy_methods
from vlcache_jax import Custom, Prompt
from vlcache_jax.cache.allocate import GlobalBest
from vlcache_jax.cache.budget import Budget
from vlcache_jax.cache.method import Observation

F = np.float32
K, T = 2, 40


@partial(jax.jit, static_argnums=(0, 1))
def run(method, layers, scores, m, limits):
    prompt = Prompt(m, jnp.zeros((len(m), T), bool), layers, limits)
    sizes = method.rules()[1].sizes(prompt, scores)
    return sizes, method.plan(Observation(scores), prompt).budgets


def of(budget, scores, m):
    limit = Budget.parse(budget)
    method = Custom(limit.bucket(T).share or 1, score="h2o", allocation="global-best")
    arrays = jnp.asarray(scores, jnp.float32), jnp.asarray(m, jnp.int32)
    return map(np.asarray, run(method, scores.shape[1], *arrays, limit.data))


def counted(scores, m, limit):
    """How many of the best tokens each layer has, of scores [L, K, m]; the least and the most.

    The bounds differ where float32 may order tokens otherwise that are nearly the last one taken.
    """
    layers = len(scores)
    total = scores.sum(-1, keepdims=True)
    worth = np.where(total > 0, scores / np.where(total > 0, total, 1), 1 / m).mean(1)  # [L, m]
    wanted = int(limit.alpha * F(m * layers) + F(0.5))
    wanted = limit.most * layers if limit.exact else wanted
    order = sorted((-worth[layer, t], t, layer) for layer in range(layers) for t in range(m))
    taken = np.bincount([layer for *_, layer in order[:wanted]], minlength=layers)
    worst = -order[wanted - 1][0] if wanted else np.inf
    return wanted, taken, (worth > worst + 1e-6).sum(1), (worth >= worst - 1e-6).sum(1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=st.sampled_from(["1tok", "3tok", "17tok", "40tok", 0.01, 0.1, 0.45, 0.99]),
    layers=st.sampled_from([1, 2, 5]),
    kind=st.sampled_from(["peaked", "plain", "equal", "some are 0"]),
    lengths=st.lists(st.integers(1, T), min_size=3, max_size=3),
)
@example(seed=0, budget="17tok", layers=5, kind="equal", lengths=[1, 2, 40])
def test_a_layer_is_given_as_many_as_it_has_of_the_best(seed, budget, layers, kind, lengths):
    rng = np.random.default_rng(seed)
    scores = {
        "peaked": lambda shape: rng.random(shape) ** rng.integers(1, 12, (3, layers, 1, 1)),
        "plain": rng.random,
        "equal": np.ones,
        "some are 0": lambda shape: (
            rng.integers(0, 2, shape) * rng.integers(0, 2, (*shape[:2], 1, 1))
        ),
    }[kind]((3, layers, K, T))
    inside = np.arange(T) < np.array(lengths)[:, None, None, None]
    sizes, budgets = of(budget, np.where(inside, scores, np.nan), lengths)
    for b, m in enumerate(lengths):
        limit = numpy_methods.limits(budget, m)
        wanted, taken, least, most = counted(scores[b, ..., :m], m, limit)
        assert (least <= sizes[b]).all()
        assert (sizes[b] <= most).all()
        assert sizes[b].sum() == wanted
        if kind == "equal":
            assert sizes[b].tolist() == taken.tolist()
        assert budgets[b].tolist() == numpy_methods.whole(sizes[b], m, limit)
        alone = of(budget, np.where(inside, scores, np.nan)[b : b + 1], [m])
        assert [each[0].tolist() for each in alone] == [sizes[b].tolist(), budgets[b].tolist()]


@pytest.mark.parametrize("budget", ["1tok", "7tok", 0.1, 0.5])
def test_layers_that_are_alike_are_given_the_same(budget):
    scores = np.tile(np.random.default_rng(0).random((1, 1, K, T)), (1, 4, 1, 1))
    _, budgets = of(budget, scores, [T])
    assert len(set(budgets[0].tolist())) == 1
    assert budgets[0][0] == numpy_methods.limits(budget, T).even


def test_a_layer_of_few_good_tokens_is_given_few():
    """One token has all of the first layer's attention; the floor binds."""
    scores = np.ones((1, 3, K, T))
    scores[:, 0, :, 1:] = 0
    sizes, budgets = of("10tok", scores, [T])
    assert sizes.tolist() == [[1, 15, 14]]
    assert budgets.tolist() == [[1, 15, 14]]


def test_a_score_without_numbers_is_refused():
    method = Custom(0.5, score="streaming-llm", allocation=GlobalBest())
    prompt = Prompt(jnp.array([T]), jnp.zeros((1, T), bool), 2, method.limit.data)
    with pytest.raises(ValueError, match="GlobalBest compares the scores of all layers"):
        method.plan(Observation(), prompt)
