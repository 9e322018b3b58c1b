"""Sampling against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax.sampling import Sampling, filter_logits, sample


def allowed(logits, top_k, top_p):
    """The tokens that may be drawn, in plain numpy: top-k first, then top-p of what is left."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    ranked = ranked[: top_k or len(ranked)]
    chances = np.exp(logits[ranked] - logits[ranked].max())
    chances /= chances.sum()
    kept, reached = [], 0.0
    for token, chance in zip(ranked, chances, strict=True):
        if top_p < 1 and reached >= top_p:
            break
        kept.append(token)
        reached += chance
    return set(kept)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 3, 17, 40]),  # few shapes: each is compiled
    top_k=st.one_of(st.none(), st.integers(1, 50)),
    top_p=st.sampled_from([0.05, 0.31, 0.77, 0.93, 1.0]),
)
def test_filter_keeps_what_the_formula_keeps(seed, size, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
    ours = np.asarray(filter_logits(jnp.asarray(logits)[None], Sampling(1.0, top_k, top_p)))[0]
    assert set(np.flatnonzero(np.isfinite(ours))) == allowed(logits, top_k, top_p)


def test_greedy_takes_the_lower_of_equal_ids():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    assert sample(logits, jax.random.key(0), Sampling()).tolist() == [1, 0]


def test_frequencies_follow_the_softmax_of_logits_over_temperature():
    logits = jnp.array([0.0, 1.0, 2.0, -1.0])
    draws = sample(
        jnp.broadcast_to(logits, (20000, 4)), jax.random.key(1), Sampling(temperature=0.7)
    )
    seen = np.bincount(np.asarray(draws), minlength=4) / 20000
    expected = np.exp(np.asarray(logits) / 0.7)
    assert np.abs(seen - expected / expected.sum()).max() < 0.015


def test_a_tiny_top_p_is_greedy():
    logits = jax.random.normal(jax.random.key(2), (5, 100))
    drawn = sample(logits, jax.random.key(3), Sampling(1.0, top_p=1e-6))
    assert drawn.tolist() == jnp.argmax(logits, -1).tolist()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)
