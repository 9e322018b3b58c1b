"""Every method through the whole of generation: batches, budgets, memory, programs, traces."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlcache_jax
from tests.tiny import picture, tiny_config, tiny_processor
from vlcache_jax import (
    H2O,
    TGVKV,
    AdaReTaKe,
    AirCache,
    Buckets,
    Custom,
    FullCache,
    Generate,
    MixKV,
    Processor,
    PyramidKV,
    RandomKV,
    SnapKV,
    StreamingLLM,
    VLCache,
)
from vlcache_jax.cache.allocate import allocate
from vlcache_jax.cache.blended import Blend, ValueNorm
from vlcache_jax.cache.methods import METHODS, make_method
from vlcache_jax.cache.score import AllRows, ColumnSum, RowMaximum
from vlcache_jax.cache.state import BLOCK, Pool, round_up
from vlcache_jax.models.families import init_params

CONFIG = tiny_config("llava_next")
BUCKETS = Buckets(prompt=(160,), tiles=(10,))  # one bucket: few programs
KEY = jax.random.key(0)
ALL = [
    VLCache(),
    VLCache("5tok", shared_heads=True, renormalize=True),
    H2O(),
    SnapKV(),
    PyramidKV(0.3),
    StreamingLLM("20tok"),
    RandomKV(),
    AirCache("20tok"),
    TGVKV(0.4),
    MixKV(),
    AdaReTaKe("10tok"),
    Custom(score="snapkv", allocation="sparsity"),
    Custom(
        0.2,
        score=Blend(RowMaximum(), ValueNorm(ColumnSum(AllRows(sample=8))), 0.3),
        allocation="global-best",
        keep_text=True,
        uniform_share=0.5,
    ),
    FullCache(),
]


def name(method):
    return f"{method.name} {method.budget}"


@pytest.fixture(scope="module")
def params():
    # Larger weights than a fresh model's: its answers would all be one token, again and again.
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, init_params(CONFIG, seed=1))


@pytest.fixture(scope="module")
def processor():
    return Processor(CONFIG, tiny_processor("llava_next"), BUCKETS)


@pytest.fixture(scope="module")
def vlm(params, processor):
    return vlcache_jax.VLM(CONFIG, lambda: params, processor, stop_ids=())


IMAGES = [[picture(60, 40)], None, [picture(9, 90, 2), picture(50, 50, 3)]]
TEXTS = ["what is this?", "no picture, " * 8, "a <image> b <image>"]


@pytest.mark.parametrize("method", ALL, ids=name)
def test_a_batch_of_unequal_prompts_equals_batch_one(vlm, method):
    ask = {"max_new_tokens": 3, "cache": method, "raw_prompt": True, "trace": True}
    texts = ["<image>what is this?", *TEXTS[1:]]
    batch = vlm.generate(IMAGES, texts, **ask)
    for images, text, answer in zip(IMAGES, texts, batch, strict=True):
        alone = vlm.generate(images, text, **ask)
        assert answer.tokens == alone.tokens
        assert answer.cache == alone.cache
        assert np.array_equal(answer.trace.kept, alone.trace.kept)
        if method.limit.tokens is not None:
            rows = min(method.limit.tokens, answer.prompt_tokens)
            assert sum(answer.cache.layer_budgets) == CONFIG.text.num_layers * rows
    assert len({answer.prompt_tokens for answer in batch}) == 3


@pytest.mark.parametrize("method", [VLCache(), FullCache()], ids=name)
def test_a_batch_prefilled_a_few_at_a_time_gives_the_same(vlm, method):
    """Three prompts two at a time: the last group is not full."""
    ask = {"images": IMAGES, "text": TEXTS, "max_new_tokens": 6, "cache": method, "trace": True}
    whole, grouped = vlm.generate(**ask), vlm.generate(**ask, prefill_batch=2)
    for one, other in zip(whole, grouped, strict=True):
        assert one.tokens == other.tokens
        assert one.cache == replace(other.cache, tail_bytes=one.cache.tail_bytes)
        assert np.array_equal(one.trace.kept, other.trace.kept)
        assert one.prompt_tokens == other.prompt_tokens
        assert other.timings.prefill_s is not None


def test_a_budget_of_everything_is_the_full_cache(params, processor):
    """To the last bit: of the pool, and of the logits of the first steps."""
    inputs = processor(IMAGES, TEXTS)

    def run(cache):
        generate = Generate(CONFIG, cache, 6)
        stages, settings = generate.stages, generate.settings(3)
        pool, state, _ = jax.jit(stages.begin)(params, inputs, settings)
        step, logits = jax.jit(stages.decode_step), []
        for _ in range(4):
            state, own = step(params, pool, state)
            logits.append(own)
        return pool, logits

    full = jax.tree.leaves(run(FullCache()))
    for method in (VLCache(1.0), H2O("1")):
        for one, other in zip(full, jax.tree.leaves(run(method)), strict=True):
            assert np.array_equal(one, other)
    for method in METHODS:
        assert make_method(method, 1.0).limit.keeps_all


def test_tokens_beyond_the_prompt_keep_everything(vlm):
    ask = {"images": IMAGES, "text": TEXTS, "max_new_tokens": 6}
    full = vlm.generate(**ask)
    answers = vlm.generate(**ask, cache=VLCache("160tok"))
    assert [a.tokens for a in answers] == [a.tokens for a in full]
    assert all(a.cache.kept_share == a.cache.budget == 1 for a in answers)


def test_a_budget_of_one_token(vlm):
    answers = vlm.generate(IMAGES, TEXTS, max_new_tokens=4, cache=VLCache("1tok"))
    for answer in answers:
        assert answer.cache.layer_budgets == [1, 1]
        assert len(answer.tokens) == 4


def test_nothing_of_a_call_is_left_for_the_next(vlm):
    ask = {"text": "what?", "max_new_tokens": 8, "cache": VLCache()}
    first = vlm.generate(picture(60, 40), **ask)
    other = vlm.generate(picture(60, 40, seed=5), **ask)
    again = vlm.generate(picture(60, 40), **ask)
    assert first.tokens == again.tokens != other.tokens
    assert first.cache == again.cache


def test_the_report_says_what_was_kept(vlm):
    answer = vlm.generate(picture(60, 40), "what?", max_new_tokens=2, cache=VLCache(), trace=True)
    cache, trace = answer.cache, answer.trace
    row = 2 * CONFIG.text.num_kv_heads * CONFIG.text.head_dim * 4
    assert cache.layer_budgets == trace.budget.tolist()
    assert cache.kept_bytes == sum(cache.layer_budgets) * row
    assert cache.full_bytes == CONFIG.text.num_layers * answer.prompt_tokens * row
    assert cache.kept_share == cache.kept_bytes / cache.full_bytes < 0.13
    assert cache.compression_ratio == 1 - cache.kept_share
    kept = trace.kept >= 0
    visual = (trace.prompt_is_visual[trace.kept] & kept).sum() / trace.kept.shape[1]
    assert cache.kept_visual == pytest.approx(visual / CONFIG.text.num_layers)
    assert cache.kept_visual + cache.kept_text == pytest.approx(np.mean(cache.layer_budgets))


def test_a_stream_keeps_what_generate_keeps(vlm):
    ask = {"images": picture(60, 40), "text": "what?", "max_new_tokens": 6}
    whole = vlm.generate(**ask, cache=VLCache(), trace=True)
    stream = vlm.stream(**ask, cache=VLCache(), trace=True)
    assert "".join(stream) == whole.text
    assert stream.answer.cache.layer_budgets == whole.cache.layer_budgets
    assert np.array_equal(stream.answer.trace.kept, whole.trace.kept)


# Programs


def test_a_hundred_prompts_of_a_bucket_are_one_program(params, processor, compilations):
    """Every prompt has other budgets; each stage is compiled once."""
    generate = Generate(CONFIG, VLCache(0.3), 3)
    stages, settings = generate.stages, generate.settings(1)
    begin, decode = jax.jit(stages.begin), jax.jit(stages.decode_chunk)
    budgets = set()
    rng = np.random.default_rng(0)
    for seed in range(100):
        text = "".join(chr(rng.integers(97, 123)) for _ in range(int(rng.integers(1, 40))))
        inputs = processor(picture(60, 40, seed), text)
        compilations.clear()
        pool, state, _ = begin(params, inputs, settings)
        assert len(compilations) == (1 if seed == 0 else 0)
        decode(params, pool, state)
        assert len(compilations) == (2 if seed == 0 else 0)
        budgets.add(tuple(np.asarray(pool.length)[0].tolist()))
    assert len(budgets) > 30


# Memory


@pytest.mark.parametrize("method", [VLCache(), H2O(0.37), StreamingLLM("16tok")], ids=name)
def test_only_the_pool_and_the_tail_stay(params, processor, method):
    """The full K and V are gone: what is alive afterwards is counted by JAX itself."""
    inputs = jax.device_put(processor(IMAGES, TEXTS))
    generate = Generate(CONFIG, method, 6)
    stages, settings = generate.stages, generate.settings(3)
    begin = jax.jit(stages.begin)
    begin(params, inputs, settings)  # compiled: constants are alive before and after
    before = {id(array) for array in jax.live_arrays()}
    pool, state, _ = begin(params, inputs, settings)
    new = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
    text = CONFIG.text
    row = 2 * text.num_kv_heads * text.head_dim * 4
    tail = 3 * text.num_layers * stages.tail_rows * row
    capacity = method.limit.capacity(text.num_layers, 160)
    assert pool.k.nbytes + pool.v.nbytes == 3 * capacity * row
    small = sum(x.nbytes for x in jax.tree.leaves((pool, state)) if x.ndim <= 2)
    assert new <= 3 * capacity * row + tail + small
    assert capacity == round_up(text.num_layers * method.limit.bucket(160).layer_rows(160))


def test_prefilling_into_a_batch_writes_in_place(params, processor):
    generate = Generate(CONFIG, VLCache(0.3), 3)
    stages, settings = generate.stages, generate.settings(2)
    pool = stages.empty_pool(6, 160, jnp.float32)
    assert isinstance(pool, Pool)
    inputs = processor(IMAGES[:2], TEXTS[:2])
    rows = np.array([4, 1], np.int32)
    program = jax.jit(stages.build_into, donate_argnums=0)
    prefilled, _ = jax.jit(stages.prefill)(params, inputs, settings)
    args = (pool, rows, prefilled, inputs, settings)
    memory = program.lower(*args).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= pool.k.nbytes + pool.v.nbytes
    old = pool.k
    pool, _ = program(*args)
    assert old.is_deleted()
    alone, _ = jax.jit(stages.build_cache)(prefilled, inputs, settings)
    for place, row in enumerate(rows):
        assert np.array_equal(pool.length[row], alone.length[place])
        assert np.array_equal(pool.k[row], alone.k[place])
    assert not np.asarray(pool.length)[[0, 2, 3, 5]].any()


def test_prompts_of_another_bucket_do_not_fit(params, processor):
    generate = Generate(CONFIG, VLCache(0.9), 3)
    stages, settings = generate.stages, generate.settings(1)
    pool, rows = stages.empty_pool(2, 1000, jnp.float32), np.zeros(1, np.int32)
    inputs = processor(None, "hello")
    prefilled, _ = jax.eval_shape(stages.prefill, params, inputs, settings)
    with pytest.raises(ValueError, match="pad all to one bucket"):
        jax.eval_shape(stages.build_into, pool, rows, prefilled, inputs, settings)


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.5, 0.99, 1.0, "1tok", "40tok", "5000tok"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
def test_the_capacity_formula(method, budget):
    cache = make_method(method, budget)
    for layers, rows in ((1, 1), (2, 64), (32, 3072)):
        own = rows
        if cache.limit.tokens is not None:
            own = min(rows, cache.limit.tokens)
        elif cache.limit.share is not None and not cache.limit.keeps_all:
            own = min(rows, int(np.ceil((cache.limit.share + 0.01) * rows)) + 1)
        shares = [0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6]
        sizes = [min(rows, int(np.ceil((share + 0.01) * rows)) + 1) for share in shares]
        own = min([size for size in sizes if size >= own], default=rows)  # that of its bucket
        capacity = cache.limit.capacity(layers, rows)
        assert capacity % BLOCK == 0
        assert 0 <= capacity - layers * own < max(BLOCK, capacity * (layers * own == 0))


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.5, 0.99, "1tok", "40tok"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
def test_every_length_fits_its_pool(method, budget):
    """All lengths m = 1..T of a bucket: budgets from 1 to m whose sum the pool holds."""
    layers, rows = 5, 300
    cache = make_method(method, budget)
    m = jnp.arange(1, rows + 1)
    rng = np.random.default_rng(0)
    sparsity = jnp.asarray(1 - rng.uniform(0, 1, (rows, layers)) ** 8, jnp.float32)
    visual = jnp.arange(rows)[None] < m[:, None] // 2
    prompt = vlcache_jax.Prompt(m, visual, layers, cache.limit.data)
    _, allocation = cache.rules()
    scores = jnp.asarray(rng.uniform(0, 1, (rows, layers, 2, rows)) ** 4, jnp.float32)
    shown = scores if allocation.by_scores else sparsity
    k = np.asarray(allocate(allocation.sizes(prompt, shown), prompt.budget, m))
    assert (k >= 1).all()
    assert (k <= np.asarray(m)[:, None]).all()
    assert (k.sum(1) <= layers * np.asarray(prompt.budget.most(m))).all()
    assert k.sum(1).max() <= cache.limit.capacity(layers, rows)


# A user's own


def test_an_own_score_and_an_own_allocation(vlm):
    def newest(layer):
        batch, rows, heads, _ = layer.k.shape
        return jnp.broadcast_to(jnp.arange(rows, dtype=jnp.float32), (batch, heads, rows))

    def first_layer_only(prompt, sparsity):
        return jnp.where(jnp.arange(prompt.layers) == 0, prompt.length[:, None] / 4.0, 1.0)

    method = Custom(0.2, score=newest, allocation=first_layer_only, recent_ratio=0.0)
    answer = vlm.generate(None, "a text of some length", max_new_tokens=2, cache=method, trace=True)
    m, k = answer.prompt_tokens, answer.cache.layer_budgets
    assert k == [max(1, round(m / 4)), 1] or k == [m // 4, 1]
    assert answer.trace.kept[0, 0].tolist() == list(range(m - k[0], m))
    assert answer.cache.method == "custom"


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_scores_of_ones_own_that_are_no_numbers(vlm, ratio):
    """In a padded batch: what is kept are rows of the prompt, the last ones among them."""

    def broken(layer):
        batch, rows, heads, _ = layer.k.shape
        position = jnp.arange(rows)
        scores = jnp.where(position % 2 == 0, jnp.nan, jnp.where(position % 3, -jnp.inf, jnp.inf))
        return jnp.broadcast_to(scores, (batch, heads, rows))

    method = Custom("12tok", score=broken, allocation="uniform", recent_ratio=ratio)
    texts = ["a text", "a text of some more length", "<image>and one with a picture"]
    images = [None, None, picture(60, 40)]
    answers = vlm.generate(images, texts, max_new_tokens=2, cache=method, trace=True)
    for answer in answers:
        m, last = answer.prompt_tokens, int(12 * ratio)
        others = [p for p in range(m - last) if p % 2 and p % 3 == 0]
        others += [p for p in range(m - last) if p % 2 and p % 3]
        others += [p for p in range(m - last) if p % 2 == 0]
        want = sorted([*others[: min(12, m) - last], *range(m - last, m)])
        for head in answer.trace.kept.reshape(-1, len(want)):
            assert head.tolist() == want


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "attention"}, "no score 'attention'"),
        ({"allocation": "even"}, "no allocation 'even'"),
        ({"recent_ratio": 1.5}, "recent_ratio=1.5"),
        ({"score": "snapkv", "recent_ratio": 0.5}, "always kept"),
        ({"budget": -1}, "above 0"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        Custom(**settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VLCache(fallback_window=0),
        lambda: VLCache(max_window=0),
        lambda: VLCache(recent_ratio=-0.1),
        lambda: SnapKV(kernel=4),
        lambda: SnapKV(window=0),
        lambda: PyramidKV(slope=0),
        lambda: StreamingLLM(sinks=-1),
        lambda: FullCache(0.5),
        lambda: VLCache(threshold=-1),
    ],
)
def test_bad_settings_of_methods_are_refused_at_once(make):
    with pytest.raises(ValueError, match=r"must|keeps everything"):
        make()


def test_wrong_shapes_of_own_rules_are_told():
    wrong = Custom(score=lambda layer: layer.k[..., 0])
    processor = Processor(CONFIG, tiny_processor("llava_next"), BUCKETS)
    prompt = processor(None, "hello")
    params = jax.eval_shape(lambda: init_params(CONFIG))
    with pytest.raises(ValueError, match=r"expected \[B, K, T\]"):
        jax.eval_shape(Generate(CONFIG, wrong).__call__, params, prompt, KEY)
    wrong = Custom(allocation=lambda prompt, sparsity: sparsity[:, :1])
    with pytest.raises(ValueError, match=r"expected \[B, L\]"):
        jax.eval_shape(Generate(CONFIG, wrong).__call__, params, prompt, KEY)


def test_equal_settings_are_equal_methods():
    assert VLCache() == VLCache(0.1)
    assert hash(VLCache()) == hash(VLCache(0.1))
    assert VLCache() != VLCache(0.2)
    assert replace(VLCache(), budget=0.2) == VLCache(0.2)
