"""Layer budgets against the formulas in plain numpy loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax.cache.allocate import (
    Budget,
    pyramid_sizes,
    sparsity_sizes,
    uniform_sizes,
    whole_sizes,
)

F = np.float32
BUDGETS = st.one_of(
    st.sampled_from([0.01, 0.05, 0.1, 0.37, 0.5, 0.99]).map(lambda share: Budget(share=share)),
    st.integers(1, 600).map(lambda tokens: Budget(tokens=tokens)),
)


def share_of(budget, m):
    return F(budget.share) if budget.share is not None else min(F(1), F(budget.tokens) / F(m))


def least(budget, m):
    lo = max(1, math.ceil(F(0.01) * F(m) - F(1e-4)))
    return lo if budget.tokens is None else min(lo, budget.tokens)


def numpy_whole(x, budget, m, bucket):
    """The integer rule, one token at a time."""
    layers, lo = len(x), least(budget, m)
    total = int(np.floor(F(sum_like_jax(x) + F(0.501))))
    total = min(layers * m, max(layers * lo, total), layers * budget.layer_rows(bucket))
    k = [min(max(int(np.floor(v)), lo), m) for v in x]
    while sum(k) < total:
        rest = [F(v - F(n)) if n < m else -np.inf for v, n in zip(x, k, strict=True)]
        k[rest.index(max(rest))] += 1
    while sum(k) > total:
        rest = [F(v - F(n)) if n > lo else np.inf for v, n in zip(x, k, strict=True)]
        k[rest.index(min(rest))] -= 1
    return k


def sum_like_jax(x):
    """Float32 sums depend on their order: take the one that is used."""
    return np.asarray(jnp.sum(jnp.asarray(x, jnp.float32)))


@settings(max_examples=60, deadline=None)
@given(
    budget=BUDGETS,
    m=st.integers(1, 700),
    extra=st.integers(0, 300),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["mixed", "dense and sparse", "equal", "all sparse"]),
)
def test_sparsity_budgets(budget, m, extra, seed, kind):
    layers = 6
    rng = np.random.default_rng(seed)
    gamma = {
        "mixed": rng.uniform(0.2, 0.99, layers),
        "dense and sparse": np.where(np.arange(layers) < 2, 0.1, 0.9999),
        "equal": np.full(layers, 0.9),
        "all sparse": np.ones(layers),
    }[kind].astype(F)
    beta, sizes = sparsity_sizes(jnp.asarray(gamma)[None], budget, jnp.array([m]))
    dense = F(1) - gamma
    part = dense / dense.sum() if dense.sum() > 0 else np.full(layers, F(1) / layers)
    expected = np.clip(part * share_of(budget, m) * layers, 0.01, 1)
    np.testing.assert_allclose(beta[0], expected, rtol=1e-5)
    ours = np.asarray(whole_sizes(sizes, budget, jnp.array([m]), m + extra))[0]
    assert ours.tolist() == numpy_whole(np.asarray(sizes)[0], budget, m, m + extra)
    bounds(ours, budget, m, m + extra)


def bounds(k, budget, m, bucket):
    assert (k >= 1).all()
    assert (k <= m).all()
    assert k.sum() <= len(k) * budget.layer_rows(bucket)


@settings(max_examples=60, deadline=None)
@given(
    budget=BUDGETS,
    m=st.integers(1, 900),
    extra=st.integers(0, 200),
    layers=st.sampled_from([1, 2, 7, 40]),
)
def test_uniform_and_pyramid(budget, m, extra, layers):
    lengths = jnp.array([m])
    even = min(max(1, int(np.floor(share_of(budget, m) * F(m) + F(0.5)))), m)
    k = np.asarray(whole_sizes(uniform_sizes(budget, lengths, layers), budget, lengths, m + extra))[
        0
    ]
    assert k.tolist() == [max(even, least(budget, m))] * layers

    w = min(32, max(1, even // 2))
    rest = even - w
    low = rest // 20
    high = 2 * rest - low
    if high > m - w:
        high = m - w
        low = 2 * rest - high
    expected = [high - i * (high - low) / (layers - 1) + w for i in range(layers) if layers > 1]
    sizes = np.asarray(pyramid_sizes(budget, lengths, layers))[0]
    np.testing.assert_allclose(sizes, expected or [even], rtol=1e-5, atol=1e-3)
    k = np.asarray(whole_sizes(jnp.asarray(sizes)[None], budget, lengths, m + extra))[0]
    assert k.tolist() == numpy_whole(sizes, budget, m, m + extra)
    assert (np.diff(k) <= 0).all()
    bounds(k, budget, m, m + extra)


def test_rows_of_a_batch_are_allocated_alone():
    m = jnp.array([40, 700, 1])
    gamma = jnp.asarray(np.random.default_rng(0).uniform(0.2, 0.99, (3, 5)), jnp.float32)
    budget = Budget(share=0.1)
    together = whole_sizes(sparsity_sizes(gamma, budget, m)[1], budget, m, 700)
    for row in range(3):
        own = slice(row, row + 1)
        alone = whole_sizes(sparsity_sizes(gamma[own], budget, m[own])[1], budget, m[own], 700)
        assert alone.tolist() == together[own].tolist()


def test_one_program_serves_every_sparsity_and_length():
    traces = []

    @jax.jit
    def run(gamma, m):
        traces.append(1)
        budget = Budget(share=0.1)
        return whole_sizes(sparsity_sizes(gamma, budget, m)[1], budget, m, 512)

    rng = np.random.default_rng(1)
    for _ in range(5):
        gamma = jnp.asarray(rng.uniform(0, 1, (2, 8)), jnp.float32)
        run(gamma, jnp.asarray(rng.integers(1, 512, 2), jnp.int32))
    assert len(traces) == 1


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_renormalised_betas_add_up_to_the_budget(share):
    gamma = jnp.array([[0.1, 0.2, 0.999, 0.9999, 0.95, 0.9]], jnp.float32)
    budget, m = Budget(share=share), jnp.array([1000])
    plain, _ = sparsity_sizes(gamma, budget, m)
    beta, _ = sparsity_sizes(gamma, budget, m, renormalize=True)
    assert float(beta.sum()) == pytest.approx(share * 6, rel=1e-4)
    assert float(beta.min()) >= 0.01 - 1e-6
    assert float(beta.max()) <= 1
    assert float(plain.sum()) != pytest.approx(share * 6, rel=1e-3)


def test_the_floor_and_the_ceiling_bind():
    gamma = jnp.array([[0.0, 0.99999, 0.99999, 0.99999]], jnp.float32)
    beta, _ = sparsity_sizes(gamma, Budget(share=0.5), jnp.array([1000]))
    np.testing.assert_allclose(beta[0], [1, 0.01, 0.01, 0.01], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("0.1", Budget(share=0.1)), (0.25, Budget(share=0.25)), ("256tok", Budget(tokens=256))],
)
def test_budgets_are_read(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "tok", "0", "-1", "0tok", "nan", "10%", "1.5tok", "inf"])
def test_bad_budgets_are_refused(text):
    with pytest.raises(ValueError, match="share"):
        Budget.parse(text)


def test_a_budget_is_one_of_two_things():
    assert Budget(share=1.0).keeps_all
    assert not Budget(tokens=10**9).keeps_all
    for wrong in ({}, {"share": 0.1, "tokens": 5}):
        with pytest.raises(ValueError, match="either"):
            Budget(**wrong)
