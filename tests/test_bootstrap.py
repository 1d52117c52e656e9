import math

import numpy as np
import pytest

from blm_core import evaluate as bootstrap
from blm_core.evaluate import difference_interval, mean_interval, paired_difference, paired_interval, ratio_interval, verdict


def test_the_value_of_a_ratio_is_the_ratio_of_sums_and_not_the_mean_of_ratios():
    assert ratio_interval([1, 9], [1, 3]).value == 10 / 4
    assert ratio_interval([2, 4, 6], [1, 2, 3]) == (2.0, 2.0, 2.0)  # units that agree leave no doubt


def test_an_interval_is_that_counted_by_hand_and_about_that_of_the_normal_approximation():
    # A resample of [0, 1] has the mean 0, 1/2, 1/2 or 1: each end has a quarter of all resamples, more than 2.5 %.
    assert mean_interval([0, 1]) == (0.5, 0.0, 1.0)
    share = mean_interval([1] * 300 + [0] * 700)
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert share == pytest.approx((0.3, 0.3 - spread, 0.3 + spread), abs=0.003)


def test_the_seed_and_not_the_size_of_the_blocks_decides_on_an_interval(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = mean_interval(values)
    assert mean_interval(values) == whole != mean_interval(values, seed=1)
    monkeypatch.setattr(bootstrap, "BLOCK", 5000)
    assert mean_interval(values) == pytest.approx(whole, abs=0.02)


def test_pairing_takes_out_what_both_models_share():
    hardness = np.random.default_rng(0).normal(size=100) * 10
    ours, theirs = hardness - 1, hardness
    assert mean_interval(ours).high > mean_interval(theirs).low
    assert paired_difference(ours, theirs) == pytest.approx((-1, -1, -1))
    # In bits per byte stories weigh by their bytes.
    assert paired_interval([10, 10], [12, 40], [10, 90]).value == pytest.approx(-32 / 100)


def test_one_unit_has_a_value_and_no_interval():
    assert mean_interval([3]) == pytest.approx((3, math.nan, math.nan), nan_ok=True)
    assert verdict(math.nan, math.nan, "higher") == "undecided"


def test_a_verdict_needs_an_interval_on_one_side_of_nothing():
    ends = [(-2, -1), (1, 2), (-1, 1), (0, 1)]
    assert [verdict(*pair, "lower") for pair in ends] == ["wins", "loses", "undecided", "undecided"]
    assert [verdict(*pair, "higher") for pair in ends] == ["loses", "wins", "undecided", "undecided"]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: mean_interval([]), "at least one"),
        (lambda: mean_interval([1, math.nan]), "1 numbers that are not finite"),
        (lambda: ratio_interval([1, 2], [1]), "2 numerators and 1 denominators"),
        (lambda: ratio_interval([1, 2], [0, 0]), "more than nothing"),
        (lambda: paired_difference([1, 2], [1]), "cannot be paired"),
        (lambda: verdict(0, 1, "bigger"), "bigger"),
        (lambda: verdict(2, 1, "lower"), "upside down"),
    ],
)
def test_numbers_that_make_no_interval_are_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


def test_the_interval_holds_the_true_value_about_95_times_in_100():
    rng = np.random.default_rng(7)
    sizes = rng.integers(300, 1500, size=(300, 60))
    bits = sizes * rng.gamma(20, 0.04, size=(300, 60))  # 0.8 bits per byte on average
    found = [ratio_interval(*units, resamples=500) for units in zip(bits, sizes, strict=True)]
    assert 0.90 <= np.mean([low <= 0.8 <= high for _, low, high in found]) <= 0.99


def test_a_difference_of_two_sources_has_the_interval_of_the_formula():
    rng = np.random.default_rng(1)
    a, b = rng.normal(3, 2, 400), rng.normal(1, 1, 200)
    found = difference_interval(a, b)
    wide = 1.96 * (a.var(ddof=1) / 400 + b.var(ddof=1) / 200) ** 0.5
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert (found.high - found.low) / 2 == pytest.approx(wide, rel=0.05)
    assert math.isnan(difference_interval([1.0], b).low)
