"""Settings of every method that are off by default, against plain numpy."""

from dataclasses import replace
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache import numpy_methods
from vlcache_jax import H2O, Custom, Prompt, PyramidKV, SnapKV, StreamingLLM, VLCache
from vlcache_jax.cache.budget import Budget
from vlcache_jax.cache.method import Observation

B, L, K, T = 4, 3, 2, 48
METHODS = {
    "vl-cache": VLCache(1, keep_text=True),
    "h2o": H2O(1, keep_text=True),
    "snapkv": SnapKV(1, window=6, keep_text=True),
    "pyramidkv": PyramidKV(1, window=6, slope=3, keep_text=True),
    "streaming-llm": StreamingLLM(1, keep_text=True),
    "shared heads": Custom(1, True, "h2o", "sparsity", keep_text=True),
}
VISUAL = {
    "one picture": lambda m: [(3, m // 2)],
    "several": lambda m: [(0, m // 5), (m // 4, m // 3), (m // 2, m - 2)],
    "no picture": lambda m: [],
    "all of it": lambda m: [(0, m)],
    "at the end": lambda m: [(m // 2, m)],
}


@partial(jax.jit, static_argnums=0)
def plan(method, scores, measured, m, visual, limits):
    prompt = Prompt(m, visual, L, limits)
    made = method.plan(Observation(scores, measured), prompt)
    return made.budgets, jnp.broadcast_to(made.kept(prompt), (len(m), L, K, T))


def of_budget(method, budget):
    """The method whose program is run, and the budget as data."""
    limit = Budget.parse(budget)
    return replace(method, budget=limit.bucket(T).share), limit.data


def draw(seed, pictures):
    rng = np.random.default_rng(seed)
    m = rng.integers(1, T + 1, B).astype(np.int32)
    m[0] = T
    scores = np.round(rng.random((B, L, K, T)) * 50).astype(np.float32)
    inside = np.arange(T) < m[:, None]
    visual = np.zeros((B, T), bool)
    for row, length in enumerate(m):
        for first, stop in VISUAL[pictures](int(length)):
            visual[row, first:stop] = True
    measured = (1 - rng.random((B, L)) ** 4).astype(np.float32)
    spoilt = np.where(inside[:, None, None], scores, np.nan)
    return scores, spoilt, measured, m, visual


def ends(name, k, m, even):
    """How many first and last tokens a method always keeps of k."""
    if name == "streaming-llm":
        first = min(4, k // 2)
        return first, k - first
    if "kv" in name:
        return 0, min(k, 6, max(1, even // 2))
    return 0, int(Fraction(1, 10 if name == "vl-cache" else 2) * k)


def expected(name, scores, m, visual, k, even):
    """The positions that one head keeps of k: text, the ends of what is left, then the best."""
    text = [j for j in range(m) if not visual[j]]
    text = text[-max(1, k // 2) :] if len(text) > max(1, k // 2) else text
    first, last = ends(name, k - len(text), m, even)
    kept = {*text, *range(first), *range(m - last, m)}
    assert len(kept) <= k
    if name == "streaming-llm":
        scores = np.arange(m)
    others = sorted(set(range(m)) - kept, key=lambda j: (-scores[j], j))
    return kept | set(others[: k - len(kept)])


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=st.sampled_from(["1tok", "2tok", "3tok", "11tok", "48tok", 0.01, 0.3, 0.6, 0.99]),
    pictures=st.sampled_from(list(VISUAL)),
)
def test_text_is_kept_before_any_ranking(name, seed, budget, pictures):
    scores, spoilt, measured, m, visual = draw(seed, pictures)
    method, limits = of_budget(METHODS[name], budget)
    shown = None if name == "streaming-llm" else spoilt
    budgets, kept = map(np.asarray, plan(method, shown, measured, m, visual, limits))
    plain, _ = of_budget(replace(method, keep_text=False), budget)
    assert budgets.tolist() == plan(plain, shown, measured, m, visual, limits)[0].tolist()
    for b, layer, head in np.ndindex(B, L, K):
        own = scores[b, layer].sum(0) if method.shared_heads else scores[b, layer, head]
        limit = Budget.parse(budget)
        share = (
            Fraction(limit.tokens or 0) if limit.tokens else Fraction(str(limit.share)) * int(m[b])
        )
        even = min(max(int(share + Fraction(1, 2)), 1), m[b])
        want = expected(name, own, m[b], visual[b], budgets[b, layer], even)
        assert set(np.flatnonzero(kept[b, layer, head]).tolist()) == want
    row = slice(2, 3)
    alone = plan(
        method, None if shown is None else shown[row], measured[row], m[row], visual[row], limits
    )
    assert alone[0].tolist() == budgets[row].tolist()
    assert alone[1].tolist() == kept[row].tolist()


def test_text_is_kept_whatever_it_is_worth():
    """A tenth of a prompt is enough for the question, where the best scores are the picture's."""
    m, visual = np.array([40], np.int32), (np.arange(T) < 35)[None]
    scores = np.broadcast_to(np.where(visual, 1.0, 0.0), (1, L, K, T)).astype(np.float32)
    for keep, text in ((False, 0), (True, 5)):
        method = Custom(score="h2o", allocation="uniform", recent_ratio=0, keep_text=keep)
        method, limits = of_budget(method, "12tok")
        budgets, kept = plan(method, scores, None, m, visual, limits)
        assert budgets.tolist() == [[12] * L]
        assert np.asarray(kept)[..., 35:40].sum(-1).tolist() == [[[text] * K] * L]


def test_one_program_keeps_the_text_of_all_budgets_of_a_bucket():
    made = []

    @partial(jax.jit, static_argnums=0)
    def run(method, scores, measured, m, visual, limits):
        made.append(1)
        return method.plan(Observation(scores, measured), Prompt(m, visual, L, limits)).order

    _, *arrays = draw(0, "several")
    orders = []
    for budget in (0.31, 0.35, "17tok"):
        method, limits = of_budget(METHODS["vl-cache"], budget)
        orders.append(np.asarray(run(method, *arrays, limits)).tolist())
    assert len(made) == 1
    assert orders[0] != orders[1] != orders[2]


def uneven(prompt, sparsity):
    """Sizes of one's own in proportion to the sparsity, a NaN among them."""
    total = prompt.budget.shares(prompt.length) * prompt.length * prompt.layers
    sizes = total[:, None] * sparsity / jnp.sum(sparsity, axis=-1, keepdims=True)
    return jnp.where((prompt.length[:, None] == 7) & (jnp.arange(L) == 1), jnp.nan, sizes)


RULES = {
    "sparsity": lambda m, measured, limit: (
        numpy_methods.sparsity_shares(measured, limit, False) * m
    ),
    "uniform": lambda m, measured, limit: np.full(L, limit.even),
    "pyramid": lambda m, measured, limit: numpy_methods.pyramid(
        L, m, limit.even, min(32, max(1, limit.even // 2)), 20
    ),
    "own": lambda m, measured, limit: np.where(
        (m == 7) & (np.arange(L) == 1), 0, limit.alpha * m * L * measured / measured.sum()
    ),
}


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=st.sampled_from(["1tok", "5tok", "48tok", 0.01, 0.3, 0.6, 0.99]),
    share=st.sampled_from([0.25, 0.8, 1.0]),
    longest=st.sampled_from([1, 7, T]),
)
def test_a_share_of_the_budget_is_given_to_all_layers_alike(rule, seed, budget, share, longest):
    _, spoilt, measured, m, visual = draw(seed, "one picture")
    m[1] = longest
    allocation = uneven if rule == "own" else rule
    method = Custom(score="h2o", allocation=allocation, uniform_share=share)
    method, limits = of_budget(method, budget)
    budgets = np.asarray(plan(method, spoilt, measured, m, visual, limits)[0])
    for b in range(B):
        limit = numpy_methods.limits(budget, int(m[b]))
        sizes = RULES[rule](int(m[b]), measured[b], limit)
        sizes = share * limit.even + (1 - share) * sizes.astype(float)
        want = numpy_methods.whole(sizes.astype(np.float32), int(m[b]), limit)
        # A rounding of float32 decides between two layers, or which whole number a half becomes.
        assert np.abs(budgets[b] - want).max() <= 1
        assert abs(budgets[b].sum() - sum(want)) <= 1 - limit.exact
        if share == 1 or rule == "uniform":
            assert budgets[b].tolist() == [max(limit.even, limit.least)] * L
        alone = plan(method, spoilt[[b]], measured[[b]], m[[b]], visual[[b]], limits)[0]
        assert alone[0].tolist() == budgets[b].tolist()


def test_an_even_share_lies_between_the_rule_and_even_layers():
    """By the formula, in whole numbers: 9 of 10 tokens are even, what is left is the rule's."""

    def rule(prompt, sparsity):
        return jnp.array([[30.0, 0.0, 0.0]]) + 0 * sparsity

    method = Custom(score="h2o", allocation=rule, uniform_share=0.9)
    method, limits = of_budget(method, "10tok")
    scores, m = np.ones((1, L, K, T), np.float32), np.array([T], np.int32)
    budgets, _ = plan(
        method, scores, np.zeros((1, L), np.float32), m, np.zeros((1, T), bool), limits
    )
    assert budgets.tolist() == [[12, 9, 9]]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="uniform_share"):
        VLCache(uniform_share=share)
