"""The quantizers: the rounding against the paper's formulas in plain numpy, settings, room."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.numpy_quantize import numpy_quantize
from vlcache_jax.cache.budget import Budget, Prompt
from vlcache_jax.cache.packed import arrange
from vlcache_jax.cache.quantize import CLIP, grid, groups, round_to
from vlcache_jax.cache.quantizers import AKVQ, KIVI, RTN, make_quantizer

H = 128
ROWS = 6


def draw(seed, scale, offset, dtype, own=()):
    """Rows [ROWS, H]: normal values of any size and place, constant groups, outliers, one's own."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((ROWS, H)) + offset) * scale
    x[0, :32] = x[0, 0]
    x[1] = rng.choice([0.0, 1.0, -2.5]) * scale
    x[2, rng.integers(H)] = 1e4 * scale
    x[3] = -abs(x[3]) - scale
    x[4] = np.round(x[4] / scale) * scale
    x[5, : len(own)] = own
    return x.astype(np.float32).astype(dtype)


ROWS_OF_ANY_KIND = st.builds(
    draw,
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-30, 1e-6, 1e-2, 1.0, 300.0, 1e20]),
    offset=st.sampled_from([0.0, 1.0, -3.0, 1e4, -1e-3]),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
    # XLA has no subnormals.
    own=st.lists(
        st.floats(-(2.0**99), 2.0**99, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30),
        max_size=9,
    ),
)


def quantize(x, bits, *, group, clip=None):
    """Rows of one width by the library's rule: codes, scales, shifts."""
    levels, clip = 2**bits - 1, CLIP.get(bits, 1.0) if clip is None else clip
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], groups(x.shape[-1], group), -1)
    share, step = jnp.float32(clip), jnp.float32(clip / levels)
    scale, shift = grid(parts.min(-1), parts.max(-1), share, step)
    codes = round_to(parts, scale[..., None], shift[..., None], jnp.float32(levels))
    return codes.reshape(x.shape), scale, shift


@cache
def compiled(bits, group, clip):
    return jax.jit(partial(quantize, bits=bits, group=group, clip=clip))


def assert_exact(found, x, bits, group, clip):
    expected = numpy_quantize(x, bits, group=min(group, H), clip=clip)
    codes, scale, shift = (np.asarray(part) for part in found)
    assert codes.shape == x.shape
    assert codes.dtype == np.uint32
    assert scale.shape == shift.shape == (ROWS, max(1, H // group))
    assert (codes == expected.codes).all()
    assert (scale == expected.scale).all()
    assert (shift == expected.shift).all()
    assert codes.max() < 2**bits


@pytest.mark.parametrize(
    ("bits", "group", "clip"),
    [
        (2, 8, None),
        (2, 32, 1.0),
        (2, 128, None),
        (4, 8, 0.5),
        (4, 128, None),
        (8, 32, None),
        (8, 512, 0.7),
    ],
)
@settings(max_examples=20, deadline=None)
@given(x=ROWS_OF_ANY_KIND)
def test_quantize_is_the_papers_quantizer_bit_for_bit(x, bits, group, clip):
    assert_exact(compiled(bits, group, clip)(jnp.asarray(x)), x, bits, group, clip)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_it_is_the_same_when_it_is_not_compiled(dtype):
    x = draw(3, 1e-2, 1.0, dtype)
    for bits in (2, 4, 8):
        assert_exact(quantize(jnp.asarray(x), bits, group=32), x, bits, 32, None)


def test_a_constant_group_has_scale_one_and_its_value_as_shift():
    x = np.full((1, H), -2.5, np.float32)
    x[0, 64:] = 3
    codes, scale, shift = compiled(2, 64, 0.5)(x)
    assert not np.asarray(codes).any()
    assert np.asarray(scale).tolist() == [[1, 1]]
    assert np.asarray(shift).tolist() == [[-2.5, 3.0]]


@settings(max_examples=60, deadline=None)
@given(x=ROWS_OF_ANY_KIND, case=st.sampled_from([(2, 8), (2, 128), (4, 128), (8, 32)]))
def test_the_error_inside_of_the_clipped_range_and_outside(x, case):
    """Inside: half a step, and the rounding of the shift. Outside: what the end of the range is."""
    bits, group = case
    found = compiled(bits, group, None)(jnp.asarray(x))
    codes, scale, shift = (np.asarray(part).astype(np.float64) for part in found)
    clip = {2: 0.8}.get(bits, 1.0)
    parts = x.astype(np.float64).reshape(ROWS, -1, group)
    scale, shift = scale[..., None], shift[..., None]
    read = codes.reshape(parts.shape) * scale + shift
    low, high = parts.min(-1, keepdims=True), parts.max(-1, keepdims=True)
    step_of_shift = 2.0**-7 * np.abs(shift)  # a bfloat16 has 8 significant bits
    inside = (parts >= clip * low) & (parts <= clip * high) & (high > low)
    bound = scale * 0.5001 + step_of_shift  # with float32's own rounding
    assert (np.abs(read - parts) <= bound)[inside].all()
    above, below = parts > clip * high + bound, parts < clip * low - bound
    own_codes = codes.reshape(parts.shape)
    assert (own_codes[above & (high > low)] == 2**bits - 1).all()
    assert (own_codes[below & (high > low)] == 0).all()
    constant = np.broadcast_to(high == low, parts.shape)
    assert (np.abs(read - parts) <= step_of_shift + 0 * parts)[constant].all()


def test_saturation_at_both_ends():
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    x = np.concatenate([x, x])[None]
    codes, scale, shift = (np.asarray(part)[0] for part in compiled(2, 64, 0.5)(x))
    read = codes * np.repeat(scale, 64) + np.repeat(shift, 64)
    read, codes = read[:64], codes[:64]
    assert read.min() == pytest.approx(-0.5, abs=2**-8)
    assert read.max() == pytest.approx(0.5, abs=2**-7)
    assert set(codes[:16]) == {0}
    assert set(codes[-16:]) == {3}


# Settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RTN(bits=3), r"bits=\[3\] must be one of \(2, 4, 8\)"),
        (lambda: RTN(bits=16), "bits"),
        (lambda: RTN(bits=0), "bits"),
        (lambda: RTN(recent=-1), "recent=-1 must be at least 0"),
        (lambda: RTN(group=0), "group=0 must be at least 1"),
        (lambda: RTN(clip=0.0), "clip=0.0 must be above 0"),
        (lambda: RTN(clip=2.0), "at most 1"),
        (lambda: RTN(clip=float("nan")), "clip=nan"),
        (lambda: RTN(residual=0), "residual=0 must be at least 1"),
        (lambda: AKVQ(bits=3), "bits"),
        (lambda: AKVQ(text_bits=3), r"text_bits=3 must be one of \(2, 4, 8\)"),
        (lambda: AKVQ(text_bits=16), "text_bits=16"),
        (lambda: AKVQ(bits=4, text_bits=2), "text_bits=2 must be .* at least bits=4"),
        (lambda: AKVQ(recent=-1), "recent=-1"),
        (lambda: AKVQ(pivots=-1), "pivots=-1"),
        (lambda: AKVQ(recent_ratio=1.5), "recent_ratio=1.5 from 0 to 1"),
        (lambda: AKVQ(recent_ratio=-0.1), "recent_ratio=-0.1"),
        (lambda: AKVQ(group=-4), "group=-4"),
        (lambda: AKVQ(tsa_layers=(0, 4)).for_decoder("llama", 4), r"tsa_layers \[4\] are not"),
        (
            lambda: AKVQ(tsa_layers=(-1,)).for_decoder("mistral", 4),
            r"tsa_layers\[0\]=-1 must be at least 0",
        ),
        (lambda: KIVI(bits=5), "bits"),
        (lambda: KIVI(recent=-1), "recent=-1"),
        (lambda: KIVI(group=0), "group=0"),
        (lambda: KIVI(group=24), "group=24 must be"),
        (lambda: KIVI(group=48), "group=48 must be"),  # word-rows are packed by powers of two
        (lambda: KIVI(group=4096), "group=4096 must be"),
        (lambda: groups(8, 3), "multiple of group=3"),
        (lambda: groups(8, 0), "group=0"),
        (lambda: groups(96, 64), "head_dim=96 must be a multiple of group=64"),
        (lambda: make_quantizer("3"), "choose one of 2, 4, 8, akvq, kivi, or 16"),
    ],
)
def test_bad_settings_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_layers_that_the_paper_names():
    assert AKVQ().for_decoder("llama", 32).tsa_layers == (0, 1)
    assert AKVQ().for_decoder("llama", 1).tsa_layers == (0,)
    assert AKVQ().for_decoder("mistral", 32).tsa_layers == ()
    assert AKVQ(tsa_layers=(5,)).for_decoder("llama", 32).tsa_layers == (5,)
    assert AKVQ(tsa_layers=()).for_decoder("llama", 32).tsa_layers == ()
    assert RTN().for_decoder("llama", 32) == RTN()


def test_widths_of_runs_and_of_new_tokens():
    akvq = AKVQ(tsa_layers=(1,), residual=32)
    assert akvq.widths == (4, 2)
    assert akvq.runs(0) == (4, 2, 2)
    assert akvq.runs(1) == (4, 2, 4)
    assert replace(akvq, residual=None).runs(1) == (4, 2)
    assert replace(akvq, tsa_layers=()).runs(1) == (2, 2)
    assert AKVQ(text_bits=2, tsa_layers=(0,)).widths == (2,)
    assert RTN(bits=8).runs(0) == (8,)
    assert KIVI(bits=4, residual=1).runs(3) == (4, 4)


def test_names_of_the_command_line():
    assert make_quantizer(None) is make_quantizer("16") is None
    assert make_quantizer("4") == RTN(bits=4, transform=True)
    assert make_quantizer("akvq") == AKVQ()
    assert make_quantizer("kivi") == KIVI()
    assert hash(make_quantizer("kivi")) == hash(KIVI())


# Room


ROOMS = [
    (AKVQ(tsa_layers=(0, 2), recent=9, pivots=3), 1.0, 4, 301),
    (AKVQ(tsa_layers=(1,), pivots=5), 0.3, 4, 301),
    (AKVQ(tsa_layers=(0, 1, 2, 3, 4), pivots=0, recent_ratio=1.0), 0.5, 5, 97),
    (AKVQ(tsa_layers=(), pivots=2, recent_ratio=0.0), "1tok", 7, 33),
    (RTN(bits=8, recent=400), 1.0, 3, 97),
    (RTN(bits=4, recent=11), "40tok", 5, 301),
    (KIVI(recent=8), 1.0, 4, 301),
    (KIVI(bits=8, recent=0, group=128), 0.4, 6, 301),
    (KIVI(bits=4, group=16, recent=3), "1tok", 3, 1),
]


@partial(jax.jit, static_argnums=(0, 5))
def counts_of(quantizer, kept, budgets, prompt, salience, evicts):
    return arrange(quantizer, kept, budgets, prompt, salience, evicts)[1]


@pytest.mark.parametrize(("quantizer", "budget", "layers", "rows"), ROOMS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(["even", "one layer", "random", "full"]))
def test_every_arrangement_fits(quantizer, budget, layers, rows, seed, shape):
    """Lengths, budgets and kept tokens of all kinds: no pool overflows."""
    rng, batch, heads = np.random.default_rng(seed), 16, 2
    limit = Budget.parse(budget)
    m = rng.integers(1, rows + 1, batch)
    m[:2] = 1, rows
    most = layers * np.asarray(limit.data.most(jnp.asarray(m, jnp.int32)))  # of all layers together
    k = np.ones((batch, layers), int)
    for own, length, total in zip(k, m, most, strict=True):
        if limit.keeps_all:
            own[:] = length
        elif shape in ("even", "full"):
            own[:] = total // layers
        elif shape == "one layer":
            own[rng.integers(layers)] += min(length - 1, total - layers)
        else:
            for _ in range(total - layers):
                own[rng.integers(layers)] += 1
            np.minimum(own, length, out=own)
    kept = np.zeros((batch, layers, heads, rows), bool)
    for b, layer, head in np.ndindex(kept.shape[:3]):
        kept[b, layer, head, rng.permutation(m[b])[: k[b, layer]]] = True
    visual = rng.random((batch, rows)) < rng.choice([0.0, 0.5, 1.0])
    prompt = Prompt(jnp.asarray(m, jnp.int32), jnp.asarray(visual), layers, limit.data)
    salience = jnp.asarray(rng.random((batch, layers, rows)), jnp.float32)
    counts = counts_of(
        quantizer, kept, jnp.asarray(k, jnp.int32), prompt, salience, not limit.keeps_all
    )
    counts = np.asarray(counts)
    assert (counts >= 0).all()
    assert (counts.sum(-1) == k).all()
    room = quantizer.capacity(limit, layers, rows)
    assert counts[..., 0].sum(-1).max() <= room.dense
    each = np.array([32 // bits for bits in quantizer.widths])
    runs = -(-counts[..., 1:] // (each * quantizer.align)) * quantizer.align
    assert runs.sum((1, 2)).max() <= room.words


@given(
    layers=st.integers(1, 80),
    rows=st.integers(1, 33_000),
    budget=st.sampled_from([1.0, 0.01, 0.1, 0.5, "1tok", "256tok"]),
    recent=st.integers(0, 300),
    pivots=st.integers(0, 20),
    ratio=st.floats(0, 1),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_the_room_is_enough_for_the_worst_of_any_size(
    layers, rows, budget, recent, pivots, ratio, data
):
    """By integers alone: as many rows as the budget allows, all runs as uneven as can be."""
    limit = Budget.parse(budget)
    tsa = tuple(range(data.draw(st.integers(0, layers))))
    quantizer = data.draw(
        st.sampled_from(
            [
                AKVQ(recent=recent, pivots=pivots, recent_ratio=ratio, tsa_layers=tsa),
                RTN(bits=4, recent=recent),
                KIVI(group=64, recent=recent),
            ]
        )
    )
    each = limit.layer_rows(rows)
    k = np.full(layers, each)
    if not limit.keeps_all:  # some layers keep everything, others next to nothing
        share = data.draw(st.floats(0, 1))
        whole = int(share * layers * (each - 1) / max(rows - 1, 1))
        k[:] = max(1, (layers * each - whole * rows) // max(layers - whole, 1))
        k[:whole] = rows
        k = np.minimum(k, rows)[::-1] if data.draw(st.booleans()) else np.minimum(k, rows)
    padded = np.zeros(80, np.int32)  # one shape for all, compiled once
    padded[:layers] = k
    latest = np.asarray(quantizer.recent_rows(jnp.asarray(padded), not limit.keeps_all))[:layers]
    room = quantizer.capacity(limit, layers, rows)
    pivoted = pivots if isinstance(quantizer, AKVQ) else 0
    assert np.minimum(k, latest + pivoted).sum() <= room.dense
    widest, align = 32 // quantizer.widths[0], quantizer.align
    salient = np.arange(layers) < len(tsa) if isinstance(quantizer, AKVQ) else np.ones(layers)
    per_word = np.where(salient, widest, 32 // quantizer.widths[-1])
    words = -(-(k - latest) // (per_word * align)) * align
    assert words.sum() + layers * (len(quantizer.widths) - 1) <= room.words
    # Not wasteful either: without alignment and blocks at most what the rows themselves need.
    assert (room.words - 64 - layers * len(quantizer.widths) * align - 2) <= layers * rows / (
        32 / quantizer.widths[0]
    ) + 2


@pytest.mark.parametrize("quantizer", [AKVQ(tsa_layers=(0,), residual=8), KIVI(residual=3), RTN()])
def test_reserved_rows_are_whole_words_and_groups(quantizer):
    for new_rows in (0, 1, 15, 16, 17, 600, 1000):
        reserved = quantizer.capacity(Budget(share=1.0), 3, 50, new_rows).reserved
        assert reserved * 32 // quantizer.widths[0] >= new_rows
        assert reserved % quantizer.align == 0
        assert (reserved == 0) == (new_rows == 0)
