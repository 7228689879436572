import math

import numpy as np
import pytest

from diffjax.evaluation.errorbars import Value, bootstrap, jackknife, mean_error

RNG = np.random.default_rng(0)


def test_the_error_of_a_mean():
    found = mean_error(np.array([1.0, 2.0, 3.0, 6.0]))
    assert found == pytest.approx((3.0, math.sqrt(14.0 / 3.0) / 2.0))


def test_what_has_no_error_says_so():
    assert math.isnan(mean_error(np.array([2.0])).error)
    found = mean_error(np.array([2.0, math.inf]))
    assert found.value == math.inf
    assert math.isnan(found.error)


def test_all_agree_on_a_mean():
    values = RNG.normal(size=400)
    expected = mean_error(values)
    resampled = bootstrap(np.mean, values, draws=400)
    left_out = jackknife(np.mean, values, groups=400)
    assert resampled.value == left_out.value == expected.value
    assert left_out.error == pytest.approx(expected.error)  # of single examples, exactly
    assert resampled.error == pytest.approx(expected.error, rel=0.1)
    assert jackknife(np.mean, values, groups=20).error == pytest.approx(expected.error, rel=0.4)


def test_rows_stay_together():
    """The difference of equal columns is 0 in every resample only if they are drawn alike."""
    values = RNG.normal(size=(50, 1))
    assert bootstrap(lambda a, b: float(abs(a - b).max()), values, values.copy()) == Value(0.0, 0.0)


def test_the_seed_decides():
    values = RNG.normal(size=50)
    for way in (bootstrap, jackknife):
        assert way(np.median, values, seed=1) == way(np.median, values, seed=1)
        assert way(np.median, values, seed=1) != way(np.median, values, seed=2)
