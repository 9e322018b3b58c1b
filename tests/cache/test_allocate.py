"""Layer budgets against the formulas in plain numpy loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache import numpy_methods
from vlcache_jax.cache import allocate as rules
from vlcache_jax.cache.allocate import Pyramid, Sparsity, Uniform
from vlcache_jax.cache.budget import Budget, Prompt

F = np.float32


@jax.jit
def run_allocate(sizes, limits, m):
    return rules.allocate(sizes, limits, m)


def allocate(sizes, budget, m):
    """Compiled, with a budget that is data."""
    return run_allocate(sizes, budget.data, m)


@partial(jax.jit, static_argnums=(0, 1))
def run_rule(rule, function, measured, limits, m, layers):
    prompt = Prompt(m, jnp.zeros((len(m), 1), bool), layers.shape[0], limits)
    return getattr(rule, function)(prompt, measured)


def sparsity_shares(gamma, budget, m, renormalize=False):
    rule, layers = Sparsity(renormalize=renormalize), jnp.zeros(gamma.shape[1])
    return run_rule(rule, "beta", gamma, budget.data, m, layers)


def uniform_sizes(budget, m, layers):
    return run_rule(Uniform(), "sizes", None, budget.data, m, jnp.zeros(layers))


def pyramid_sizes(budget, m, layers):
    return run_rule(Pyramid(), "sizes", None, budget.data, m, jnp.zeros(layers))


BUDGETS = st.one_of(
    st.sampled_from([0.01, 0.05, 0.1, 0.37, 0.5, 0.99]).map(lambda share: Budget(share=share)),
    st.sampled_from([1, 2, 7, 40, 333, 600]).map(lambda tokens: Budget(tokens=tokens)),
)


def limits_of(budget, m):
    return numpy_methods.limits(str(budget) if budget.share is None else budget.share, m)


def sizes_of(gamma, budget, m, **options):
    return sparsity_shares(gamma, budget, m, **options) * m[:, None].astype(F)


def numpy_whole(x, budget, m):
    """The integer rule, one token at a time."""
    limit, layers = limits_of(budget, m), len(x)
    if limit.alpha >= 1:
        return [m] * layers
    return numpy_methods.whole(np.asarray(x, F), m, limit, asked=sum_like_jax(x))


def sum_like_jax(x):
    """Float32 sums depend on their order: take the one that is used."""
    return F(jnp.sum(jnp.asarray(x, jnp.float32)))


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
    beta = sparsity_shares(jnp.asarray(gamma)[None], budget, jnp.array([m]))
    sizes = beta * F(m)
    expected = numpy_methods.sparsity_shares(gamma, limits_of(budget, m), renormalize=False)
    np.testing.assert_allclose(beta[0], expected, rtol=1e-5)
    ours = np.asarray(allocate(sizes, budget, jnp.array([m])))[0]
    assert ours.tolist() == numpy_whole(np.asarray(sizes)[0], budget, m)
    bounds(ours, budget, m, m + extra)


def bounds(k, budget, m, bucket):
    assert (k >= 1).all()
    assert (k <= m).all()
    assert k.sum() <= len(k) * limits_of(budget, m).most
    if budget.tokens is not None:
        assert k.sum() == len(k) * min(budget.tokens, m)
    assert k.sum() <= budget.capacity(len(k), bucket)


@pytest.mark.parametrize("layers", [1, 2, 7, 40])
@pytest.mark.parametrize("text", ["0.01", "0.1", "0.37", "0.99", "1tok", "40tok", "600tok"])
def test_uniform_and_pyramid(text, layers):
    budget = Budget.parse(text)
    lengths = np.concatenate([np.arange(1, 12), np.random.default_rng(layers).integers(12, 900, 9)])
    m = jnp.asarray(lengths)
    sizes = np.asarray(uniform_sizes(budget, m, layers))
    uniform = np.asarray(allocate(sizes, budget, m))
    falling = np.asarray(pyramid_sizes(budget, m, layers))
    pyramid = np.asarray(allocate(falling, budget, m))
    for row, length in enumerate(lengths.tolist()):
        limit = limits_of(budget, length)
        even = limit.even
        assert uniform[row].tolist() == [max(even, limit.least)] * layers

        w = min(32, max(1, even // 2))
        rest = even - w
        low = rest // 20
        high = 2 * rest - low
        if high > length - w:
            high = length - w
            low = 2 * rest - high
        expected = [high - i * (high - low) / (layers - 1) + w for i in range(layers) if layers > 1]
        np.testing.assert_allclose(falling[row], expected or [even], rtol=1e-5, atol=1e-3)
        assert pyramid[row].tolist() == numpy_whole(falling[row], budget, length)
        assert (np.diff(pyramid[row]) <= 0).all()
        bounds(pyramid[row], budget, length, 900)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), m=st.integers(1, 60), layers=st.sampled_from([1, 2, 6]))
def test_any_sizes_become_whole_ones(data, m, layers):
    """Sizes of a user's own: below the floor, above the prompt, all alike."""
    # In steps of 1 / 256 every difference and sum is exact: else a rounding decides between two.
    size = st.one_of(st.integers(0, 512 * m).map(lambda n: n / 256), st.integers(0, m).map(float))
    sizes = np.array(data.draw(st.lists(size, min_size=layers, max_size=layers)), F)
    budget = data.draw(BUDGETS)
    k = np.asarray(allocate(jnp.asarray(sizes)[None], budget, jnp.array([m])))[0]
    if budget.tokens is None:  # else they are scaled, and rounded by that
        assert k.tolist() == numpy_whole(sizes, budget, m)
    assert np.abs(k - numpy_whole(sizes, budget, m)).max() <= 1
    bounds(k, budget, m, m)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), m=st.integers(1, 60), layers=st.sampled_from([1, 2, 6]))
def test_sizes_that_float32_rounds_add_up_as_well(data, m, layers):
    """Which of two layers gains a token may be a rounding's choice; how many there are is not."""
    size = st.floats(float(F(1e-30)), 2 * m, width=32)
    sizes = np.array(data.draw(st.lists(size, min_size=layers, max_size=layers)), F)
    budget = data.draw(BUDGETS)
    k = np.asarray(allocate(jnp.asarray(sizes)[None], budget, jnp.array([m])))[0]
    expected = numpy_whole(sizes, budget, m)
    assert k.sum() == sum(expected)
    assert np.abs(k - expected).max() <= 1
    bounds(k, budget, m, m)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1, 1 / 3, 0.5, 0.98, 0.99, 0.9999])
def test_no_length_of_a_bucket_is_given_more_than_its_pool_holds(share):
    budgets = [Budget(share=share), Budget(tokens=max(1, int(1000 * share)))]
    m = np.arange(1, 131073)
    for budget in budgets:
        rows = np.asarray(budget.data.most(jnp.asarray(m)))
        assert (rows >= 1).all()
        assert (np.diff(rows) >= 0).all()
        assert (rows <= [budget.layer_rows(int(n)) for n in m]).all()


def test_rows_of_a_batch_are_allocated_alone():
    m = jnp.array([40, 700, 1])
    gamma = jnp.asarray(np.random.default_rng(0).uniform(0.2, 0.99, (3, 5)), jnp.float32)
    budget = Budget(share=0.1)
    together = allocate(sizes_of(gamma, budget, m), budget, m)
    for row in range(3):
        own = slice(row, row + 1)
        alone = allocate(sizes_of(gamma[own], budget, m[own]), budget, m[own])
        assert alone.tolist() == together[own].tolist()


def test_one_program_serves_every_sparsity_and_length():
    traces = []

    @jax.jit
    def run(gamma, m):
        traces.append(1)
        budget = Budget(share=0.1)
        return allocate(sizes_of(gamma, budget, m), budget, m)

    rng = np.random.default_rng(1)
    for _ in range(5):
        gamma = jnp.asarray(rng.uniform(0, 1, (2, 8)), jnp.float32)
        run(gamma, jnp.asarray(rng.integers(1, 512, 2), jnp.int32))
    assert len(traces) == 1


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_renormalised_betas_add_up_to_the_budget(share):
    gamma = jnp.array([[0.1, 0.2, 0.999, 0.9999, 0.95, 0.9]], jnp.float32)
    budget, m = Budget(share=share), jnp.array([1000])
    plain = sparsity_shares(gamma, budget, m)
    beta = sparsity_shares(gamma, budget, m, renormalize=True)
    assert float(beta.sum()) == pytest.approx(share * 6, rel=1e-4)
    assert float(beta.min()) >= 0.01 - 1e-6
    assert float(beta.max()) <= 1
    assert float(plain.sum()) != pytest.approx(share * 6, rel=1e-3)


def test_the_floor_and_the_ceiling_bind():
    gamma = jnp.array([[0.0, 0.99999, 0.99999, 0.99999]], jnp.float32)
    beta = sparsity_shares(gamma, Budget(share=0.5), jnp.array([1000]))
    np.testing.assert_allclose(beta[0], [1, 0.01, 0.01, 0.01], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("0.1", Budget(share=0.1)), (0.25, Budget(share=0.25)), ("256tok", Budget(tokens=256))],
)
def test_budgets_are_read(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("budget", [Budget(share=0.1), Budget(tokens=7), Budget(share=1 / 3)])
def test_budgets_are_written_as_they_are_read(budget):
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text", ["", "tok", "0", "-1", "0tok", "nan", "10%", "1.5tok", "inf", True, None, [0.1]]
)
def test_bad_budgets_are_refused(text):
    with pytest.raises(ValueError, match=r"share|tokens"):
        Budget.parse(text)


def test_a_budget_is_one_of_two_things():
    assert Budget(share=1.0).keeps_all
    assert not Budget(tokens=10**9).keeps_all
    for wrong in ({}, {"share": 0.1, "tokens": 5}):
        with pytest.raises(ValueError, match="either"):
            Budget(**wrong)
