"""Ranking and compaction against plain numpy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax.cache.compact import compact
from vlcache_jax.cache.select import kept_rows, rank_rows, recent_rows

B, L, K, T, H = 3, 4, 2, 24, 5
NONE = jnp.zeros((B, L), jnp.int32)


def draw(seed, ties=False):
    rng = np.random.default_rng(seed)
    scores = rng.random((B, L, K, T)).astype(np.float32)
    if ties:
        scores = np.round(scores * 3)
    m = rng.integers(1, T + 1, B).astype(np.int32)
    budgets = rng.integers(1, m[:, None] + 1, (B, L)).astype(np.int32)
    return scores, m, budgets


def numpy_kept(scores, m, budget, recent):
    """The kept positions of one head: the last ones, then the best, the lower of equal ones."""
    last = list(range(m - recent, m))
    others = sorted(range(m - recent), key=lambda j: (-scores[j], j))
    return set(last + others[: budget - recent])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
    ratio=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    shared=st.booleans(),
)
def test_kept_sets(seed, ties, ratio, shared):
    scores, m, budgets = draw(seed, ties)
    poisoned = np.where(np.arange(T) < m[:, None, None, None], scores, np.nan)
    recent = recent_rows(jnp.asarray(budgets), ratio)
    assert recent.tolist() == np.floor(ratio * budgets + 1e-6).astype(int).tolist()
    if shared:
        poisoned = poisoned.sum(2, keepdims=True)
    order = rank_rows(jnp.asarray(poisoned), 0 * recent, recent, jnp.asarray(m))
    assert (np.sort(order, axis=-1) == np.arange(T)).all()
    order = jnp.broadcast_to(order, (B, L, K, T))
    kept = np.asarray(kept_rows(order, jnp.asarray(budgets)))
    for b in range(B):
        for layer in range(L):
            for head in range(K):
                own = scores[b, layer].sum(0) if shared else scores[b, layer, head]
                expected = numpy_kept(own, m[b], budgets[b, layer], int(recent[b, layer]))
                assert set(np.flatnonzero(kept[b, layer, head])) == expected


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), sinks=st.integers(0, 5), ends=st.integers(0, 5))
def test_first_and_last_rows_are_kept_whatever_their_score(seed, sinks, ends):
    scores, m, budgets = draw(seed)
    first = np.minimum(sinks, budgets // 2)
    last = np.minimum(ends, budgets - first)
    order = rank_rows(jnp.asarray(scores), jnp.asarray(first), jnp.asarray(last), jnp.asarray(m))
    kept = np.asarray(kept_rows(order, jnp.asarray(budgets)))
    for b, layer, head in np.ndindex(B, L, K):
        own = kept[b, layer, head]
        assert own[: first[b, layer]].all()
        assert own[m[b] - last[b, layer] : m[b]].all()
        assert own.sum() == budgets[b, layer]


def test_scores_that_are_no_numbers_rank_inside_the_prompt():
    """Kept always, then +inf, numbers, -inf, NaN, then what stands beyond the prompt's end."""
    nan, inf = np.nan, np.inf
    scores = np.array([nan, 1.0, -inf, inf, 0.0, nan, 2.0, inf, -1.0, nan, inf, nan], np.float32)
    m, first, last = 10, 1, 2  # beyond the end stand +inf and NaN
    order = rank_rows(
        jnp.asarray(scores).reshape(1, 1, 1, -1),
        jnp.full((1, 1), first),
        jnp.full((1, 1), last),
        jnp.array([m]),
    )
    assert order[0, 0, 0].tolist() == [0, 8, 9, 3, 7, 6, 1, 4, 2, 5, 10, 11]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), sinks=st.integers(0, 3), ends=st.integers(0, 5))
def test_any_scores_are_ranked_as_in_plain_python(seed, sinks, ends):
    scores, m, budgets = draw(seed)
    rng = np.random.default_rng(seed)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], np.float32)
    scores = np.where(rng.random(scores.shape) < 0.7, rng.choice(special, scores.shape), scores)
    first = np.minimum(sinks, budgets // 2)
    last = np.minimum(ends, budgets - first)
    order = rank_rows(*map(jnp.asarray, (scores, first, last, m)))

    def place(score, position, b, layer):
        always = position < first[b, layer] or position >= m[b] - last[b, layer]
        if position >= m[b] or always:
            return (3 if position >= m[b] else 0), 0, position
        return (2, 0, position) if np.isnan(score) else (1, -score, position)

    for b, layer, head in np.ndindex(B, L, K):
        own = scores[b, layer, head]
        want = sorted(range(T), key=lambda j: place(own[j], j, b, layer))
        assert np.asarray(order)[b, layer, head].tolist() == want


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.int32])
def test_scores_of_any_type_are_ranked(kind):
    scores, m, _ = draw(3, ties=True)
    plain, other = (rank_rows(jnp.asarray(x), NONE, NONE, jnp.asarray(m))
                    for x in (scores, scores.astype(kind)))  # fmt: skip
    assert (plain == other).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), spare=st.sampled_from([0, 9]))
def test_compaction_gathers_the_kept_rows(seed, spare):
    check_compaction(seed, L * T + spare)


@pytest.mark.parametrize("seed", [0, 1])
def test_compaction_into_a_pool_without_a_spare_row(seed):
    check_compaction(seed, int(draw(seed)[2].sum(-1).max()))


def check_compaction(seed, capacity):
    scores, m, budgets = draw(seed)
    rng = np.random.default_rng(seed)
    k, v = (rng.random((B, K, L * T + 7, H)).astype(np.float32) for _ in range(2))
    order = rank_rows(jnp.asarray(scores), NONE, NONE, jnp.asarray(m))
    visual = jnp.ones((B, L))
    pool = compact(jnp.asarray(k), jnp.asarray(v), order, jnp.asarray(budgets), visual, capacity)
    assert pool.k.shape == pool.v.shape == (B, K, capacity, H)
    assert pool.length.tolist() == budgets.tolist()
    for b in range(B):
        at = 0
        for layer in range(L):
            assert int(pool.offset[b, layer]) == at
            n = budgets[b, layer]
            for head in range(K):
                rows = layer * T + np.asarray(order)[b, layer, head, :n]
                np.testing.assert_array_equal(pool.k[b, head, at : at + n], k[b, head, rows])
                np.testing.assert_array_equal(pool.v[b, head, at : at + n], v[b, head, rows])
            at += n


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_kept_sets_grow_with_the_budget(seed, ties):
    scores, m, _ = draw(seed, ties)
    order = rank_rows(jnp.asarray(scores), NONE, NONE, jnp.asarray(m))
    before = np.zeros((B, L, K, T), bool)
    for budget in range(1, int(m.min()) + 1):
        kept = np.asarray(kept_rows(order, jnp.full((B, L), budget)))
        assert (kept >= before).all()
        assert (kept.sum(-1) == budget).all()
        before = kept


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), ties=st.booleans(), heads=st.permutations(range(K)))
def test_heads_are_ranked_alone(seed, ties, heads):
    scores, m, _ = draw(seed, ties)
    recent = jnp.ones((B, L), jnp.int32)
    order = np.asarray(rank_rows(jnp.asarray(scores), NONE, recent, jnp.asarray(m)))
    permuted = rank_rows(jnp.asarray(scores[:, :, heads]), NONE, recent, jnp.asarray(m))
    np.testing.assert_array_equal(order[:, :, heads], permuted)


@pytest.mark.parametrize("pair", [(0, 1), (1, 2)])
def test_one_program_serves_every_budget_vector(pair):
    traces = []

    @jax.jit
    def run(k, scores, m, budgets):
        traces.append(1)
        order = rank_rows(scores, NONE, recent_rows(budgets, 0.1), m)
        return compact(k, k, order, budgets, jnp.ones((B, L)), L * T)

    for seed in pair:
        scores, m, budgets = draw(seed)
        run(jnp.ones((B, K, L * T, H)), jnp.asarray(scores), jnp.asarray(m), jnp.asarray(budgets))
    assert len(traces) == 1
