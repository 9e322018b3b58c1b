"""The full cache's answer, fed to other caches: equal to feeding it token by token."""

import jax
import numpy as np
import pytest

import vlcache_jax
from tests.test_settings import untyped
from vlcache_jax import AKVQ, H2O, FullCache, Generate, SnapKV, VLCache, evaluation
from vlcache_jax.cache.methods import as_method
from vlcache_jax.cache.quantizers import KIVI, RTN
from vlcache_jax.evaluation import Replayed, Replays, evaluate, ratio_interval, summarise
from vlcache_jax.results.answer import same_tokens

METHODS = {
    "vl-cache 0.1": VLCache(0.1),
    "vl-cache 0.5": VLCache(0.5),
    "h2o 0.1": H2O(0.1),
    "h2o 0.5": H2O(0.5),
    "snapkv 0.1": SnapKV(0.1),
    "snapkv 9tok": SnapKV("9tok"),
    "akvq": as_method(AKVQ()),
    "h2o kivi": H2O(0.5, quantize=KIVI(group=16, residual=4)),
    "rtn": as_method(RTN(bits=2, residual=3)),
    "full": FullCache(),
}
TEXTS = ["what?", "a longer question: " + "words " * 20, "and this?"]
CONTEXTS = ["A lamp and a chair. " * 9, None, "One. Two. " * 20]
STEPS = 20


@pytest.fixture(scope="module")
def vlm(text_dir):
    found = vlcache_jax.load(text_dir)
    found.stop_ids = ()
    return found


@pytest.fixture(scope="module")
def replayed(vlm):
    """The answers to a batch of unequal prompts, and what every method made of them."""
    inputs = vlm.processor(None, TEXTS, context=CONTEXTS)
    assert np.unique(inputs.length).size == 3
    return inputs, *Replays(vlm, METHODS, STEPS).run(inputs)


def stepwise(vlm, inputs, method, fed):
    """Logits behind each token that is fed, one step after the other, float64 [B, R, V]."""
    generate = Generate(vlm.config, method.for_model(vlm.config.text), STEPS)
    stages, settings = generate.stages, generate.settings(len(fed))
    params = vlm.folded if generate.cache.transforms else vlm.params
    pool, state, _ = jax.jit(stages.begin)(params, inputs, settings)
    step, spill = jax.jit(stages.decode_step), jax.jit(stages.spill)
    found = []
    for index, tokens in enumerate(fed.T):
        if stages.residual and index % stages.chunk_steps == 0:
            pool, state = spill(pool, state)
        state = jax.tree.map(lambda x: x, state)
        state = type(state)(**vars(state) | {"token": jax.numpy.asarray(tokens)})
        state, logits = step(params, pool, state)
        found.append(np.asarray(logits, np.float64))
    return np.stack(found, axis=1)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def full(vlm, replayed):
    inputs, said, _ = replayed
    return stepwise(vlm, inputs, FullCache(), np.asarray(said.fed).T[:, : STEPS - 1])


@pytest.mark.parametrize("name", METHODS)
def test_replay_equals_step_by_step_decoding(vlm, replayed, full, name):
    inputs, said, found = replayed
    fed = np.asarray(said.fed).T[:, : STEPS - 1]
    logits = stepwise(vlm, inputs, METHODS[name], fed)
    given, own = log_softmax(full), log_softmax(logits)
    kl = (np.exp(given) * (given - own)).sum(axis=-1)
    if name not in ("full", "akvq"):
        assert kl.mean() > 1e-3  # there is something to compare
    for row, each in enumerate(found[name]):
        np.testing.assert_allclose(each.kl, kl[row], atol=1e-5, rtol=1e-4)
        same = logits[row].argmax(axis=-1) == full[row].argmax(axis=-1)
        np.testing.assert_array_equal(each.same, same)


@pytest.mark.full
def test_a_batch_is_its_prompts_one_by_one(vlm, replayed):
    _, _, batch = replayed
    replays = Replays(vlm, METHODS, STEPS)
    for row, (text, context) in enumerate(zip(TEXTS, CONTEXTS, strict=True)):
        _, alone = replays.run(vlm.processor(None, text, context=context))
        for name, [own] in alone.items():
            np.testing.assert_allclose(own.kl, batch[name][row].kl, atol=2e-5, rtol=1e-3)
            np.testing.assert_array_equal(own.same, batch[name][row].same)
            assert own.kept_share == pytest.approx(batch[name][row].kept_share)


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_running_free_differs_where_the_replay_does(vlm, replayed, name):
    """And what is kept is what the answer's report says."""
    _, said, found = replayed
    answers = vlm.generate(text=TEXTS, context=CONTEXTS, max_new_tokens=STEPS, cache=METHODS[name])
    for row, answer in enumerate(answers):
        tokens = said.tokens(row)
        differs = None if answer.tokens == tokens else same_tokens(tokens, answer.tokens)
        assert found[name][row].first_difference == differs
        assert found[name][row].kept_share == pytest.approx(answer.cache.kept_share)


def test_an_answer_that_ends_is_compared_to_its_end(vlm, replayed):
    """The stop token counts as what is predicted; what comes behind does not."""
    inputs, said, before = replayed
    tokens = said.tokens(0)
    stop = tokens[4]
    end = tokens.index(stop)
    vlm.stop_ids = (stop,)
    try:
        again, found = Replays(vlm, {"h2o 0.5": H2O(0.5), "full": FullCache()}, STEPS).run(inputs)
    finally:
        vlm.stop_ids = ()
    assert again.counts[0] == end
    assert again.compared[0] == end  # tokens 1 to the stop token
    assert again.tokens(0) == tokens[:end]
    np.testing.assert_allclose(found["h2o 0.5"][0].kl, before["h2o 0.5"][0].kl[:end], rtol=1e-5)
    assert found["full"][0].kl.shape == (end,)


def test_an_answer_without_tokens_is_the_same_and_says_nothing(vlm, replayed):
    inputs, said, _ = replayed
    vlm.stop_ids = tuple(np.unique(np.asarray(said.first)).tolist())
    try:
        again, found = Replays(vlm, {"h2o": H2O(0.1)}, STEPS).run(inputs)
        result = evaluate(vlm, [{"text": "what?", "context": CONTEXTS[0]}], [H2O(0.1)])
    finally:
        vlm.stop_ids = ()
    assert again.counts.tolist() == again.compared.tolist() == [0, 0, 0]
    assert all(each.kl.size == 0 and each.first_difference is None for each in found["h2o"])
    [setting] = result.settings
    assert (setting.kl, setting.top1, setting.intervals["top1"]) == (None, None, None)
    assert setting.same_answer == 1
    assert result.choice == {"h2o": None}


def test_one_token_is_the_prefills_own(vlm, replayed):
    _, found = Replays(vlm, {"h2o": H2O(0.1)}, 1).run(replayed[0])
    assert all(each.kl.size == 0 for each in found["h2o"])


def test_a_folded_model_gives_what_it_generates(text_dir, replayed):
    """Loaded with the transform of the values, nothing is transformed twice."""
    folded = vlcache_jax.load(text_dir, transform=True)
    folded.stop_ids = ()
    _, found = Replays(folded, {"akvq": as_method(AKVQ())}, STEPS).run(replayed[0])
    for own, before in zip(found["akvq"], replayed[2]["akvq"], strict=True):
        np.testing.assert_allclose(own.kl, before.kl, atol=1e-5, rtol=1e-2)


# All requests together


def made_up(rng, sizes):
    return [
        Replayed(rng.exponential(size=n).astype(np.float32), rng.random(n) < 0.8, rng.random())
        for n in sizes
    ]


def test_the_summary_is_over_all_tokens():
    replayed = made_up(np.random.default_rng(0), (3, 0, 7, 1))
    replayed[3] = replayed[3]._replace(same=np.ones(1, bool))
    found = summarise(replayed)
    kl = np.concatenate([each.kl for each in replayed]).astype(np.float64)
    same = np.concatenate([each.same for each in replayed])
    assert found["kl"] == pytest.approx(kl.mean())
    assert found["kl_p95"] == pytest.approx(np.quantile(kl, 0.95))
    assert found["top1"] == pytest.approx(same.mean())
    right = [each.same.all() for each in replayed]
    assert found["same_answer"] == pytest.approx(np.mean(right))
    first = [list(each.same).index(False) + 1 for each in replayed if not each.same.all()]
    assert found["first_difference"] == np.median(first)
    assert found["kept_share"] == pytest.approx(np.mean([each.kept_share for each in replayed]))


def test_intervals_are_a_bootstrap_over_requests():
    rng = np.random.default_rng(1)
    sums, counts = rng.integers(0, 20, 30).astype(float), np.full(30, 20)
    found = ratio_interval(sums, counts)
    means = [rng.choice(sums, 30).sum() / 600 for _ in range(4000)]  # another one, by hand
    assert found == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.02)
    assert ratio_interval(np.zeros(3), np.zeros(3, int)) is None
    assert ratio_interval(np.array([4.0]), np.array([8])) == (0.5, 0.5)
    with_empty = ratio_interval(np.array([0.0, 4.0]), np.array([0, 8]))
    assert with_empty == (0.5, 0.5)


def test_groups_are_drawn_whole():
    rng = np.random.default_rng(2)
    replayed = made_up(rng, [10] * 12)
    alone = summarise(replayed)
    twice = summarise(replayed * 2, [*range(12)] * 2)
    for name, interval in alone["intervals"].items():  # no surer for being repeated
        assert twice["intervals"][name] == pytest.approx(interval)
    assert summarise(replayed * 2)["intervals"] != alone["intervals"]


def result_of(*settings, tolerance=0.9):
    made = [
        evaluation.Setting(
            f"{name} {budget}", name, budget, bits, 0.1, 0.2, 0.95, 0.5, 3.0, kept,
            {"kl": (0.0, 1.0), "top1": (low, 1.0)},
        )
        for name, budget, bits, kept, low in settings
    ]  # fmt: skip
    return evaluation.Evaluation("m", 20, 100, tolerance, made, {})


def test_the_choice_is_the_smallest_that_holds():
    found = result_of(
        ("b", "0.4", None, 0.4, 0.95),
        ("a", "0.1", None, 0.1, 0.85),
        ("a", "0.4", None, 0.4, 0.99),
        ("a", "0.2", None, 0.2, 0.9),
        ("c", "0.4", None, 0.4, 0.2),
        ("d", "0.4", "akvq", 0.08, 0.91),
        ("d", "0.2", None, 0.2, 0.99),
    )
    assert found.choice == {"b": "0.4", "a": "0.2", "c": None, "d": "0.4"}
    assert list(found.choice) == ["b", "a", "c", "d"]


def test_requests_are_checked_before_the_parameters_are_read(text_dir):
    lazy = vlcache_jax.load(text_dir, lazy=True)
    good = {"text": "what?"}
    for requests, methods, options, message in (
        ([], [H2O()], {}, "no requests"),
        ([good], [], {}, "nothing to evaluate"),
        ([good], [H2O(0.1), H2O(0.1)], {}, "several columns"),
        ([good], [H2O()], {"tolerance": 1.5}, "from 0 to 1"),
        ([good], [H2O()], {"max_new_tokens": 0}, "max_new_tokens"),
        ([good, {"text": "a", "picture": "b"}], [H2O()], {}, "request 2: there is no field"),
        ([good, {"text": 5}], [H2O()], {}, "request 2: text=5"),
        ([good, "text"], [H2O()], {}, "request 2: a request has"),
        ([good, {"context": "only"}], [H2O()], {"names": ["x", "y"]}, "y: the prompt is empty"),
        ([good, {"text": "a" * 2000}], [H2O()], {}, "request 2: the prompt has"),
        ([good, {"text": "a", "images": ["no.png"]}], [H2O()], {}, "request 2: .*picture"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(lazy, requests, methods, **untyped(options))
    assert "params" not in vars(lazy)
