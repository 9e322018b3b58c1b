"""The one loop: what is data and what is a program, draws, the end of an answer, packing."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlcache_jax
from tests.tiny import picture, tiny_config, tiny_processor
from vlcache_jax import AKVQ, Buckets, FullCache, Generate, Processor, SnapKV, VLCache
from vlcache_jax.cache.methods import as_method
from vlcache_jax.cache.quantizers import KIVI, RTN
from vlcache_jax.models.families import init_params
from vlcache_jax.running.driver import Run
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.sampling import Draws, Sampling

CONFIG = tiny_config("llava_next")
CONFIG = replace(CONFIG, text=replace(CONFIG.text, num_layers=1))
TEXTS = ["what is this?", "no picture, " * 3, "a <image> b <image>", "<image>", "x", "yes", "and?"]
IMAGES = [[picture(60, 40)], None, [picture(9, 90, 2), picture(50, 50, 3)], [picture(20, 20)]]
IMAGES += [None, None, [picture(40, 60, 5)]]


@pytest.fixture(scope="module")
def vlm():
    """With varied answers, and one bucket of prompts and of tiles."""
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, init_params(CONFIG, seed=1))
    processor = Processor(CONFIG, tiny_processor("llava_next"), Buckets((160,), (15,)))
    return vlcache_jax.VLM(CONFIG, lambda: params, processor, stop_ids=())


@pytest.fixture(scope="module")
def ask(vlm):
    return {"images": IMAGES[0], "text": TEXTS[0]}


# Data, never identity


def test_settings_compile_nothing_new(vlm, ask, compilations):
    """Twenty ways to draw, to stop and to end; each is really heeded."""
    long = vlm.generate(**ask, max_new_tokens=17).tokens
    compilations.clear()
    answers = []
    rng = np.random.default_rng(0)
    for number in range(20):
        own = {
            "temperature": float(rng.choice([0.0, 0.3, 1.0, 2.5])),
            "top_k": None if number % 3 == 0 else int(rng.integers(1, 300)),
            "top_p": 1.0 if number % 4 == 0 else float(rng.uniform(0.1, 1)),
            "seed": int(rng.integers(-3, 2**40)),
            "max_new_tokens": int(rng.integers(10, 18)),
        }
        vlm.stop_ids = tuple(rng.integers(0, 264, number % 5).tolist())
        answer = vlm.generate(**ask, **own)
        drawn = len(answer.tokens)
        assert drawn == own["max_new_tokens"] or (vlm.stop_ids and drawn < own["max_new_tokens"])
        assert not set(answer.tokens) & set(vlm.stop_ids)
        if own["temperature"] == 0:
            assert answer.tokens == long[:drawn]
        answers.append(tuple(answer.tokens))
    vlm.stop_ids = (long[4],)
    assert vlm.generate(**ask, max_new_tokens=12).tokens == long[: long.index(long[4])]
    vlm.stop_ids = ()
    assert len(compilations) == 0
    assert len(set(answers)) > 10


def test_budgets_of_a_bucket_compile_nothing_new(vlm, ask, compilations):
    """Shares and tokens; every one keeps what it says."""
    vlm.generate(**ask, max_new_tokens=2, cache=VLCache(0.2))
    compilations.clear()
    kept = []
    budgets = [*np.linspace(0.155, 0.2, 12), *(f"{tokens}tok" for tokens in range(28, 36))]
    for budget in budgets:
        answer = vlm.generate(**ask, max_new_tokens=2, cache=VLCache(budget))
        tokens = budget.endswith("tok") and int(budget[:-3]) if isinstance(budget, str) else 0
        wanted = tokens / answer.prompt_tokens if tokens else budget
        assert answer.cache.budget == pytest.approx(wanted)
        assert sum(answer.cache.layer_budgets) == round(wanted * answer.prompt_tokens)
        kept.append(answer.cache.kept_bytes)
    assert len(compilations) == 0
    assert len(set(kept)) >= 6
    for same in (0.2, "0.2", "0.20"):
        vlm.generate(**ask, max_new_tokens=2, cache=VLCache(same))
    assert len(compilations) == 0


def test_methods_share_the_programs_of_decoding(vlm, ask, compilations):
    vlm.generate(**ask, max_new_tokens=2, cache=VLCache(0.3))
    compilations.clear()
    vlm.generate(**ask, max_new_tokens=2, cache=SnapKV(0.3))
    assert len(compilations) == 2  # a prefill that scores in its way, and its choice


def test_kept_programs_are_bounded_and_the_least_used_goes():
    programs, names = Programs(most=2), []

    def run(name):
        names.append(programs.ready(name, lambda x: x + 1, np.ones(3, np.float32))[1] > 0)

    for name in ("a", "b", "a", "c", "a", "b"):
        run(name)
    assert names == [True, True, False, True, False, True]
    assert len(programs) == 2


# Draws


def test_a_draw_depends_on_the_seed_the_request_and_the_step_alone(vlm):
    own = {"max_new_tokens": 12, "temperature": 1.5, "seed": 7, "raw_prompt": True}
    texts = [text if "<image>" in text or not images else f"<image>{text}"
             for text, images in zip(TEXTS, IMAGES, strict=True)]  # fmt: skip
    batch = [answer.tokens for answer in vlm.generate(IMAGES, texts, **own)]
    grouped = vlm.generate(IMAGES, texts, **own, prefill_batch=2, trace=True)
    assert [answer.tokens for answer in grouped] == batch
    alone = vlm.generate(IMAGES[0], texts[0], **own, trace=True)
    assert alone.tokens == batch[0]
    assert np.array_equal(alone.trace.hit_rate, grouped[0].trace.hit_rate)
    stream = vlm.stream(IMAGES[0], texts[0], **own)
    assert "".join(stream) == alone.text
    assert stream.answer.tokens == batch[0]
    # The same prompts in other rows, each with its request's number.
    request, order = vlm.request(IMAGES, texts, **own), np.array([3, 0, 6, 2, 1, 5, 4])
    rows = replace(request.groups[0], **{
        name: getattr(request.groups[0], name)[order] for name in ("tokens", "length")
    }, visual_index=request.groups[0].visual_index[order])  # fmt: skip
    run = Run(Programs(), vlm.params, request.generate.stages, [rows], request.settings.rows(order))
    tokens = np.concatenate(list(run), axis=1)
    assert tokens[:, :12].tolist() == [batch[row] for row in order]
    assert len({tuple(row) for row in batch}) == 7
    assert vlm.generate(IMAGES[0], texts[0], **own | {"seed": 8}).tokens != batch[0]


def test_greedy_and_sampled_rows_share_a_batch(vlm):
    own = {"max_new_tokens": 6, "temperature": 1.5}
    greedy = [answer.tokens for answer in vlm.generate(IMAGES[:2], TEXTS[:2], max_new_tokens=6)]
    sampled = [answer.tokens for answer in vlm.generate(IMAGES[:2], TEXTS[:2], **own)]
    request = vlm.request(IMAGES[:2], TEXTS[:2], **own)
    draws = request.settings.draws
    mixed = replace(draws, temperature=np.array([0.0, 1.5], np.float32))
    settings = replace(request.settings, draws=mixed)
    run = Run(Programs(), vlm.params, request.generate.stages, request.groups, settings)
    tokens = np.concatenate(list(run), axis=1)[:, :6].tolist()
    assert tokens == [greedy[0], sampled[1]]


# The end


def test_a_step_beyond_the_tail_is_refused(vlm, ask):
    request = vlm.request(**ask, max_new_tokens=5)
    stages = request.generate.stages
    run = Run(Programs(), vlm.params, stages, request.groups, request.settings)
    assert sum(tokens.shape[1] for tokens in run) == 5
    with pytest.raises(ValueError, match="the tail has room for 0"):
        run.advance()
    state = stages.start(np.ones(1, np.int32), np.ones(1, np.int32), request.settings, jnp.float32)
    with pytest.raises(ValueError, match="a chunk of 16 steps does not fit into a tail of 4 rows"):
        replace(stages, chunk_steps=16).decode_chunk(vlm.params, run.pool, state)


def test_timings_are_told_apart(vlm, ask):
    first = vlm.generate(**ask, max_new_tokens=40, cache=VLCache(0.47)).timings
    again = vlm.generate(**ask, max_new_tokens=40, cache=VLCache(0.47)).timings
    assert first.compile_s > 0
    assert again.compile_s == 0
    for timings in (first, again):
        assert timings.prefill_s > 0
        assert timings.decode_s > 0
        assert timings.total_s == timings.prefill_s + timings.decode_s
    assert again.decode_tokens_per_s == pytest.approx(48 / again.decode_s)
    assert vlm.generate(**ask, max_new_tokens=1).timings.decode_tokens_per_s is None


def test_a_stop_text_ends_its_answer_alone(vlm):
    own = {"images": IMAGES[:3], "text": TEXTS[:3], "max_new_tokens": 30}
    plain = vlm.generate(**own)
    stop = plain[1].text[5:7]
    answers = vlm.generate(**own, stop=[stop, "never said"])
    for one, other in zip(plain, answers, strict=True):
        assert other.text == one.text.split(stop)[0]
        assert other.tokens == one.tokens[: len(other.tokens)]
        assert (len(other.tokens) < 30) == (stop in one.text)
    stream = vlm.stream(IMAGES[1], TEXTS[1], max_new_tokens=30, stop=stop)
    assert "".join(stream) == answers[1].text == stream.answer.text
    assert stream.answer.tokens == answers[1].tokens
    for bad in ("", [""], [3], 3):
        with pytest.raises(ValueError, match="stop="):
            vlm.generate(**own, stop=bad)


# Packing


@pytest.mark.parametrize(
    "cache",
    [
        RTN(bits=2, residual=8),
        pytest.param(RTN(bits=8, residual=3), marks=pytest.mark.full),
        pytest.param(KIVI(residual=5, recent=4, group=32), marks=pytest.mark.full),
    ],
    ids=repr,
)
def test_the_packing_schedule_is_the_quantizers_own(vlm, ask, cache):
    """Whole, streamed, cut short, and in chunks of any size."""
    answer = vlm.generate(**ask, max_new_tokens=90, cache=cache)
    stream = vlm.stream(**ask, max_new_tokens=90, cache=cache)
    assert "".join(stream) == answer.text
    assert stream.answer.tokens == answer.tokens
    for fewer in (70, 41, 3):
        own = vlm.generate(**ask, max_new_tokens=fewer, cache=cache)
        assert own.tokens == answer.tokens[:fewer]
    inputs = vlm.processor(ask["images"], ask["text"])
    for chunk in (1, 5, 32):
        generate = Generate(CONFIG, as_method(cache), 60, chunk=chunk)
        output = jax.jit(generate)(vlm.params, inputs, jax.random.key(0))
        assert output.tokens[0].tolist() == answer.tokens[:60]
    full = vlm.generate(**ask, max_new_tokens=90, cache=replace(cache, residual=None))
    assert full.tokens[:20] == answer.tokens[:20] or cache.residual < 8


# What `cache` may be


def test_a_cache_may_be_a_method_its_name_its_class_or_a_number():
    assert as_method("vl-cache") == as_method(VLCache) == VLCache()
    assert as_method(0.1) == VLCache(0.1)
    assert as_method("snapkv") == SnapKV()
    assert as_method(None) == as_method(FullCache) == as_method("full") == FullCache()
    assert as_method(AKVQ) == as_method(AKVQ()) == FullCache(quantize=AKVQ())
    wrongs: tuple[Any, ...] = (True, [], VLCache.rules, object(), int)
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"write VLCache\(0.1\)"):
            as_method(wrong)
    with pytest.raises(ValueError, match="choose one of full, vl-cache"):
        as_method("akvq2")


def test_seeds_may_be_any_number():
    draws = [Draws.of(Sampling(1.0), seed, np.arange(2, dtype=np.int32)) for seed in (-1, 2**70)]
    for own in draws:
        assert own.seed.dtype == np.uint32
        assert own.seed.shape == (2,)
