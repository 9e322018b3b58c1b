"""The table that the other tests of kernels are made of."""

from itertools import combinations, product

import numpy as np
import pytest

from tests.kernels.cases import FACTORS, TOLERANCES, assert_close, pairwise


@pytest.mark.parametrize("operation", FACTORS)
def test_any_two_values_meet_in_few_cases(operation):
    factors = FACTORS[operation]
    cases = [dict(zip(factors, case, strict=True)) for case in pairwise(factors)]
    assert len(cases) <= 60
    for one, other in combinations(factors, 2):
        met = {(case[one], case[other]) for case in cases}
        assert met == set(product(factors[one], factors[other]))


def test_cases_are_the_same_every_time():
    factors = {"a": (1, 2, 3), "b": "xy", "c": (None, True)}
    assert pairwise(factors) == pairwise(factors)
    assert pairwise({"alone": (1, 2)}) == []


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tolerances_are_checked(dtype):
    reference = np.linspace(-2, 1, 1000)
    assert_close(reference, reference, dtype)
    for fraction, largest in TOLERANCES[dtype].items():
        count = round(1000 * (1 - fraction)) + 1
        wrong = reference.copy()
        wrong[:count] += 2 * 1.01 * largest
        with pytest.raises(AssertionError, match="within"):
            assert_close(wrong, reference, dtype)
    wrong = reference.copy()
    wrong[3] = np.nan
    with pytest.raises(AssertionError):
        assert_close(wrong, reference, dtype)
