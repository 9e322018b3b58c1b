"""Scores made of other scores, and sampled rows, against dense attention in plain numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax import Custom, Prompt
from vlcache_jax.cache import score as scoring
from vlcache_jax.cache.blended import Blend, Pooled, PowerMean, ValueNorm, normalized
from vlcache_jax.cache.budget import Budget
from vlcache_jax.cache.score import (
    AllRows,
    ColumnSum,
    Ends,
    LastRows,
    Layer,
    Look,
    Noise,
    PooledWindow,
    PostVisionRows,
    RowMaximum,
    ScoreFunction,
)
from vlcache_jax.cache.windows import RowsInFront

N, K, T, H = 4, 2, 40, 8
LENGTHS = (40, 33, 21, 1)
PICTURES = ([(3, 20)], [(0, 8), (12, 30)], [], [])
"""One picture, several, none, a prompt of one token."""


def prompts():
    visual = np.zeros((4, T), bool)
    for row, spans in enumerate(PICTURES):
        for first, stop in spans:
            visual[row, first:stop] = True
    return visual


@pytest.fixture(scope="module")
def layer():
    """A layer of four prompts; what stands behind them is NaN."""
    rng = np.random.default_rng(0)
    behind = (np.arange(T) >= np.array(LENGTHS)[:, None])[:, :, None, None]
    q, k, v = (
        jnp.asarray(np.where(behind, np.nan, 2 * rng.normal(size=(4, T, heads, H))), jnp.float32)
        for heads in (N, K, K)
    )
    prompt = Prompt(jnp.array(LENGTHS), jnp.asarray(prompts()), 1, Budget.parse(0.5).data)
    return Layer(0, q, k, v, prompt)


def attention(layer, b):
    """Attention of every row of a prompt, summed over a group: float64 [K, m, m]."""
    m = LENGTHS[b]
    q, k = (np.asarray(x[b, :m], float) for x in (layer.q, layer.k))
    found = np.zeros((K, m, m))
    for head, row in np.ndindex(N, m):
        logits = k[: row + 1, head * K // N] @ q[row, head] / np.sqrt(H)
        weights = np.exp(logits - logits.max())
        found[head * K // N, row, : row + 1] += weights / weights.sum()
    return found


def sums(layer, b, window):
    """Column sums [K, m] of the last rows: of all, of those behind the pictures, or of so many."""
    m, spans = LENGTHS[b], PICTURES[b]
    behind = m - max((stop for _, stop in spans), default=m)
    rows = {"all": m, "post-vision": min(m, behind or 32)}.get(window, window)
    return attention(layer, b)[:, m - rows :].sum(1)


def shares(scores):
    return np.stack(
        [head / head.sum() if head.sum() else 0 * head + 1 / len(head) for head in scores]
    )


def pooled(scores, kernel):
    m, side = scores.shape[1], kernel // 2
    around = [[scores[:, j] for j in range(i - side, i + side + 1) if 0 <= j < m] for i in range(m)]
    return np.stack([np.sum(near, axis=0) / kernel for near in around], axis=1)


def norms(layer, b):
    return np.sqrt((np.asarray(layer.v[b, : LENGTHS[b]], float) ** 2).sum(-1)).T


POST, ALL = ColumnSum(), ColumnSum(AllRows())
SCORES = {
    "blend": (
        Blend(POST, ALL, 0.3),
        lambda x, b: 0.7 * shares(sums(x, b, "post-vision")) + 0.3 * shares(sums(x, b, "all")),
    ),
    "three terms": (
        Blend(Blend(ALL, POST, 0.5), ValueNorm(ALL), 0.25),
        lambda x, b: (
            0.75 * shares((shares(sums(x, b, "all")) + shares(sums(x, b, "post-vision"))) / 2)
            + 0.25 * shares(sums(x, b, "all") * norms(x, b))
        ),
    ),
    "power mean": (
        PowerMean((POST, ALL, ValueNorm(ALL)), 0.25, (2, 1, 0.5)),
        lambda x, b: (
            np.average(
                [
                    shares(scores) ** 0.25
                    for scores in (
                        sums(x, b, "post-vision"),
                        sums(x, b, "all"),
                        sums(x, b, "all") * norms(x, b),
                    )
                ],
                axis=0,
                weights=(2, 1, 0.5),
            )
            ** 4
        ),
    ),
    "value norm": (ValueNorm(POST), lambda x, b: sums(x, b, "post-vision") * norms(x, b)),
    "pooled": (Pooled(ALL, 7), lambda x, b: pooled(sums(x, b, "all"), 7)),
    "pooled norm": (
        Pooled(ValueNorm(POST), 3),
        lambda x, b: pooled(sums(x, b, "post-vision") * norms(x, b), 3),
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_what_numpy_says(name, layer):
    score, expected = SCORES[name]
    found = np.asarray(score(layer))
    for b, m in enumerate(LENGTHS):
        np.testing.assert_allclose(found[b, :, :m], expected(layer, b), rtol=1e-4, atol=1e-6)
        own = {x: getattr(layer, x)[b : b + 1] for x in ("q", "k", "v")}
        prompt = replace(
            layer.prompt,
            length=layer.prompt.length[b : b + 1],
            visual=layer.prompt.visual[b : b + 1],
        )
        alone = score(replace(layer, prompt=prompt, **own))
        np.testing.assert_array_equal(alone[0, :, :m], found[b, :, :m])


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("budget", ["1tok", "9tok", 0.3])
def test_what_is_kept_does_not_depend_on_the_padding(name, budget, layer):
    method = Custom(budget, score=SCORES[name][0], allocation="uniform")
    prompt = replace(layer.prompt, budget=method.limit.data)
    kept = []
    for beyond in (jnp.nan, 0.0, jnp.inf):
        behind = ~prompt.inside[:, :, None, None]
        parts = {x: jnp.where(behind, beyond, getattr(layer, x)) for x in ("q", "k", "v")}
        seen = method.observe(replace(layer, prompt=prompt, **parts))
        plan = method.plan(type(seen).stack([seen]), prompt)
        kept.append(np.asarray(plan.kept(prompt)))
        assert (kept[-1].sum(-1) == np.asarray(plan.budgets)[..., None]).all()
        assert not (kept[-1] & ~np.asarray(prompt.inside)[:, None, None]).any()
    assert (kept[0] == kept[1]).all()
    assert (kept[0] == kept[2]).all()


@settings(max_examples=80, deadline=None)
@given(
    scores=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9),
    beyond=st.sampled_from([0.0, np.nan, np.inf, -np.inf]),
)
def test_shares_of_a_sum(scores, beyond):
    m, worth = len(scores), np.array(scores, float)
    worth -= min(worth.min(), 0)
    worth *= worth.sum() > 2.0**-120  # below that all count as alike
    row = jnp.asarray([*scores, beyond, beyond], jnp.float32)
    found = np.asarray(_normalized(row, jnp.arange(m + 2) < m))
    np.testing.assert_allclose(found[:m], shares(worth[None])[0], rtol=1e-4, atol=1e-6)
    assert found[:m].sum() == pytest.approx(1, rel=1e-5)
    assert (found[m:] == 0).all()


_normalized = jax.jit(normalized)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0, 0, 0, 0], [0.25] * 4),
        ([-3, -3, -3, -3], [0.25] * 4),
        ([5, 5, 5, 5], [0.25] * 4),
        ([-np.inf, 1, np.nan, 3], [0, 0.25, 0, 0.75]),
        ([-np.inf, -1, np.nan, 3], [0, 0, 0, 1]),
        ([np.inf, 1, np.inf, -4], [0.5, 0, 0.5, 0]),
        ([np.nan] * 4, [0.25] * 4),
        ([-np.inf] * 4, [0.25] * 4),
        ([np.inf] * 4, [0.25] * 4),
        ([1e-42] * 4, [0.25] * 4),
        ([3e38, 3e38, 0, 0], [0.5, 0.5, 0, 0]),
    ],
)
def test_shares_of_any_scores(scores, expected):
    found = normalized(jnp.asarray(scores, jnp.float32), jnp.ones(4, bool))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-30)


def nothing(layer):
    return jnp.zeros((4, K, T))


def test_a_term_without_differences_changes_nothing(layer):
    for constant in (nothing, lambda layer: nothing(layer) + 3, lambda layer: nothing(layer) - 3):
        blend = Blend(POST, ScoreFunction(constant), 0.5)(layer)
        for b, m in enumerate(LENGTHS):
            want = shares(sums(layer, b, "post-vision")) / 2 + 0.5 / m
            np.testing.assert_allclose(blend[b, :, :m], want, rtol=1e-4)


def test_every_window_is_observed_once(layer, monkeypatch):
    seen = []

    def counted(q, k, start, lengths, **options):
        seen.append((q.shape[1], options["threshold"], options["maxima"]))
        return window_scores(q, k, start, lengths, **options)

    window_scores = scoring.window_scores
    monkeypatch.setattr(scoring, "window_scores", counted)
    window = ValueNorm(PooledWindow(LastRows(4)))
    score = Blend(Blend(Blend(POST, ALL), Blend(Pooled(ALL), window)), RowMaximum(AllRows()))
    method = Custom(0.5, score=score, allocation="sparsity")
    windows = PostVisionRows(), AllRows(), LastRows(4)
    looks = [*map(Look, windows), Look(AllRows(), maxima=True), Look(PostVisionRows(), 0.01)]
    assert method.windows() == looks
    method.observe(layer)
    assert sorted(seen, key=str) == [(4, None, False), (40, 0.01, False), (40, None, True)]


def test_the_windows_of_a_score():
    assert Noise().looks == Ends().looks == Blend(Noise(), Noise()).looks == ()
    assert Blend(Noise(), Pooled(POST)).window == PostVisionRows()
    assert Blend(ALL, POST).window is None
    assert Blend(ALL, POST).looks == (Look(AllRows()), Look(PostVisionRows()))
    assert Blend(ALL, RowMaximum(AllRows())).window == AllRows()
    assert ValueNorm(Pooled(ALL)).window == AllRows()


def test_what_is_always_kept(layer):
    rows = jnp.array([[20], [10], [3], [1]])
    blend = Blend(ColumnSum(recent_ratio=0.5), PooledWindow(), recent_ratio=0.2)
    assert blend.always(rows, layer.prompt)[1].tolist() == [[4], [2], [0], [0]]
    for inner in (ColumnSum(recent_ratio=0.5), PooledWindow(), Blend(ALL, POST, recent_ratio=0.3)):
        for score in (Pooled(inner), ValueNorm(inner), Pooled(ValueNorm(inner))):
            for one, other in zip(
                score.always(rows, layer.prompt), inner.always(rows, layer.prompt), strict=True
            ):
                assert one.tolist() == other.tolist()
    assert Custom(score=blend, recent_ratio=0.4).rules()[0] == replace(blend, recent_ratio=0.4)


def test_bad_settings_are_refused(layer):
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="weight="):
            Blend(ALL, POST, wrong)
    with pytest.raises(ValueError, match="recent_ratio="):
        Blend(ALL, POST, recent_ratio=2)
    with pytest.raises(ValueError, match="1 weights for 2 terms"):
        PowerMean((ALL, POST), weights=(1,))
    with pytest.raises(ValueError, match="must be above 0"):
        PowerMean((ALL, POST), weights=(1, 0))
    with pytest.raises(ValueError, match="terms must be"):
        PowerMean(())
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="power="):
            PowerMean((ALL,), wrong)
    for wrong in (0, 4, -1):
        with pytest.raises(ValueError, match="must be odd"):
            Pooled(ALL, wrong)
    for score in (Blend(ALL, Ends()), ValueNorm(Ends()), Pooled(Ends())):
        with pytest.raises(ValueError, match="Ends keeps tokens by their position alone"):
            score(layer)


def spread(m, spans, sample):
    """The rows that are taken, and how many each of them counts for."""
    n = max((stop for _, stop in spans), default=0)
    s = min(n, sample)
    ends = [(i + 1) * n // s for i in range(s)]
    return [end - 1 for end in ends] + list(range(n, m)), [n / max(s, 1)] * s + [1] * (m - n)


@pytest.mark.parametrize("sample", [1, 3, 8, 20, 29, 30, 40, 256])
def test_sampled_rows_stand_for_all(sample, layer):
    window = AllRows(sample)
    seen = layer.watch(window, 0.01)
    for b, m in enumerate(LENGTHS):
        rows, counts = spread(m, PICTURES[b], sample)
        every = attention(layer, b)
        expected = np.einsum("krt,r->kt", every[:, rows], counts)
        np.testing.assert_allclose(seen.scores[b, :, :m], expected, rtol=1e-4, atol=1e-5)
        assert np.asarray(seen.scores)[b, :, :m].sum() == pytest.approx(N * m, rel=1e-4)
        assert (np.asarray(seen.visible)[b] == sum(row + 1 for row in rows)).all()
        position, s, n = (np.asarray(each)[b] for each in window.taken(layer.prompt))
        assert position[position < m].tolist() == rows
        assert (s, n) == (min(n, sample), max((stop for _, stop in PICTURES[b]), default=0))
    if sample >= 30:  # the last picture's end: every row is taken
        for one, other in zip(seen, layer.watch(AllRows(), 0.01), strict=True):
            np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 300), behind=st.integers(0, 60), sample=st.integers(1, 400))
def test_rows_are_spread_evenly(n, behind, sample):
    m, bucket = max(n + behind, 1), 384
    visual = (np.arange(bucket) == n - 1)[None]
    prompt = Prompt(jnp.array([m]), jnp.asarray(visual), 1, Budget.parse(0.5).data)
    position, s, found = AllRows(sample).taken(prompt)
    rows = position[0][position[0] < m].tolist()
    assert (int(s[0]), int(found[0])) == (min(n, sample), n)
    assert rows[int(s[0]) :] == list(range(n, m))
    assert (np.diff(position[0]) > 0).all()
    if n:
        pieces = np.diff([-1, *rows[: int(s[0])]])
        assert rows[int(s[0]) - 1] == n - 1
        assert pieces.sum() == n
        assert pieces.max() - pieces.min() <= 1


@pytest.mark.parametrize("count", [2, 6, 8, 16, 26, 40, 256])
def test_rows_in_front_of_the_question(count, layer):
    """They end where the rows of the question begin; with no picture these are the last 32."""
    seen = layer.watch(RowsInFront(count), 0.01)
    for b, (m, spans) in enumerate(zip(LENGTHS, PICTURES, strict=True)):
        behind = m - max((stop for _, stop in spans), default=m)
        n = m - min(m, behind or 32)
        before = max(n - count // 2, 0)
        some = min(before, count // 2)
        rows = [(i + 1) * before // some - 1 for i in range(some)] + list(range(before, n))
        expected = attention(layer, b)[:, rows].sum(1)
        np.testing.assert_allclose(seen.scores[b, :, :m], expected, rtol=1e-4, atol=1e-6)
        assert (np.asarray(seen.visible)[b] == sum(row + 1 for row in rows)).all()
        assert len(rows) == min(n, count)


@pytest.mark.parametrize("count", [0, -2, 3, 2.0, 2**15 + 2])
def test_a_bad_count_is_refused(count):
    with pytest.raises(ValueError, match="count="):
        RowsInFront(count)


def test_positions_of_long_prompts_fit_32_bits():
    bucket = 2**20
    prompt = Prompt(jnp.array([bucket]), jnp.ones((1, bucket), bool), 1, Budget.parse(0.5).data)
    position, _, _ = AllRows(2**15).taken(prompt)
    assert position[0, : 2**15].tolist() == list(range(31, bucket, 32))


def test_the_sampled_rows_do_not_depend_on_the_question(layer):
    """With other words behind the picture, what the picture's own rows are watched for stays."""
    first, second = (AllRows(5).taken(layer.prompt)[0][b, :5].tolist() for b in (0, 1))
    assert first == [3, 7, 11, 15, 19]
    for length in (20, 21, 40):
        prompt = replace(layer.prompt, length=jnp.array([length, 30, 1, 1]))
        taken = AllRows(5).taken(prompt)[0]
        assert (taken[0, :5].tolist(), taken[1, :5].tolist()) == (first, second)


@pytest.mark.parametrize("budget", ["1tok", "9tok", 0.3])
def test_methods_run_with_sampled_rows(layer, budget):
    """With any allocation, and nothing behind the prompts is read."""
    for allocation in ("uniform", "global-best", "sparsity"):
        method = Custom(budget, score=ColumnSum(AllRows(4)), allocation=allocation)
        prompt = replace(layer.prompt, budget=method.limit.data)
        seen = method.observe(replace(layer, prompt=prompt))
        assert np.isfinite(np.asarray(seen.scores)).all()
        plan = method.plan(type(seen).stack([seen]), prompt)
        assert (plan.kept(prompt).sum(-1) == plan.budgets[..., None]).all()


@pytest.mark.parametrize("sample", [0, -1, 1.5, True, 2**15 + 1])
def test_a_bad_sample_is_refused(sample):
    with pytest.raises(ValueError, match="sample="):
        AllRows(sample)
