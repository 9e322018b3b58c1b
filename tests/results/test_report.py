"""Every byte of the reports, against live arrays and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlcache_jax
from benchmarks.models import MODELS
from pallas_kernels.packing import per_word
from tests.tiny import picture, tiny_config
from vlcache_jax import AKVQ, KIVI, RTN, FullCache, Generate, VLCache
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import Plan
from vlcache_jax.models.config import TextConfig
from vlcache_jax.results.report import (
    cache_report,
    kv_bits,
    memory_need,
    packed_bytes,
    pool_bytes,
    row_bytes,
    slots_that_fit,
)

# L, K, H of a small decoder; T and the prompts' lengths.
TEXT = TextConfig(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
ROWS, LENGTHS = 64, (64, 45)

CASES = {
    "akvq": FullCache(quantize=AKVQ(tsa_layers=(0,), recent=6, pivots=3)),
    "vl-cache+akvq": VLCache(0.5, quantize=AKVQ(tsa_layers=(0, 2), pivots=3, residual=4)),
    "kivi": FullCache(quantize=KIVI(group=16, recent=9)),
    "none": VLCache(0.5),
}


def build(method, dtype, new_rows):
    """A pool of random rows, where the layers keep different numbers of tokens."""
    rng = np.random.default_rng(3)
    shape = (2, TEXT.num_kv_heads, TEXT.num_layers * ROWS, TEXT.head_dim)
    k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    visual = jnp.asarray(rng.random((2, ROWS)) < 0.6)
    prompt = Prompt(jnp.array(LENGTHS), visual, TEXT.num_layers, method.limit.data)
    if method.limit.keeps_all:
        budgets, order = jnp.broadcast_to(prompt.length[:, None], (2, 3)), None
    else:
        budgets = jnp.array([[40, 30, 26], [20, 23, 24]])
        inside = np.arange(ROWS) < np.array(LENGTHS)[:, None, None, None]
        worth = np.where(inside, rng.random((2, TEXT.num_layers, TEXT.num_kv_heads, ROWS)), -1)
        order = jnp.asarray(np.argsort(-worth, axis=-1), jnp.int32)
    salience = jnp.asarray(rng.random((2, TEXT.num_layers, ROWS)), jnp.float32)
    plan = Plan(budgets, order, salience)
    return jax.jit(lambda *args: method.build(*args, new_rows))(k, v, plan, prompt)


def live_bytes(pool, row):
    """Bytes of the codes, scales and dense rows of one sequence that are really in use."""
    if not hasattr(pool, "words_k"):
        return 0, 0, 2 * sum(pool.k[row, :, : int(n)].nbytes for n in pool.length[row])
    payload = scales = dense = 0
    lanes, size = pool.quantizer.lanes, pool.quantizer.key_group
    for layer, count in enumerate(pool.dense.length[row]):
        dense += 2 * pool.dense.k[row, :, : int(count)].nbytes
        for run, bits in enumerate(pool.quantizer.widths):
            first, rows = int(pool.first[row, layer, run]), np.arange(pool.rows[row, layer, run])
            words = first + rows // per_word(bits)
            payload += 2 * pool.words_k[row][:, words].nbytes * bits // 32  # a row's share of words
            place = words * lanes + rows % per_word(bits)
            scales += pool.affine_v[row][:, :, place].nbytes
            if size is None:
                scales += pool.affine_k[row][:, :, place].nbytes
            else:
                scales += pool.affine_k[row][:, np.unique(place // size)].nbytes
    return payload, scales, dense


@pytest.mark.parametrize("name", CASES)
def test_the_report_counts_the_live_arrays(name):
    method, dtype = CASES[name], jnp.dtype("bfloat16" if name == "kivi" else "float32")
    reserved = 32 if "vl" in name and method.quantize else 0
    pool = build(method, dtype, reserved)
    for row, length in enumerate(LENGTHS):
        report = cache_report(
            TEXT,
            method,
            dtype,
            prompt_tokens=length,
            counts=np.asarray(pool.counts[row]),
            kept_visual=np.asarray(pool.visual[row]),
            prompt_rows=ROWS,
            tail_rows=7,
            reserved_rows=reserved,
        )
        parts = report.payload_bytes, report.scale_bytes, report.dense_bytes
        assert parts == live_bytes(pool, row)
        assert (min(parts[:2]) > 0) == (method.quantize is not None)
        assert report.kept_bytes == sum(parts)
        kept = int(pool.length[row].sum())
        assert kept == sum(report.layer_budgets)
        assert report.effective_bits == pytest.approx(8 * sum(parts) / (kept * 2 * 2 * 8))
        assert report.full_bytes == 3 * length * 2 * 2 * 8 * dtype.itemsize
        assert report.kept_share == report.kept_bytes / report.full_bytes
        large = [leaf for leaf in jax.tree.leaves(pool) if leaf.ndim == 4]
        assert report.allocated_bytes == sum(leaf.nbytes for leaf in large) // len(LENGTHS)
        assert report.tail_bytes == 7 * 3 * 2 * 2 * 8 * dtype.itemsize
        assert (report.label, report.kv_bits) == {
            "akvq": ("full+akvq", "akvq"),
            "vl-cache+akvq": ("vl-cache+akvq", "akvq"),
            "kivi": ("full+kivi", "kivi"),
            "none": ("vl-cache", None),
        }[name]


def test_bytes_by_hand():
    """One layer of 8 kv heads of 128: 96 tokens of a 7B model."""
    text = TextConfig(num_layers=1, num_heads=32, num_kv_heads=8, head_dim=128)
    numbers = 2 * 8 * 128 * 96
    rows = np.array([[96]])

    def bits(quantizer, rows=rows):
        return [8 * part / numbers for part in packed_bytes(text, quantizer, rows)]

    assert bits(RTN(bits=2)) == [2, 0.25]  # 32 bits of scale and shift for 128 numbers
    assert bits(RTN(bits=8, group=32)) == [8, 1]
    assert bits(KIVI()) == [2, 1]  # keys: 32 bits for 32 tokens of a channel
    # The last group of keys is not full: two groups of keys, for 33 tokens.
    codes, scales = packed_bytes(text, KIVI(), np.array([[33]]))
    assert (codes, scales) == (2 * 8 * 33 * 32, 8 * 4 * (2 * 128 + 33 * 4))
    assert bits(AKVQ(tsa_layers=(0,)), np.array([[32, 64]])) == [(4 * 32 + 2 * 64) / 96, 0.25]
    assert packed_bytes(text, None, np.zeros((1, 0), int)) == (0, 0)


def test_a_quantizer_has_the_name_of_the_command_line():
    assert kv_bits(None) is None
    assert kv_bits(RTN(bits=4, transform=True)) == "4"
    assert kv_bits(RTN(bits=4)) == "rtn"
    assert kv_bits(AKVQ(tsa_layers=(1,))) == kv_bits(AKVQ()) == "akvq"


@pytest.mark.parametrize(
    "cache",
    [
        FullCache(),
        FullCache(quantize=AKVQ()),
        VLCache(quantize=RTN(bits=4)),
        FullCache(quantize=KIVI(residual=32)),
        VLCache(),
    ],
    ids=lambda cache: cache.label,
)
def test_the_memory_that_is_foretold_is_that_of_the_arrays(cache):
    config, dtype = tiny_config("llava"), jnp.dtype("bfloat16")
    need = memory_need(config, dtype, cache, rows=512, batch=3, new_tokens=200)
    stages, three = Generate(config, cache, 200).stages, jnp.ones(3, jnp.int32)
    pool = stages.empty_pool(3, 512, dtype)
    state = stages.start(three, three, Generate(config, cache, 200).settings(3), dtype)
    assert need["pool"] == sum(leaf.nbytes for leaf in jax.tree.leaves(pool) if leaf.ndim == 4)
    assert need["tail"] == sum(leaf.nbytes for leaf in (*state.tail.k, *state.tail.v))
    whole = 2 * 3 * 512 * config.text.num_layers * 2 * 8 * 2
    assert need["prefill"] == (0 if cache == FullCache() else whole)
    *parts, total = need.values()
    assert [*need] == ["parameters", "pool", "prefill", "tail", "activations", "total"]
    assert total == sum(parts)
    others = {leaf.ndim for leaf in jax.tree.leaves(pool)} - {4}
    assert max(others) < 4  # what is left out is a few numbers for each layer


def test_a_tenth_has_at_least_six_times_the_slots():
    """Mistral-7B, prompts of 2,048 rows and 128 new tokens, on a device of 141 GB."""
    model, dtype = MODELS["llava-v1.6-mistral-7b"], jnp.dtype("bfloat16")
    own = {"rows": 2048, "new_tokens": 128}
    found = {
        cache: slots_that_fit(model, dtype, cache, 141 * 10**9, **own)
        for cache in (FullCache(), VLCache(0.1), VLCache(0.1, quantize=AKVQ()))
    }
    full, tenth, packed = found.values()
    assert tenth >= 6 * full
    assert packed > tenth
    for cache, slots in found.items():
        need = memory_need(model, dtype, cache, batch=1, **own)
        prompt = 2048 * model.text.num_layers * row_bytes(model.text, dtype)
        each, fixed = need["pool"] + need["tail"], need["parameters"] + need["activations"]
        assert fixed + prompt + slots * each <= 141 * 10**9 < fixed + prompt + (slots + 1) * each
    assert slots_that_fit(model, dtype, FullCache(), 10**9, **own) == 0


def test_ten_percent_at_two_bits_are_under_three_percent():
    """Bytes of a 7B model's cache at 4k tokens, kept and allocated, from shapes alone."""
    text = TextConfig(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, kind="mistral")
    cache, dtype = VLCache(0.1, quantize=AKVQ()).for_model(text), jnp.dtype("bfloat16")
    kept = np.full((32, 1), 410)  # a tenth of 4096, in each layer
    dense = kept // 10 + 15  # the latest, and all pivots at worst
    report = cache_report(
        text,
        cache,
        dtype,
        prompt_tokens=4096,
        counts=np.concatenate([dense, kept - dense], axis=1),
        kept_visual=np.zeros(32),
        prompt_rows=4096,
        tail_rows=1,
    )
    assert report.effective_bits == pytest.approx((16 * 56 + 2.25 * 354) / 410)
    assert report.kept_share == pytest.approx(410 / 4096 * report.effective_bits / 16)
    assert report.kept_share < 0.03
    full = pool_bytes(text, FullCache(), dtype, batch=1, prompt_rows=4096)
    assert full == report.full_bytes
    assert report.allocated_bytes < 0.032 * full  # room for 11 % of the rows


def test_an_answer_counts_what_its_program_made(model_dir):
    """New tokens are packed too: their free rows are part of the pool, and the tail is short."""
    vlm = vlcache_jax.load(model_dir)
    cache = VLCache(0.5, quantize=RTN(bits=4, residual=8, recent=3))
    answer = vlm.generate(picture(70, 40), "what?", max_new_tokens=60, cache=cache)
    report, text = answer.cache, vlm.config.text
    stages = Generate(vlm.config, cache, 60).stages
    row = 2 * text.num_kv_heads * text.head_dim
    assert report.dense_bytes == text.num_layers * 3 * row * 4
    packed = sum(report.layer_budgets) - text.num_layers * 3
    assert report.payload_bytes == packed * row // 2
    assert report.scale_bytes == packed * 2 * text.num_kv_heads * 4
    assert report.tail_bytes == text.num_layers * stages.tail_rows * row * 4
    prompt_rows = vlm.processor(picture(70, 40), "what?").tokens.shape[1]
    pool = stages.empty_pool(1, prompt_rows, jnp.float32)
    large = [leaf.nbytes for leaf in jax.tree.leaves(pool) if leaf.ndim == 4]
    assert report.allocated_bytes == sum(large)
    assert (report.label, report.kv_bits) == ("vl-cache+rtn", "rtn")
