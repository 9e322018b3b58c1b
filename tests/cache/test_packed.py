"""Packed pools against plain numpy: which row has how many bits, and every row unpacked by hand."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.hadamard import transform
from tests.cache.numpy_quantize import (
    by_channel,
    find_rows,
    hadamard,
    numpy_quantize,
    transformed,
)
from vlcache_jax import H2O, VLCache
from vlcache_jax.cache import packed
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import Plan
from vlcache_jax.cache.methods import as_method
from vlcache_jax.cache.quantizers import AKVQ, KIVI, RTN

B, L, K, T = 6, 2, 2, 37
F, HALF = np.float32, ml_dtypes.bfloat16
LENGTHS = np.array([37, 1, 20, 13, 36, 2], np.int32)
# Of each prompt: first and last visual token. Only the first and the fifth end with text.
IMAGES = [(3, 21), None, (2, 20), None, (0, 30), (1, 2)]
VISUAL = np.zeros((B, T), bool)
for row, image in zip(VISUAL, IMAGES, strict=True):
    row[slice(*image or (0, 0))] = True

CASES = {
    "akvq": (AKVQ(tsa_layers=(0,), recent=4, pivots=3, group=8), 16, F),
    "everything": (VLCache(1.0, quantize=AKVQ(tsa_layers=(), recent=5, pivots=2)), 24, F),
    "vl-cache": (VLCache(0.3, quantize=AKVQ(tsa_layers=(1,), pivots=3)), 16, HALF),
    "shared heads": (
        VLCache(
            0.6,
            shared_heads=True,
            quantize=AKVQ(tsa_layers=(1,), bits=4, text_bits=8, recent_ratio=0.25, clip=0.9),
        ),
        16,
        F,
    ),
    "one token": (VLCache("1tok", quantize=AKVQ(tsa_layers=(0,))), 16, F),
    "rtn": (RTN(bits=8, recent=3, group=4, transform=True), 24, F),
    "kivi": (KIVI(group=16, recent=3), 32, F),
    "h2o": (H2O(0.7, quantize=KIVI(bits=4, group=8, recent=2, clip=0.9)), 16, HALF),
}
"""A setting, the head dim, and the type of the cache."""


def draw(head_dim, dtype):
    """Keys whose transform is exact in float32, any values; NaN wherever no prompt is."""
    rng = np.random.default_rng(0)
    k = rng.integers(-64, 65, (B, K, L, T, head_dim)).astype(F) / 8
    v = rng.standard_normal((B, K, L, T, head_dim)).astype(F)
    v[0, 0, 1, 5] = 0.75  # a group of equal values
    k[0, 1, 1, 30, 7] = 5120.0  # an outlier
    beyond = np.arange(T) >= LENGTHS[:, None]
    for array in (k.swapaxes(1, 3), v.swapaxes(1, 3)):
        array[beyond] = np.nan
    room = ((0, 0), (0, 0), (0, 5), (0, 0))  # rows behind the last layer's
    return [
        np.pad(x.reshape(B, K, L * T, head_dim), room, constant_values=np.nan).astype(dtype)
        for x in (k, v)
    ]


def draw_plan(method):
    """Budgets that differ between layers, any tokens of each head, and saliences with ties."""
    rng, heads = np.random.default_rng(1), 1 if method.shared_heads else K
    salience = rng.random((B, L, T)).astype(F)
    salience[4] = 2
    salience[np.broadcast_to((np.arange(T) >= LENGTHS[:, None])[:, None], salience.shape)] = np.nan
    budgets = np.repeat(LENGTHS[:, None], L, axis=1)
    if method.limit.keeps_all:
        return Plan(jnp.asarray(budgets), None, jnp.asarray(salience))
    even = np.asarray(method.limit.data.even_rows(jnp.asarray(LENGTHS)))
    budgets = np.stack([even + even // 4, even - even // 4], axis=1)
    budgets = np.clip(budgets, 1, LENGTHS[:, None])
    order = np.zeros((B, L, heads, T), int)
    for b, layer, head in np.ndindex(order.shape[:3]):
        order[b, layer, head] = [*rng.permutation(LENGTHS[b]), *range(LENGTHS[b], T)]
    budgets, order = (jnp.asarray(x, jnp.int32) for x in (budgets, order))
    return Plan(budgets, order, jnp.asarray(salience))


@cache
def run(case):
    """The pool that the library makes, on the host, and what it is made of."""
    setting, head_dim, dtype = CASES[case]
    method = as_method(setting)
    (k, v), plan = draw(head_dim, dtype), draw_plan(method)
    prompt = Prompt(jnp.asarray(LENGTHS), jnp.asarray(VISUAL), L, method.limit.data)
    pool = jax.jit(lambda k, v, plan: method.build(k, v, plan, prompt))(k, v, plan)
    kept = np.broadcast_to(plan.kept(prompt), (B, L, K, T))
    return method, kept, jax.device_get(pool), k, v, np.asarray(plan.salience)


def wanted_bits(method, layer, kept, visual, m, salience):
    """Bits that the kept positions of a head should have at least, in their order."""
    quantizer, evicts = method.quantize, not method.limit.keeps_all
    count = len(kept)
    if isinstance(quantizer, KIVI):
        older = max(0, count - quantizer.recent) // quantizer.group * quantizer.group
        return [quantizer.bits] * older + [16] * (count - older)
    if isinstance(quantizer, RTN):
        latest = min(quantizer.recent, count)
        return [quantizer.bits] * (count - latest) + [16] * latest
    latest = min(quantizer.recent, count)
    if evicts:
        latest = math.floor(quantizer.recent_ratio * count + 1e-9)
    pivots = sorted(range(m), key=lambda j: (-salience[j], j))[: quantizer.pivots]
    bits = []
    for place, position in enumerate(kept):
        if place >= count - latest:
            bits.append(16)
        elif layer in quantizer.tsa_layers:
            bits.append(quantizer.bits if visual[position] else quantizer.text_bits)
        else:
            bits.append(16 if position in pivots else quantizer.bits)
    return bits


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (np.asarray(one).astype(F) == other.astype(F)).all()


def assert_packed(quantizer, bits, keys, values, k, v):
    """These rows are quantized as numpy does it."""
    group = min(quantizer.group, k.shape[1])
    assert len(keys.codes) == len(values.codes) == len(k)
    if len(k):
        rule = {"bits": bits, "group": group, "clip": quantizer.clip}
        assert_same(values, numpy_quantize(v, **rule))
        by_token = quantizer.key_group is None
        assert_same(keys, numpy_quantize(k, **rule) if by_token else by_channel(k, **rule))


@pytest.mark.parametrize("case", CASES)
def test_every_row_of_the_pool(case, monkeypatch):
    if case == "rtn":
        monkeypatch.setattr(packed, "PACKED_AT_ONCE", 48)  # two parts, the last one overlaps
    method, kept, pool, k, v, salience = run(case)
    quantizer, differ = method.quantize, 0
    assert quantizer is not None
    widths = (16, *quantizer.widths)
    for b, layer in np.ndindex(B, L):
        positions = [np.flatnonzero(kept[b, layer, head]) for head in range(K)]
        wanted = [
            np.array(wanted_bits(method, layer, own, VISUAL[b], LENGTHS[b], salience[b, layer]))
            for own in positions
        ]
        differ += wanted[0].tolist() != wanted[1].tolist()
        # As many rows of a width and above as the head that needs most of them.
        counts = np.diff(
            [max((own >= least).sum() for own in wanted) for least in widths], prepend=0
        )
        assert pool.counts[b, layer].tolist() == counts.tolist()
        assert pool.length[b, layer] == len(positions[0])
        for head in range(K):
            order = np.lexsort((positions[head], -wanted[head]))
            assert (np.repeat(widths, counts) >= wanted[head][order]).all()
            rows = layer * T + positions[head][order]
            own_k, own_v = k[b, head, rows], v[b, head, rows]
            if quantizer.transform:
                own_k = transformed(own_k)
            found = find_rows(pool, b, layer, head)
            ends = np.cumsum(counts)
            assert_same((found.dense_k, found.dense_v), (own_k[: ends[0]], own_v[: ends[0]]))
            for run_found, begin, end in zip(found.packed, ends, ends[1:], strict=False):
                assert_packed(quantizer, *run_found, own_k[begin:end], own_v[begin:end])
    assert bool(differ) == (case in ("vl-cache", "one token"))  # heads that need other widths
    assert np.allclose(pool.visual, (kept & VISUAL[:, None, None]).sum(-1).mean(-1))


@pytest.mark.parametrize("case", CASES)
def test_no_layer_is_larger_than_the_most_that_one_can_be(case):
    pool = run(case)[2]
    each = np.array([32 // bits for bits in pool.quantizer.widths])
    words = np.sum(-(-pool.rows // each), axis=-1)
    assert pool.dense.length.max() <= pool.dense.most <= T
    assert words.max() <= pool.most_words <= pool.words_k.shape[2]


def test_the_payload_of_akvq_alone():
    """2 + 14 n16 / m + 2 n4 / m bits for each value (AKVQ-VL, section 3)."""
    method, _, pool, *_, salience = run("akvq")
    for b, layer in np.ndindex(B, L):
        m = LENGTHS[b]
        wanted = wanted_bits(method, layer, range(m), VISUAL[b], m, salience[b, layer])
        found = find_rows(pool, b, layer, 0)
        payload = 16 * len(found.dense_k) + sum(bits * len(x.codes) for bits, x, _ in found.packed)
        n16, n4 = wanted.count(16), wanted.count(4)
        assert payload / m == pytest.approx(2 + 14 * n16 / m + 2 * n4 / m)


@pytest.mark.parametrize("head_dim", [8, 24, 128])
def test_the_transform_is_orthonormal_and_its_own_inverse(head_dim):
    matrix = hadamard(head_dim)
    assert np.allclose(matrix @ matrix.T, np.eye(head_dim))
    x = np.random.default_rng(0).standard_normal((3, head_dim)).astype(F)
    assert np.allclose(transform(jnp.asarray(x)), x @ matrix, atol=1e-5)
    assert np.allclose(transform(transform(jnp.asarray(x))), x, atol=1e-5)
