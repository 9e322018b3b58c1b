"""Settings of the draw, as data, against transformers; what random numbers depend on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sample_tokens import sample_tokens
from vlcache_jax.running.sampling import Draws, Sampling


@partial(jax.jit, static_argnames="backend")
def draw(draws, logits, step, backend=None):
    return draws.sample(logits, draws.uniform(step), backend)


SETTINGS = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.7, top_k=5),
    Sampling(1.3, top_p=0.8),
    Sampling(0.6, top_k=12, top_p=0.6),
    Sampling(2.0, top_k=1),
    Sampling(1.0, top_k=1000, top_p=1e-6),
]


def both(*draws):
    """Sequences with settings of their own in one batch."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *draws)


@pytest.mark.parametrize("sampling", SETTINGS[1:])
def test_every_token_that_transformers_leaves_is_drawn_in_its_share(sampling):
    torch = pytest.importorskip("torch")
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng(5).normal(0, 2, (1, 40)).astype(np.float32)
    warpers = LogitsProcessorList([theirs.TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        warpers.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(sampling.top_p))
    warped = warpers(torch.zeros((1, 0), dtype=torch.long), torch.tensor(logits))  # pyright: ignore
    chance = torch.softmax(warped[0].double(), 0).numpy()
    kept = np.flatnonzero(chance)
    ends = np.cumsum(chance[kept])
    begins = ends - chance[kept]
    draws = Draws.of(sampling, 0, range(len(kept)))
    settings = draws.temperature, draws.top_k, draws.top_p
    rows = jnp.tile(logits, (len(kept), 1))
    for share in (0.001, 0.5, 0.999):
        uniform = jnp.asarray(begins + share * chance[kept], jnp.float32)
        assert sample_tokens(rows, *settings, uniform).tolist() == kept.tolist()


def test_greedy_takes_the_lower_of_equal_ids():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    assert draw(Draws.of(Sampling(), 0, [0, 1]), logits, jnp.zeros(2, int)).tolist() == [1, 0]


def test_frequencies_follow_the_softmax_of_logits_over_temperature():
    logits = jnp.array([0.0, 1.0, 2.0, -1.0])
    expected = np.exp(np.asarray(logits) / 0.7)
    requests, steps = np.divmod(np.arange(20000), 100)
    draws = Draws.of(Sampling(temperature=0.7), 1, requests)
    tokens = draw(draws, jnp.broadcast_to(logits, (20000, 4)), steps)
    seen = np.bincount(np.asarray(tokens), minlength=4) / 20000
    assert np.abs(seen - expected / expected.sum()).max() < 0.015


def test_a_tiny_top_p_is_greedy():
    logits = jax.random.normal(jax.random.key(2), (5, 100))
    drawn = draw(Draws.of(Sampling(1.0, top_p=1e-6), 3, range(5)), logits, jnp.arange(5))
    assert drawn.tolist() == jnp.argmax(logits, -1).tolist()


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_one_program_serves_all_settings_and_a_sequence_does_not_feel_its_neighbours(backend):
    logits = jax.random.normal(jax.random.key(4), (len(SETTINGS), 100))
    steps = np.arange(len(SETTINGS), dtype=np.int32)
    each = [Draws.of(sampling, 8, [i]) for i, sampling in enumerate(SETTINGS)]
    together = draw(both(*each), logits, steps, backend=backend).tolist()
    again = draw(both(*each[::-1]), logits[::-1], steps[::-1], backend=backend)
    assert again[::-1].tolist() == together
    for i, draws in enumerate(each):
        alone = draw(draws, logits[i : i + 1], steps[i : i + 1], backend=backend)
        assert alone.tolist() == together[i : i + 1]


def test_random_numbers_are_of_seed_request_and_step():
    draws = both(Draws.of(Sampling(1.0), 1, [0, 1, 2]), Draws.of(Sampling(1.0), 2, [0, 1, 2]))
    numbers = np.stack([draws.uniform(jnp.full(6, step)) for step in range(5)])
    assert numbers.dtype == np.float32
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(np.unique(numbers)) == numbers.size
    alone = Draws.of(Sampling(), 2, [1]).uniform(jnp.array([3]))
    assert alone.tolist() == [numbers[3, 4]]
    steps = jnp.arange(5) + jnp.zeros((6, 1), int)  # of a whole chunk at once
    assert (jax.vmap(draws.uniform, 1)(steps) == numbers).all()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63 + 5, -(2**70)])
def test_a_seed_is_any_integer_modulo_2_to_the_32(seed):
    (one, same), step = (Draws.of(Sampling(), s, [7]) for s in (seed, seed % 2**32)), jnp.array([0])
    assert one.seed.dtype == np.uint32
    assert one.uniform(step) == same.uniform(step)


def test_settings_become_data_of_fixed_types_within_their_range():
    draws = Draws.of(Sampling(1e300, top_k=2**40), 0, [3, 4])
    assert [leaf.dtype for leaf in jax.tree.leaves(draws)] == [
        *("float32", "int32", "float32", "uint32", "int32")
    ]
    assert draws.temperature.tolist() == [np.finfo(np.float32).max] * 2
    assert draws.top_k.tolist() == [2**31 - 1] * 2
    assert draws.request.tolist() == [3, 4]
    assert Draws.of(Sampling(1e-300), 0, [0]).temperature == 0
    assert Draws.of(Sampling(), 0, [0]).top_k == 0


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
