"""Quantized caches through the whole of generation: exactness, batches, memory, long answers."""

import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlcache_jax
from pallas_kernels.packing import dequantize, unpack
from tests.cache.numpy_quantize import (
    by_channel,
    find_rows,
    hadamard,
    numpy_quantize,
    values_of,
)
from tests.tiny import picture, tiny_config, tiny_processor
from vlcache_jax import Buckets, FullCache, Generate, Processor, VLCache
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import Observation
from vlcache_jax.cache.methods import as_method
from vlcache_jax.cache.packed import PackedPool
from vlcache_jax.cache.quantizers import AKVQ, KIVI, RTN
from vlcache_jax.cache.state import Pool, Tails
from vlcache_jax.models.families import abstract_params
from vlcache_jax.models.fold import fold_transform
from vlcache_jax.running.stages import Stages

CONFIG = tiny_config("llava_next")
ONE_LAYER = replace(CONFIG, text=replace(CONFIG.text, num_layers=1))
HEADS = CONFIG.text.num_kv_heads
KEY = jax.random.key(0)
SMALL = AKVQ(recent=8, pivots=3, tsa_layers=(0,))
IMAGES = [[picture(60, 40)], None, [picture(9, 90, 2), picture(50, 50, 3)]]
TEXTS = ["what is this?", "no picture, " * 8, "a <image> b <image>"]


def random_params(config):
    """Without a program; larger weights than a fresh model's, for varied answers."""
    rng = np.random.default_rng(1)

    def draw(x):
        return 0.16 * rng.standard_normal(x.shape) if x.ndim > 1 else np.ones(x.shape)

    return jax.tree.map(lambda x: jnp.asarray(draw(x), x.dtype), abstract_params(config))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def folded(params):
    return fold_transform(params)


@pytest.fixture(scope="module")
def processor():
    return Processor(CONFIG, tiny_processor("llava_next"), Buckets(prompt=(48, 160), tiles=(0, 10)))


@pytest.fixture(scope="module")
def vlm():
    """With one layer and one bucket, since programs take time."""
    buckets = Buckets(prompt=(160,), tiles=(10,))
    processor = Processor(ONE_LAYER, tiny_processor("llava_next"), buckets)
    return vlcache_jax.VLM(ONE_LAYER, lambda: random_params(ONE_LAYER), processor, stop_ids=())


@cache
def compiled(generate, stage):
    return jax.jit(getattr(generate, stage))


def close(one, other, tolerance):
    """Within a share of the largest value."""
    one, other = np.asarray(one), np.asarray(other)
    return np.abs(one - other).max() <= tolerance * np.abs(other).max()


# Exactness


def test_sixteen_bits_with_the_transform_are_the_full_cache(params, folded, processor):
    inputs = processor(None, ["what is this?", "another text, a bit longer"])

    def run(cache, params):
        generate = Generate(CONFIG, cache, 9)
        stages = generate.stages
        pool, state, _ = compiled(stages, "begin")(params, inputs, generate.settings(2))
        tokens, logits = [state.token], []
        for _ in range(8):
            state, own = compiled(stages, "decode_step")(params, pool, state)
            tokens.append(state.token)
            logits.append(own)
        return pool, np.stack(tokens), np.stack(logits)

    _, tokens, logits = run(FullCache(), params)
    pool, own_tokens, own_logits = run(as_method(AKVQ(recent=10**6, tsa_layers=())), folded)
    assert isinstance(pool, PackedPool)
    assert not np.asarray(pool.counts)[..., 1:].any()
    assert own_tokens.tolist() == tokens.tolist()
    assert close(own_logits, logits, 2e-5)
    assert len(set(tokens.ravel().tolist())) > 4


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 8), (4, 2, 24)])
def test_folded_weights_are_the_same_model(processor, heads, kv_heads, head_dim):
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    config = replace(ONE_LAYER, text=replace(ONE_LAYER.text, **sizes))
    params = random_params(config)
    folded = fold_transform(params)
    matrix = hadamard(head_dim)
    for index, layer in params["layers"].items():
        own = folded["layers"][index]
        # The values come out transformed; queries and keys, and all other weights, as they were.
        values = np.einsum("dkh,hj->dkj", layer["qkv"][:, :, -1], matrix)
        assert close(own["qkv"][:, :, -1], values, 1e-6)
        assert np.array_equal(own["qkv"][:, :, :-1], layer["qkv"][:, :, :-1])
        assert not close(own["out"], layer["out"], 0.1)
        assert own["down"] is layer["down"]
    assert folded["embed"] is params["embed"]
    inputs = processor(None, "a few words")
    logits_of = jax.jit(Stages(config).prompt_logits)
    length = int(inputs.length[0])
    expected = logits_of(params, inputs)[0, :length]
    assert close(logits_of(folded, inputs)[0, :length], expected, 1e-5)
    half = jax.tree.map(lambda x: x, params)
    half["layers"][0]["qkv"] = folded["layers"][0]["qkv"]
    assert not close(logits_of(half, inputs)[0, :length], expected, 1e-3)  # both, or neither


# Batches, groups, streams


def test_a_batch_equals_batch_one_and_prompts_share_a_program(vlm, compilations):
    ask = {"max_new_tokens": 4, "raw_prompt": True, "cache": SMALL}
    texts = ["<image>what is this?", *TEXTS[1:], "and this? <image>"]
    images = [*IMAGES, [picture(30, 50, 9)]]
    batch = vlm.generate(images[:3], texts[:3], **ask)
    assert len({answer.prompt_tokens for answer in batch}) == 3
    assert len({tuple(answer.tokens) for answer in batch}) == 3
    for index, (own, text) in enumerate(zip(images, texts, strict=True)):
        compilations.clear()
        stream = vlm.stream(own, text, **ask)
        shown = "".join(stream)
        assert shown == stream.answer.text
        assert bool(compilations) == (index == 0)
        if index < 3:
            assert stream.answer.tokens == batch[index].tokens
            assert stream.answer.cache.layer_budgets == batch[index].cache.layer_budgets


def test_groups_of_a_batch_with_eviction_equal_batch_one(vlm):
    """Stage by stage and in one program, with new tokens that are packed in front of chunk 3."""
    cache = VLCache(0.3, quantize=replace(SMALL, tsa_layers=(), residual=4))
    ask = {"max_new_tokens": 97, "raw_prompt": True, "cache": cache}
    texts = ["<image>what is this?", TEXTS[2], "<image> and this?"]
    images = [IMAGES[0], IMAGES[2], [picture(30, 50, 9)]]
    grouped = vlm.generate(images, texts, **ask, prefill_batch=2)
    assert len({tuple(answer.tokens) for answer in grouped}) == 3
    for own, text, answer in zip(images, texts, grouped, strict=True):
        alone = vlm.generate(own, text, **ask)
        assert answer.tokens == alone.tokens
        assert answer.cache.layer_budgets == alone.cache.layer_budgets
        assert answer.cache.kept_share < 0.3


def test_nothing_is_quantized_unless_it_is_asked_for():
    assert as_method(None) == FullCache()
    assert Generate(CONFIG).cache.quantize is None
    shapes = as_method(None).pool_shapes(CONFIG.text, 2, 64, jnp.bfloat16)
    assert isinstance(shapes, Pool)
    assert as_method(SMALL).transforms
    assert not as_method(RTN()).transforms


# Memory


def test_ten_percent_at_two_bits_are_three_percent_of_the_bytes():
    """Of a cache at 4k tokens in the shapes of a 7B model, one kv head of it."""
    layers, rows, head_dim = 32, 4096, 128
    method = VLCache(0.1, quantize=AKVQ().for_decoder("llama", layers))
    rng = np.random.default_rng(0)
    visual = np.zeros((1, rows), bool)
    visual[:, 10:2900] = True
    prompt = Prompt(jnp.array([rows], jnp.int32), jnp.asarray(visual), layers, method.limit.data)
    seen = Observation(
        jnp.asarray(rng.random((1, layers, 1, rows), np.float32)),
        jnp.asarray(rng.uniform(0.5, 0.99, (1, layers)).astype(np.float32)),
        jnp.asarray(rng.random((1, layers, rows), np.float32)),
    )
    x = jnp.asarray(rng.standard_normal((1, 1, layers * rows, head_dim), np.float32), jnp.bfloat16)
    full = 2 * x.nbytes
    build = jax.jit(lambda k, v, seen: method.build(k, v, method.plan(seen, prompt), prompt))
    pool = jax.block_until_ready(build(x, x, seen))
    assert pool.dense.k.dtype == jnp.bfloat16
    assert abs(int(np.sum(pool.counts)) / (layers * rows) - 0.1) < 0.003
    # What is allocated is for the most of 4 bits that any prompt could need.
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(pool))
    assert allocated <= 0.04 * full
    dense = int(np.sum(pool.dense.length)) * 2 * head_dim * 2
    word_row = (pool.words_k.nbytes + pool.words_v.nbytes) // pool.words_k.shape[2]
    scales = (pool.affine_k.nbytes + pool.affine_v.nbytes) // pool.words_k.shape[2]
    used = int(np.ceil(np.asarray(pool.rows)[0] / [8, 16]).sum())  # rows of 4 and of 2 bits
    kept = dense + used * (word_row + scales)
    assert 0.02 * full < kept <= 0.03 * full
    assert used <= pool.words_k.shape[2]


def float_shapes(program):
    """Elements of the largest array of a float type in a compiled program."""
    shapes = re.findall(r"\b(?:bf16|f16|f32|f64)\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def test_there_is_never_a_dequantized_cache(params):
    """In no program of decoding is there an array of full width as large as a part of the cache."""
    generate, rows = Generate(CONFIG, as_method(replace(SMALL, residual=32)), 97), 4096
    stages, one = generate.stages, np.ones(1, np.int32)
    pool = jax.eval_shape(partial(stages.empty_pool, 1, rows, jnp.float32))
    start = partial(stages.start, dtype=jnp.float32)
    shapes = pool, jax.eval_shape(start, one, one, generate.settings(1))
    whole = pool.words_k.size * 16  # values of the keys at two bits
    assert whole >= HEADS * CONFIG.text.head_dim * 2 * rows
    for stage, args in (("decode_chunk", (params, *shapes)), ("spill", shapes)):
        program = jax.jit(getattr(stages, stage)).lower(*args).compile()
        assert float_shapes(program) < whole / 8
    both = pool.words_v, pool.affine_v

    def copy(words, affine):
        codes = unpack(words, 2).reshape(*words.shape[:2], -1, words.shape[3])
        return dequantize(codes, affine)

    assert float_shapes(jax.jit(copy).lower(*both).compile()) >= whole


# Long answers


def plain(pool, tail, new=None):
    """The same rows in a pool of full width, and the tail: nothing is packed or transformed.

    `new`, keys and values [L, B, K, n, H], stand for the packed rows of new tokens.
    """
    quantizer, size = pool.quantizer, CONFIG.text.head_dim
    turn = np.float32(hadamard(size)) if quantizer.transform else np.eye(size, dtype=np.float32)
    batch, layers = pool.dense.length.shape
    offset = np.arange(layers, dtype=np.int32) * 700 + np.zeros((batch, 1), np.int32)
    length = np.zeros((batch, layers), np.int32)
    k, v = (np.zeros((batch, HEADS, layers * 700, size), np.float32) for _ in range(2))
    for b, layer, head in np.ndindex(batch, layers, HEADS):
        found = find_rows(pool, b, layer, head)
        runs = found.packed if new is None else found.packed[:-1]
        own_k = [found.dense_k, *(values_of(keys) for _, keys, _ in runs)]
        own_v = [found.dense_v, *(values_of(values) for _, _, values in runs)]
        if new is not None:
            own_k.append(new[0][layer, b, head])
            own_v.append(new[1][layer, b, head])
        length[b, layer] = sum(map(len, own_k))
        own = slice(layer * 700, layer * 700 + length[b, layer])
        k[b, head, own] = np.concatenate(own_k) @ turn
        v[b, head, own] = np.concatenate(own_v)
    arrays = map(jnp.asarray, (k, v, offset, length, np.zeros(length.shape, np.float32)))
    return Pool(*arrays, most=700), Tails(tuple(x @ turn for x in tail.k), tail.v, tail.fill)


@pytest.mark.parametrize(
    ("cache", "config"),
    [
        (replace(SMALL, residual=32), CONFIG),
        (KIVI(residual=32, recent=5, group=32), ONE_LAYER),
        (VLCache(0.5, quantize=RTN(bits=8, residual=32, transform=True)), ONE_LAYER),
    ],
    ids=["akvq", "kivi", "vl-cache rtn"],
)
def test_new_tokens_are_packed_too(folded, processor, cache, config):
    generate = Generate(config, as_method(cache), 600, chunk=16)
    stages, quantizer, steps = generate.stages, generate.cache.quantize, generate.chunk_steps
    assert quantizer is not None
    count = quantizer.unit
    inputs = processor(None, ["what?", "another text, a bit longer"])
    layers = range(config.text.num_layers)
    folded = {**folded, "layers": {i: folded["layers"][i] for i in layers}}
    pool, state, _ = jax.jit(stages.begin)(folded, inputs, generate.settings(2))
    spill, decode = jax.jit(stages.spill, donate_argnums=(0, 1)), jax.jit(stages.decode_step)
    prompt = np.asarray(pool.counts)
    moved = []  # keys and values [L, B, K, n, H], as they were
    assert stages.tail_rows <= 32 + 2 * count + steps < 600 / 4
    packed = 0
    for index in range(generate.num_chunks + 1):
        before = jax.device_get(state.tail)
        pool, state = spill(pool, state)
        new = int(before.fill[0] - state.tail.fill[0])
        assert new == (count if index * steps % count == 0 and before.fill[0] >= 32 + count else 0)
        moved.append([np.stack(x)[:, :, :, :new] for x in (before.k, before.v)])
        packed += new
        assert (np.asarray(pool.rows)[..., -1] == packed).all()
        assert (np.asarray(state.tail.fill) == index * steps - packed).all()
        assert int(state.tail.fill[0]) <= stages.tail_rows - steps
        if index < generate.num_chunks:
            for _ in range(steps):
                state, _ = decode(folded, pool, state)
    assert packed >= 600 - 32 - 2 * count - steps
    assert (np.asarray(pool.counts) == prompt).all()
    host = jax.device_get(pool)
    new_k, new_v = (np.concatenate(parts, axis=3) for parts in zip(*moved, strict=True))
    for layer, b, head in np.ndindex(new_k.shape[:3]):
        assert_packed(host, layer, b, head, new_k[layer, b, head], new_v[layer, b, head])

    # One more step on the packed rows is that on the same rows dequantized, and near that on exact
    # ones where they have 8 bits.
    own, full = decode(folded, pool, state)[1], replace(stages, cache=FullCache())
    for new, tolerance in ((None, 5e-5), ((new_k, new_v), 0.02)):
        dense, tail = plain(host, state.tail, new)
        expected = compiled(full, "decode_step")(folded, dense, replace(state, tail=tail))[1]
        assert close(own, expected, tolerance) or (new and quantizer.widths != (8,))


def assert_packed(pool, layer, batch, head, k, v):
    """These rows are what a layer's last run holds, quantized as numpy does it."""
    quantizer, size = pool.quantizer, CONFIG.text.head_dim
    bits, keys, values = find_rows(pool, batch, layer, head).packed[-1]
    assert bits == quantizer.new_width(layer)
    expected_v = numpy_quantize(v, bits, group=size, clip=quantizer.clip)
    if quantizer.key_group:
        expected_k = by_channel(k, bits, group=quantizer.key_group, clip=quantizer.clip)
    else:
        expected_k = numpy_quantize(k, bits, group=size, clip=quantizer.clip)
    for found, expected in ((keys, expected_k), (values, expected_v)):
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one, other)
