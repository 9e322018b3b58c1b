"""The engine's answers are the library's own; the oracle keeps what numpy says it should."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accuracy import tasks
from benchmarks.accuracy.comparison import Comparison
from benchmarks.accuracy.evaluate import WHOLE, Evaluation, prompt_tokens
from benchmarks.accuracy.network import config_json, make_files
from benchmarks.accuracy.oracle import MostAttention, Oracle
from benchmarks.accuracy.packing import render
from pallas_kernels.window_scores import window_scores
from vlcache_jax import (
    VLM,
    Custom,
    Generate,
    LlavaConfig,
    Processor,
    PyramidKV,
    RandomKV,
    SnapKV,
    VLCache,
)  # fmt: skip
from vlcache_jax.cache import score
from vlcache_jax.cache.methods import METHODS, FullCache, make_method
from vlcache_jax.cache.quantizers import AKVQ, KIVI
from vlcache_jax.cache.state import Pool
from vlcache_jax.evaluation.comparison import Together
from vlcache_jax.models.families import abstract_params, init_params

LAYERS = 3  # so that no pool is a whole number of blocks
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
METHODS_RUN: Any = {
    "vl-cache": VLCache(0.1),
    "snapkv": SnapKV(0.1),
    "snapkv, more": SnapKV(0.3),
    "all of it": VLCache(1.0),
    "vl-cache, akvq": VLCache(0.1, quantize=AKVQ(tsa_layers=(0,), pivots=5)),
    "oracle": Oracle(0.1),
    "oracle, layers": Oracle(0.1, allocation=MostAttention()),
}


def make_vlm():
    """A tiny model with large random weights, so that it answers this and that."""
    files = make_files((*tasks.VOCABULARY_WORDS, "INST"))
    config = LlavaConfig.from_hf(config_json(VISION, TEXT, len(files.tokenizer)))
    params = jax.tree.map(lambda x: 12 * x if x.ndim > 1 else x, init_params(config, 0))
    stop_ids = tuple(range(2, config.text.vocab_size, 9))  # so that answers end here and there
    return VLM(config, lambda: params, Processor(config, files), stop_ids=stop_ids)


@pytest.fixture(scope="module")
def vlm():
    return make_vlm()


@pytest.fixture(scope="module")
def items():
    return [
        tasks.make_item("reading", 0, split="test", variant="multi-turn"),
        tasks.make_item("document", 1, split="test", variant="two pictures"),
        tasks.make_item("reading", 2, split="test", variant="question first"),
        tasks.make_item("document", 3, split="test", variant="plain"),
    ]


@pytest.fixture(scope="module")
def outcomes(vlm, items):
    return Evaluation(vlm, batch=2).run(items, METHODS_RUN, max_new_tokens=12)


def own_answers(vlm, items, method):
    return vlm.generate(
        [list(item.images) for item in items],
        [render(item) for item in items],
        raw_prompt=True,
        cache=method,
        max_new_tokens=12,
        trace=True,
    )


@pytest.mark.full
@pytest.mark.parametrize("label", [WHOLE, "vl-cache", "snapkv", "vl-cache, akvq"])
def test_tokens_and_measures_are_those_of_generate(vlm, items, outcomes, label):
    method, outcome = METHODS_RUN.get(label, FullCache()), outcomes[label]
    answers = own_answers(vlm, items, method)  # in one batch of other shapes
    assert [answer.tokens for answer in answers] == outcome.tokens
    assert [answer.text for answer in answers] == outcome.answers
    for row, answer in enumerate(answers):
        share = np.array(answer.cache.layer_budgets) / answer.prompt_tokens
        np.testing.assert_allclose(outcome.kept[row], share, atol=1e-6)
        assert outcome.kept_bytes[row].mean() == pytest.approx(answer.cache.kept_share, abs=1e-5)
        visual = answer.cache.kept_visual / answer.visual_tokens
        assert outcome.kept_visual[row].mean() == pytest.approx(visual, abs=1e-5)
        assert answer.trace is not None
        for name in ("hit_rate", "mass_recall"):
            expected = getattr(answer.trace, name).mean(axis=1)
            np.testing.assert_allclose(getattr(outcome, name)[row], expected, atol=1e-4)


@pytest.mark.full
def test_the_answers_are_worth_comparing(items, outcomes):
    full = outcomes[WHOLE]
    assert len({len(ids) for ids in full.tokens}) > 1
    assert any(full.tokens[row] != outcomes["vl-cache"].tokens[row] for row in range(len(items)))


@pytest.mark.full
def test_a_budget_of_everything_is_the_full_cache(vlm, outcomes):
    assert outcomes["all of it"] is outcomes[WHOLE]
    assert (outcomes[WHOLE].hit_rate == 1).all()
    # And rightly so: every method's program is then the full cache's.
    inputs = vlm.processor(None, "one two", raw_prompt=True)
    args = abstract_params(vlm.config), inputs, jax.random.key(0)

    def program(method):
        return str(jax.make_jaxpr(Generate(vlm.config, method, 2).__call__)(*args))

    full = program(FullCache())
    for name in METHODS:
        assert program(make_method(name, 1.0)) == full, name
    assert program(make_method("vl-cache", 0.5)) != full


@pytest.mark.full
def test_a_quantized_cache_keeps_the_same_tokens_in_fewer_bytes(outcomes):
    plain, packed = outcomes["vl-cache"], outcomes["vl-cache, akvq"]
    np.testing.assert_array_equal(packed.kept, plain.kept)
    np.testing.assert_allclose(plain.kept_bytes, plain.kept, rtol=1e-6)
    assert (packed.kept_bytes < 0.7 * plain.kept_bytes).all()
    np.testing.assert_allclose(packed.hit_rate, plain.hit_rate, atol=1e-6)


def test_bytes_of_a_row_of_each_width(vlm):
    """Of 16 numbers in float32: codes, and a word for each row's scale and shift."""
    comparison, text = Comparison(vlm.config), vlm.config.text
    wide = jnp.zeros((1, text.num_kv_heads, 8, text.head_dim))
    full = Pool(wide, wide, *[jnp.zeros((1, LAYERS))] * 3, most=8)
    for quantizer, expected in (
        (None, [1]),
        (AKVQ(tsa_layers=(0,)), [1, (16 * 4 / 8 + 4) / 64, (16 * 2 / 8 + 4) / 64]),
        (KIVI(group=16), [1, (16 * 2 / 8 + (4 + 16 * 4 / 16) / 2) / 64]),
    ):
        found = comparison._row_shares(FullCache(quantize=quantizer), full)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.full
def test_more_budget_keeps_more(outcomes):
    assert outcomes["snapkv"].kept.mean() == pytest.approx(0.1, abs=0.01)
    assert outcomes["snapkv, more"].kept.mean() == pytest.approx(0.3, abs=0.01)
    assert (outcomes["snapkv, more"].answer_recall > outcomes["snapkv"].answer_recall).all()


@dataclasses.dataclass(frozen=True)
class Recorder(Together):
    """Takes queries and keys down."""

    def observe(self, layer):
        return layer.q, layer.k


@pytest.fixture(scope="module")
def mass(vlm, items, outcomes):
    """In plain numpy: the attention of each answer's rows to its prompt, [n][L, K, m]."""
    generate = Generate(vlm.config, Recorder(), 1)
    prefill, settings = jax.jit(generate.stages.prefill), generate.settings(1)
    found = []
    for item, answer in zip(items, outcomes[WHOLE].tokens, strict=True):
        inputs = vlm.processor(list(item.images), render(item), raw_prompt=True)
        m, n = int(inputs.length[0]), max(1, len(answer))
        tokens = np.zeros((1, 768), np.int32)
        visual = np.full_like(tokens, -1)
        rows = slice(0, m)
        tokens[0, rows], visual[0, rows] = inputs.tokens[0, rows], inputs.visual_index[0, rows]
        newline = inputs.tiles.shape[0] * vlm.config.vision.num_patches
        tiles = np.zeros((10, *inputs.tiles.shape[1:]), np.float32)
        tiles[: inputs.tiles.shape[0]] = inputs.tiles
        visual[visual == newline] = 10 * vlm.config.vision.num_patches
        tokens[0, m : m + len(answer)] = answer
        longer = dataclasses.replace(
            inputs, tokens=tokens, visual_index=visual, tiles=tiles, length=np.array([m + n])
        )
        q, k = (np.asarray(x[0], np.float64) for x in prefill(vlm.params, longer, settings)[0].seen)
        own = np.zeros((LAYERS, 2, m))
        for layer, head, row in np.ndindex(LAYERS, 4, n):
            logits = k[layer, : m + row + 1, head // 2] @ q[layer, m + row, head] / 4.0
            weights = np.exp(logits - logits.max())
            own[layer, head // 2] += (weights / weights.sum())[:m] / 2
        found.append(own)
    return found


@pytest.mark.full
def test_the_oracle_keeps_what_the_answer_attends_to(outcomes, mass):
    outcome = outcomes["oracle"]
    for row, own in enumerate(mass):
        count = int(np.floor(0.1 * own.shape[-1] + 0.5))
        np.testing.assert_allclose(outcome.kept[row] * own.shape[-1], count, atol=1e-3)
        best = np.sort(own, axis=-1)[..., -count:].sum(-1) / own.sum(-1)
        np.testing.assert_allclose(outcome.answer_recall[row], best.mean(-1), atol=1e-4)
        for label in ("vl-cache", "snapkv"):
            assert outcomes[label].answer_recall[row].mean() < best.mean()


@pytest.mark.full
def test_the_oracle_of_layers_takes_the_largest_gains_of_all(outcomes, mass):
    for row, own in enumerate(mass):
        m = own.shape[-1]
        gains = -np.sort(-own, axis=-1).mean(1)  # [L, m]
        sizes, total = [0] * LAYERS, LAYERS * int(np.floor(0.1 * m + 0.5))
        for _ in range(total):  # one token after the other
            sizes[max(range(LAYERS), key=lambda layer: gains[layer, sizes[layer]])] += 1
        kept = outcomes["oracle, layers"].kept[row] * m
        assert kept.sum() == pytest.approx(total, abs=1e-3)
        assert np.abs(kept - sizes).max() <= 1 + 1e-3  # a near tie may go either way


def test_lengths_are_known_without_the_pictures(vlm, items):
    for item in items:
        inputs = vlm.processor(list(item.images), render(item), raw_prompt=True)
        assert prompt_tokens(item, vlm) == inputs.length[0]


def test_a_score_is_computed_once_for_all_methods_that_watch_alike(vlm, monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return window_scores(*args, **options)

    monkeypatch.setattr(score, "window_scores", counted)

    def windows(*methods):
        calls.clear()
        inputs = vlm.processor(None, "one two", raw_prompt=True)
        generate = Generate(vlm.config, Together(methods=methods), 1)
        arguments = abstract_params(vlm.config), inputs, generate.settings(1)
        jax.eval_shape(generate.stages.prefill, *arguments)
        return len(calls)

    assert windows(VLCache(0.1)) == LAYERS
    assert windows(VLCache(0.1), VLCache(0.4), Custom(0.2, allocation="uniform")) == LAYERS
    largest = Custom(0.3, score="row-maximum", allocation="uniform")
    assert windows(VLCache(0.1), largest, Custom(0.2, score="row-maximum")) == LAYERS
    assert windows(SnapKV(0.1), SnapKV(0.4), PyramidKV(0.1)) == 2 * LAYERS  # windows by budget


def test_limits_follow_the_right_answers(vlm, items):
    evaluation = Evaluation(vlm, batch=2)
    limits = evaluation._limits(items, None)
    for item, limit in zip(items, limits, strict=True):
        ids = vlm.processor.tokenizer(item.answer, add_special_tokens=False)["input_ids"]
        assert len(ids) < limit
        assert limit % 8 == 0
    assert limits[1] == limits[3]  # of one task


def test_what_cannot_be_run_is_refused(vlm, items):
    evaluation = Evaluation(vlm)
    with pytest.raises(ValueError, match="no items"):
        evaluation.run([], {})
    with pytest.raises(ValueError, match="full"):
        evaluation.run(items, {WHOLE: RandomKV(0.1)})
    with pytest.raises(ValueError, match="positions"):
        evaluation.run(items, {}, max_new_tokens=4000)
    with pytest.raises(ValueError, match="at least 1"):
        evaluation.run(items, {}, max_new_tokens=0)
    with pytest.raises(ValueError, match="at least 1"):
        Evaluation(vlm, batch=0)
    with pytest.raises(ValueError, match="full"):
        evaluation.run(items, {WHOLE: FullCache(quantize=AKVQ())})
    turned = VLM(vlm.config, lambda: vlm.params, vlm.processor, stop_ids=(), transformed=True)
    with pytest.raises(ValueError, match="without"):
        Evaluation(turned)
