"""The metrics against examples worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.accuracy.metrics import (
    METRICS,
    anls,
    exact_match,
    mean_interval,
    paired_difference,
    score,
)
from benchmarks.accuracy.pages import KINDS
from benchmarks.accuracy.tasks import TASKS

texts = st.text(alphabet="ab cAB1,.", max_size=12)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("4821", "4821", 1.0),
        ("4822", "4821", 0.75),  # 1 of 4 replaced
        ("482", "4821", 0.75),  # 1 of 4 missing
        ("48", "4821", 0.5),  # 2 of 4: just at the threshold, which counts
        ("4", "4821", 0.0),  # 3 of 4: a similarity of 0.25 is below it
        ("kq  7b", "KQ 7B", 1.0),
        ("kitten", "sitting", 1 - 3 / 7),  # k/s, e/i, g
        ("", "4821", 0.0),
        ("", "", 1.0),
    ],
)
def test_anls(prediction, answer, expected):
    assert anls(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("37 + 45 = 82", "37 + 45 = 82", 1.0),
        (" kq\n87 ", "KQ 87", 1.0),
        ("KQ87", "KQ 87", 0.0),
        ("", "87", 0.0),
    ],
)
def test_exact_match(prediction, answer, expected):
    assert exact_match(prediction, answer) == expected


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_scores_are_shares_and_right_answers_have_all(pairs):
    predictions, answers = (list(column) for column in zip(*pairs, strict=True))
    for task in TASKS:
        values = score(task, predictions, answers)
        assert values.shape == (len(pairs),)
        assert ((values >= 0) & (values <= 1 + 1e-9)).all()
        assert (score(task, answers, answers) == 1).all()


def test_every_task_has_its_score():
    assert METRICS.keys() == {*TASKS, *KINDS}
    predictions, answers = ["48", "x"], ["4821", "X"]
    assert score("document", predictions, answers).tolist() == [0.5, 1.0]
    assert score("reading", predictions, answers).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="shorter"):
        score("document", ["1", "2"], ["1"])


def test_wilson():
    # 8 of 10, z² = 3.8415: middle (0.8 + 0.19207) / 1.38415 = 0.71674,
    # half 1.95996 * sqrt(0.016 + 0.0096036) / 1.38415 = 0.22657
    found = mean_interval(np.array([1.0] * 8 + [0.0] * 2))
    assert found.mean == 0.8
    assert (found.low, found.high) == pytest.approx((0.49016, 0.94331), abs=1e-4)
    # all of 500: z² / (500 + z²) below 1
    found = mean_interval(np.ones(500))
    assert found.high == 1.0
    assert found.low == pytest.approx(500 / 503.8415, abs=1e-6)


def test_bootstrap_agrees_with_the_normal_interval():
    scores = np.random.default_rng(0).uniform(0, 1, 500)
    found = mean_interval(scores)
    half = 1.96 * scores.std() / math.sqrt(500)
    assert (found.low, found.high) == pytest.approx(
        (scores.mean() - half, scores.mean() + half), abs=0.004
    )
    assert found == mean_interval(scores)
    assert found != mean_interval(scores, seed=1)


def test_paired_difference_of_zeros_and_ones():
    # 100 items, 2 won and 8 lost: with half an item in each of the four cells 2.5, 8.5 of 102;
    # middle -6 / 102 = -0.058824, half 1.95996 * sqrt(11 - 36 / 102) / 102 = 0.062699
    baseline = np.array([1.0] * 50 + [0.0] * 50)
    scores = baseline.copy()
    scores[:8], scores[50:52] = 0, 1
    found = paired_difference(scores, baseline)
    assert found.mean == pytest.approx(-0.06)
    assert (found.low, found.high) == pytest.approx((-0.121523, 0.003875), abs=1e-5)
    # no change at all is no certainty: 1.95996 * sqrt(1) / 102
    found = paired_difference(baseline, baseline)
    assert (found.mean, found.high) == (0, pytest.approx(0.019215, abs=1e-5))
    assert found.low == -found.high


def test_paired_difference_is_narrower_than_that_of_two_samples():
    dice = np.random.default_rng(0)
    baseline = dice.uniform(0, 1, 400)
    scores = baseline - 0.1 * dice.uniform(0, 1, 400)
    found = paired_difference(scores, baseline)
    assert -0.06 < found.low < found.mean < found.high < -0.04
    assert found == paired_difference(scores, baseline)


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=30)
    | st.lists(st.floats(0, 1), min_size=1, max_size=30)
)
def test_intervals_hold_their_mean(scores):
    values = np.array(scores)
    for found in (mean_interval(values), paired_difference(values, values[::-1])):
        assert found.low - 1e-9 <= found.mean <= found.high + 1e-9


@pytest.mark.parametrize("scores", [[], [[1.0]]])
def test_no_scores_have_no_interval(scores):
    with pytest.raises(ValueError, match="at least one"):
        mean_interval(np.array(scores))


def test_pairs_must_match():
    with pytest.raises(ValueError, match="3 scores but 2"):
        paired_difference(np.ones(3), np.ones(2))
