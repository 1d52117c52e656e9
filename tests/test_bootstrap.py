"""Intervals and verdicts, against what is counted by hand or known from theory."""

import math

import numpy as np
import pytest

from blm_core import evaluate
from blm_core.evaluate import difference_interval, mean_interval, paired_difference, ratio_interval, verdict


def test_a_ratio_is_one_of_sums_and_units_that_agree_leave_no_doubt():
    assert ratio_interval([1, 9], [1, 3]).value == 10 / 4
    assert ratio_interval([2, 4, 6], [1, 2, 3]) == (2.0, 2.0, 2.0)


def test_an_interval_is_that_counted_by_hand_and_about_that_of_the_normal_approximation():
    # A resample of [0, 1] has the mean 0, 1/2, 1/2 or 1: each end has a quarter of all resamples, more than 2.5 %.
    assert mean_interval([0, 1]) == (0.5, 0.0, 1.0)
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert mean_interval([1] * 300 + [0] * 700) == pytest.approx((0.3, 0.3 - spread, 0.3 + spread), abs=0.003)


def test_the_interval_holds_the_true_value_about_95_times_in_100(monkeypatch):
    monkeypatch.setattr(evaluate, "RESAMPLES", 500)
    rng = np.random.default_rng(7)
    sizes = rng.integers(300, 1500, size=(300, 60))
    bits = sizes * rng.gamma(20, 0.04, size=(300, 60))  # 0.8 bits per byte on average
    found = [ratio_interval(*units) for units in zip(bits, sizes, strict=True)]
    assert 0.90 <= np.mean([low <= 0.8 <= high for _, low, high in found]) <= 0.99


def test_pairing_takes_out_what_both_models_share():
    theirs = np.random.default_rng(0).normal(size=100) * 10
    assert mean_interval(theirs - 1).high > mean_interval(theirs).low
    assert paired_difference(theirs - 1, theirs) == pytest.approx((-1, -1, -1))


def test_a_difference_of_two_sources_has_the_interval_of_the_formula():
    rng = np.random.default_rng(1)
    a, b = rng.normal(3, 2, 400), rng.normal(1, 1, 200)
    found = difference_interval(a, b)
    wide = 1.96 * (a.var(ddof=1) / 400 + b.var(ddof=1) / 200) ** 0.5
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert (found.high - found.low) / 2 == pytest.approx(wide, rel=0.05)


def test_one_unit_has_a_value_without_an_interval_and_none_has_neither():
    assert mean_interval([3]) == pytest.approx((3, math.nan, math.nan), nan_ok=True)
    assert difference_interval([1, 2], [1]) == pytest.approx((0.5, math.nan, math.nan), nan_ok=True)
    assert mean_interval([]) == pytest.approx((math.nan,) * 3, nan_ok=True)


@pytest.mark.parametrize("units", [([1, math.nan], [1, 1]), ([1, 2], [1]), ([1, 2], [0, 0]), ([1, 2], [-1, 3])])
def test_numbers_that_make_no_ratio_are_refused(units):
    with pytest.raises(ValueError, match="a finite numerator and a denominator"):
        ratio_interval(*units)


def test_a_verdict_needs_an_interval_on_one_side_of_0():
    ends = [(-2, -1), (1, 2), (-1, 1), (0, 1), (math.nan, math.nan)]
    assert [verdict(*pair, "lower") for pair in ends] == ["wins", "loses", "undecided", "undecided", "undecided"]
    assert [verdict(*pair, "higher") for pair in ends] == ["loses", "wins", "undecided", "undecided", "undecided"]
    with pytest.raises(ValueError, match="bigger"):
        verdict(0, 1, "bigger")
