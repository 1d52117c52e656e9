"""The scaling law: what generated the numbers is found again."""

import numpy as np
import pytest

from blm_core.evidence.scaling import Law, fit, interval, resampled

TRUE = Law(E=0.5, A=0.2, B=0.4, alpha=0.6, beta=0.35)
N = np.repeat([0.05, 0.1, 0.3, 1.0, 3.0], 4)
D = np.tile([0.25, 0.5, 1.0, 2.0], 5)


def test_the_law_behind_exact_numbers_is_found():
    found = fit(N, D, TRUE.loss(N, D))
    assert found.loss(N, D) == pytest.approx(TRUE.loss(N, D), rel=2e-3)
    assert found.alpha == pytest.approx(TRUE.alpha, abs=0.1)
    assert found.beta == pytest.approx(TRUE.beta, abs=0.1)


def test_runs_that_get_worse_with_size_are_described_by_no_law():
    with pytest.raises(ValueError, match="no law"):
        fit(N, D, 1 + 0.1 * N)


def test_the_optimum_spends_the_budget_and_no_neighbour_is_better():
    size, tokens = TRUE.optimum(1e15)
    assert 6e12 * size * tokens == pytest.approx(1e15)
    for factor in (0.8, 1.25):
        assert TRUE.loss(size * factor, tokens / factor) > TRUE.loss(size, tokens)


def test_intervals_of_noisy_numbers_hold_the_truth():
    noisy = TRUE.loss(N, D) * np.exp(np.random.default_rng(1).normal(0, 0.003, len(N)))
    low, high = interval([law.loss(2.0, 1.5) for law in resampled(N, D, noisy, resamples=25)])
    assert low < TRUE.loss(2.0, 1.5) < high
    assert high - low < 0.1


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="5 runs"):
        fit(N[:5], D[:5], TRUE.loss(N[:5], D[:5]))
