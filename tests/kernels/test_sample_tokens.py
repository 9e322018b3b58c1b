"""The draw of a token, every backend against float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.sample_tokens import reference, sample_tokens, triton
from pallas_kernels.tuning import RowConfig
from tests.kernels.cases import both_backends, compiled, covering

RUN = {
    "xla": functools.partial(compiled(sample_tokens, "backend"), backend="xla"),
    # Blocks of 512 ids, so that there is more than one.
    "triton": functools.partial(compiled(triton.sample_tokens, "config"), config=RowConfig(1)),
}
BELOW_ONE = 1 - 2**-24
INF, NAN = np.inf, np.nan


def arguments(
    logits, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, uniform: Any = 0.0
) -> Any:
    """Arrays of what is said of all rows or of each."""
    logits = np.asarray(logits, np.float32)
    given = (temperature, np.float32), (top_k, np.int32), (top_p, np.float32), (uniform, np.float32)
    return logits, *(np.broadcast_to(np.asarray(x, dtype), len(logits)) for x, dtype in given)


def drawn(backend, *args, **settings):
    tokens = RUN[backend](*arguments(*args, **settings))
    assert tokens.dtype == jnp.int32
    return np.asarray(tokens)


@functools.cache
def random_logits(kind, rows, vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(0, 2, (rows, vocabulary)).astype(np.float32)
    if kind == "tied":
        logits = np.round(logits)
    elif kind == "some -inf":
        logits[rng.random(logits.shape) < 0.4] = -INF
    return logits


@both_backends
@covering("sample_tokens")
def test_against_the_reference(case, backend):
    kind, vocabulary, top_k, top_p, temperature = case
    logits = random_logits(kind, 24, vocabulary)
    uniform = np.append(np.random.default_rng(1).random(22), [0.0, BELOW_ONE])
    temperatures = np.full(24, temperature)
    temperatures[::5] = 0.0  # among the others
    top_k = {"all": vocabulary, "beyond": vocabulary + 9}.get(top_k, top_k)
    args = arguments(logits, temperatures, top_k, top_p, uniform)
    tokens = np.asarray(RUN[backend](*args))
    near = reference.near(*args)
    assert (tokens == near).any(0).all()
    sharp = (near == near[0]).all(0)
    assert sharp.sum() >= 20
    assert (tokens[sharp] == near[0, sharp]).all()


@both_backends
@settings(max_examples=40, deadline=None)
@given(
    logits=st.lists(st.floats(-40, 40, width=16), min_size=6, max_size=6),
    temperature=st.floats(0.05, 100),
    top_k=st.integers(0, 8),
    top_p=st.floats(0.01, 1),
    uniform=st.floats(0, BELOW_ONE),
)
def test_any_settings(backend, logits, **settings):
    args = arguments([logits], **settings)
    assert RUN[backend](*args)[0] in reference.near(*args)


@both_backends
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.5, 3e38, INF, -INF, NAN]), min_size=6))
def test_greedy_is_argmax_whatever_the_logits(backend, logits):
    logits = np.array([logits[:6]], np.float32)
    assert drawn(backend, logits, 0.0, 2, 0.5, 0.9) == jnp.argmax(logits, -1)


@both_backends
@pytest.mark.parametrize(
    ("logits", "temperature"),
    [
        ([1.0, 5.0, 5.0], 1e-38),  # logits / temperature overflow
        ([-5.0, -1.0, -1.0], 1e-38),
        ([0.0, 0.0, -1.0], 1e-40),
        ([3e38, 3e38, 0.0], 0.5),
        ([0.0, INF, INF], 1.0),
        ([0.0, NAN, INF, NAN], 1.0),
        ([-INF, -INF, -INF], 1.0),
    ],
)
def test_what_has_no_softmax_is_greedy(backend, logits, temperature):
    assert drawn(backend, [logits], temperature, uniform=0.99) == jnp.argmax(jnp.array(logits))


@both_backends
def test_a_tiny_temperature_or_top_p_and_a_top_k_of_one_are_greedy(backend):
    logits = random_logits("normal", 24, 1301)
    expected = np.argmax(logits, -1).tolist()
    for change in ({"temperature": 1e-6}, {"top_p": 1e-38}, {"top_p": 0.0}, {"top_k": 1}):
        assert drawn(backend, logits, uniform=0.999, **change).tolist() == expected


@both_backends
@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, [0, 1, 3, 4, 6]),  # -inf is left out
        ({"top_k": 1}, [1, 4]),
        ({"top_k": 3}, [1, 3, 4, 6]),
        ({"top_p": 0.1}, [1]),  # 1 and 4 together have 0.70
        ({"top_p": 0.5}, [1, 4]),
        ({"top_p": 0.8}, [1, 3, 4]),
        ({"top_p": 0.9}, [1, 3, 4, 6]),
        ({"top_k": 2, "top_p": 0.9}, [1, 4]),
        ({"top_k": 6}, [0, 1, 3, 4, 6]),
    ],
)
def test_equals_at_a_border_stay_by_its_rule_and_all_that_stays_is_drawn(backend, change, kept):
    logits = np.array([0.0, 2.0, -INF, 1.0, 2.0, -INF, 1.0, -INF])
    uniform = np.append((np.arange(510) + 0.5) / 510, [0.0, BELOW_ONE])
    tokens = drawn(backend, np.tile(logits, (512, 1)), uniform=uniform, **change)
    chance = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
    assert np.abs(np.bincount(tokens, minlength=8)[kept] - 510 * chance).max() < 2.1
    assert set(tokens) == set(kept)
    assert (np.diff(tokens[:-2]) >= 0).all()  # in the order of ids
    assert tokens[-2:].tolist() == [kept[0], kept[-1]]


@both_backends
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -3.0, 1e-45])
@pytest.mark.parametrize("vocabulary", [1, 7, 1301])
def test_of_equals_the_top_p_keeps_the_fewest_with_the_lower_ids(vocabulary, value, backend):
    for top_p in (0.05, 0.25, 0.5, 0.999):
        kept = int(np.ceil(np.float32(top_p) * np.float32(vocabulary)))
        uniform = np.array([0.0, 0.5, BELOW_ONE])
        tokens = drawn(backend, np.full((3, vocabulary), value), top_p=top_p, uniform=uniform)
        assert tokens.tolist() == [0, kept // 2, kept - 1]


@both_backends
def test_a_token_begins_where_the_ones_before_it_end(backend):
    """With exact sums: a uniform that is reached is not exceeded."""
    tokens = drawn(backend, np.zeros((8, 8)), uniform=np.arange(8) / 8)
    assert tokens.tolist() == list(range(8))


@both_backends
@pytest.mark.parametrize("temperature", [1e38, 3.4e38, INF])
def test_a_huge_temperature_draws_all_but_minus_infinity_alike(backend, temperature):
    logits = np.tile([-INF, 5.0, -9.0, -INF, 0.0, 1.0], (4, 1))
    for change in ({}, {"top_k": 5}, {"top_p": 0.999}):
        tokens = drawn(backend, logits, temperature, uniform=np.arange(4) / 4, **change)
        assert tokens.tolist() == [1, 2, 4, 5]


@both_backends
def test_the_lower_of_equal_ids_in_different_blocks_is_greedy(backend):
    logits = np.zeros((1, 1301))
    logits[0, [7, 7 + 512, 7 + 1024, 900]] = 3.0
    assert drawn(backend, logits, 0.0) == 7
    logits[0, 7] = 0.0
    assert drawn(backend, logits, 0.0) == 7 + 512


@both_backends
def test_a_row_does_not_depend_on_the_others(backend):
    rows = random_logits("normal", 24, 1301)
    rng = np.random.default_rng(3)
    temperature, top_k, top_p = (
        rng.choice(x, 24) for x in ([0.0, 0.5, 1.0], [0, 3, 50], [0.4, 1.0])
    )
    args = arguments(rows, temperature, top_k, top_p, rng.random(24))
    together = np.asarray(RUN[backend](*args))
    order = rng.permutation(24)
    assert (np.asarray(RUN[backend](*(x[order] for x in args))) == together[order]).all()
    for alone in range(5):
        own = RUN[backend](*(x[alone : alone + 1] for x in args))
        assert own[0] == together[alone]


def test_no_sampled_row_no_work_but_an_argmax():
    args = arguments(np.zeros((2, 9)))
    jaxpr = jax.make_jaxpr(functools.partial(sample_tokens, backend="xla"))(*args)
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert names.count("cond") == 1
    assert not {"exp", "while", "reduce_sum", "cumsum", "sort"} & set(names)
    assert " while" in str(jaxpr)


def test_the_kernel_is_one_launch():
    args = arguments(np.zeros((2, 9)))
    jaxpr = jax.make_jaxpr(functools.partial(sample_tokens, backend="triton"))(*args)
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["pallas_call"]


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, jnp.zeros((2, 3, 4)), "expected"),
        (1, jnp.zeros(3), "expected"),
        (2, jnp.zeros((), jnp.int32), "expected"),
        (4, jnp.zeros((2, 1)), "expected"),
        (0, jnp.zeros((2, 4), jnp.bfloat16), "must be float32: cast"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(position, wrong, message):
    args = list(arguments(np.zeros((2, 4))))
    args[position] = wrong
    with pytest.raises(ValueError, match=message):
        sample_tokens(*args)
