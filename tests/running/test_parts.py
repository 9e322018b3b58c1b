"""Prompts that are run in chunks say what whole ones say, whatever the method sees of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlcache_jax
from benchmarks.models import abstract_inputs
from tests.tiny import picture, tiny_config, tiny_processor
from vlcache_jax import AKVQ, KIVI, Buckets, Custom, Generate, Processor, VLCache
from vlcache_jax.cache.blended import Blend
from vlcache_jax.cache.methods import METHODS, FullCache, make_method
from vlcache_jax.cache.score import AllRows, ColumnSum, RowMaximum
from vlcache_jax.cache.windows import LastRows, PostVisionRows, RowsInFront
from vlcache_jax.models.families import init_params
from vlcache_jax.running.parts import Rows, Runner, reach
from vlcache_jax.running.programs import Programs

CONFIG = tiny_config("llava_next")
T = 160
BUCKETS = Buckets(prompt=(T,), tiles=(10,))  # one bucket: few programs
SEVERAL = Custom(
    0.2,
    score=Blend(ColumnSum(AllRows(sample=8)), ColumnSum(LastRows(40)), 0.3),
    allocation="global-best",
)
METHODS_AND_MORE = [
    *(make_method(name) for name in METHODS),
    SEVERAL,
    VLCache(0.3, quantize=AKVQ(pivots=3)),
    FullCache(quantize=KIVI(group=16, recent=8)),
]


@pytest.fixture(scope="module")
def vlm():
    # Larger weights than a fresh model's: its answers would all be one token, again and again.
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, init_params(CONFIG, seed=1))
    processor = Processor(CONFIG, tiny_processor("llava_next"), BUCKETS)
    return vlcache_jax.VLM(CONFIG, lambda: params, processor, stop_ids=())


def asked(cache, **options):
    images = [[picture(70, 40)], None, [picture(60, 60, seed=2), picture(30, 40)]]
    texts = ["what is this?", "x", "which of these <image> is like <image> this?"]
    options |= {"cache": cache, "max_new_tokens": 6, "raw_prompt": True}
    texts[0] = f"<image>{texts[0]}"
    return {"images": images, "text": texts, **options}


@pytest.mark.parametrize("cache", METHODS_AND_MORE, ids=lambda cache: cache.label)
def test_chunks_are_the_whole_prompt(vlm, cache):
    whole = [answer.tokens for answer in vlm.generate(**asked(cache))]
    for chunk in (48, T + 1):
        parts = vlm.generate(**asked(cache, prefill_chunk=chunk))
        assert [answer.tokens for answer in parts] == whole, chunk


@pytest.mark.parametrize("chunk", [1, 7, 128, T])
def test_a_chunk_may_be_of_any_size(vlm, chunk):
    whole = [answer.tokens for answer in vlm.generate(**asked(SEVERAL))]
    parts = vlm.generate(**asked(SEVERAL, prefill_chunk=chunk))
    assert [answer.tokens for answer in parts] == whole


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "x", True])
def test_a_chunk_is_a_number_of_rows(vlm, chunk):
    with pytest.raises(ValueError, match="prefill_chunk"):
        vlm.request(**asked("full", prefill_chunk=chunk))


@pytest.mark.parametrize(
    "score",
    [
        Blend(ColumnSum(AllRows()), RowMaximum()),
        Blend(ColumnSum(AllRows(sample=8)), ColumnSum(LastRows(40))),
        ColumnSum(RowsInFront(16)),
    ],
)
def test_what_is_seen_is_that_of_the_whole_prompt(vlm, score):
    """Scores, measures and the largest activations, row by row, to rounding."""
    cache = Custom(0.2, score=score, allocation="sparsity", quantize=AKVQ(pivots=3))
    request = vlm.request(**asked(cache))
    [group], settings = request.groups, request.settings
    stages = request.generate.stages
    whole, token = jax.jit(stages.prefill)(vlm.params, group, settings)
    runner = Runner(Programs(), stages)
    rows = Rows.none(runner, vlm.params, group)
    together = reach(stages.cache, group)
    assert together is not None
    parts, same = rows.finish(runner, vlm.params, group, settings, 48, together)
    np.testing.assert_array_equal(same, token)
    for b, m in enumerate(group.length):
        for name in ("scores", "salience"):
            one, other = (getattr(each.seen, name)[b, ..., :m] for each in (whole, parts))
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=name)
        for one, other in ((whole.k, parts.k), (whole.v, parts.v)):
            one, other = (x[b].reshape(len(x[b]), -1, x.shape[-1]) for x in (one, other))
            inside = (np.arange(CONFIG.text.num_layers)[:, None] * T + np.arange(m)).ravel()
            np.testing.assert_allclose(one[:, inside], other[:, inside], rtol=1e-4, atol=1e-5)
    one, other = (np.asarray(each.seen.measured) for each in (whole, parts))
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_what_bfloat16_keeps_is_as_near_as_it_can_be(vlm):
    """Keys and values of parts and of the whole, in bfloat16, are as far from those in float32."""
    request = vlm.request(**asked("vl-cache"))
    [group], settings, stages = request.groups, request.settings, request.generate.stages
    exact, _ = jax.jit(stages.prefill)(vlm.params, group, settings)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vlm.params)
    whole, _ = jax.jit(stages.prefill)(params, group, settings)
    runner = Runner(Programs(), stages)
    rows = Rows.none(runner, params, group)
    together = reach(stages.cache, group)
    assert together is not None
    parts, _ = rows.finish(runner, params, group, settings, 48, together)
    for b, m in enumerate(group.length):
        inside = (np.arange(CONFIG.text.num_layers)[:, None] * T + np.arange(m)).ravel()
        for name in ("k", "v"):
            one, other, right = (
                np.asarray(getattr(each, name)[b][:, inside], np.float32)
                for each in (whole, parts, exact)
            )
            assert np.abs(other - right).mean() < 1.5 * np.abs(one - right).mean()


def test_one_program_serves_all_lengths_and_chunk_counts(vlm, compilations):
    ask = {"max_new_tokens": 2, "raw_prompt": True, "cache": "h2o", "prefill_chunk": 32}
    vlm.generate(text="x" * 40, **ask)
    before = len(vlm.programs)
    compilations.clear()
    for count in (33, 64, 65, 130):
        vlm.generate(text="x" * count, **ask)
    assert len(vlm.programs) == before
    assert not compilations


@pytest.mark.parametrize(
    ("window", "length", "last_visual", "rows"),
    [
        (PostVisionRows(), 100, 79, 20),
        (PostVisionRows(), 100, 99, 32),
        (PostVisionRows(), 100, -1, 32),
        (PostVisionRows(), 10, -1, 10),
        (PostVisionRows(maximum=8), 100, 10, 8),
        (LastRows(16), 100, 50, 16),
        (LastRows(16), 5, -1, 5),
        (AllRows(), 100, 50, 1),
    ],
)
def test_how_far_a_window_reaches(window, length, last_visual, rows):
    assert window.reach(length, last_visual) == rows


def test_a_method_reaches_as_far_as_what_it_looks_at():
    assert make_method("streaming-llm").reach(100, 50) == 1
    assert FullCache().reach(100, 50) == 1
    assert make_method("snapkv").reach(100, 90) == 32
    assert make_method("vl-cache").reach(100, 90) == 9
    assert make_method("aircache").reach(1000, -1) == 512
    assert make_method("tgv-kv").reach(100, 90) is None
    assert Custom(score=lambda layer: layer.k[..., 0].swapaxes(1, 2)).reach(100, 90) is None
    assert Custom(score=RowMaximum(AllRows())).reach(100, 90) is None


def test_the_rows_of_a_chunk_bound_the_memory_of_a_prefill(vlm):
    """Beside keys and values, which are given up and given back in place."""
    stages = Generate(vlm.config, make_method("h2o")).stages
    looks, total = stages.cache.continued, 16384
    inputs, settings = abstract_inputs(vlm.config, 1, total, 0), vlm.request(text="x").settings
    params = jax.eval_shape(lambda: vlm.params)
    buffers = jax.eval_shape(lambda: stages.empty_buffers(1, total, np.dtype("float32")))
    memory = jax.eval_shape(lambda: stages.empty_memory(1, total, looks))
    row = jax.ShapeDtypeStruct((1,), np.int32)
    kv = sum(leaf.size * 4 for leaf in buffers)

    def temporaries(rows):
        extend = jax.jit(partial(stages.extend, rows=rows, looks=looks), donate_argnums=3)
        args = params, (), inputs, buffers, memory, row, row, settings
        found = extend.lower(*args).compile().memory_analysis()
        assert found is not None
        assert found.alias_size_in_bytes >= kv
        return found.temp_size_in_bytes

    few, many = temporaries(32), temporaries(1024)
    assert few < kv / 3
    assert many > 2 * few
