"""Bootstrap intervals: how far a figure would move if other stories or prompts had been drawn.

Percentile bootstrap (Efron & Tibshirani, 1993): the units, stories or prompts, are drawn again with replacement, the
figure is computed anew each time, and 95 % of those figures lie between `low` and `high`. Paired figures draw the same
units for both models. One story alone has no interval: its ends are nan. Units that all agree give an interval without
width, which says much of many units and nothing of a handful.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
LEVEL = 0.95
BLOCK = 1_000_000  # drawn numbers at a time, so that memory does not grow with the number of units


class Interval(NamedTuple):
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """sum(numerators) / sum(denominators) over units that are drawn together, such as bits and bytes of stories.

    Both (n,). Raises ValueError for none, for unequal lengths, numbers that are not finite, and denominators that
    are negative or add up to nothing.
    """
    above, below = _units(numerators, "numerators"), _units(denominators, "denominators")
    if len(above) != len(below):
        raise ValueError(f"{len(above)} numerators and {len(below)} denominators: every unit needs both.")
    if (below < 0).any() or below.sum() <= 0:
        raise ValueError("denominators must not be negative and must add up to more than nothing.")
    value = float(above.sum() / below.sum())
    if len(above) < 2:
        return Interval(value, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(above))
    figures = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, len(above), size=(min(rows, resamples - start), len(above)))
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw of nothing but empty units says nothing
            figures.append(above[drawn].sum(1) / below[drawn].sum(1))
    figures = np.concatenate(figures)
    low, high = np.quantile(figures[np.isfinite(figures)], [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def mean_interval(values: ArrayLike, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> Interval:
    """The mean of one number per unit (n,). Shares are means of 0 and 1. Raises ValueError as `ratio_interval`."""
    values = _units(values, "values")
    return ratio_interval(values, np.ones_like(values), resamples, seed, level)


def paired_interval(
    a: ArrayLike,
    b: ArrayLike,
    sizes: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """sum(a - b) / sum(sizes) over units that both models answered, in the same order (n,); without `sizes`, mean(a - b).

    With bits and bytes of stories it is the difference in bits per byte. Raises ValueError as `ratio_interval`.
    """
    a, b = _units(a, "a"), _units(b, "b")
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} units cannot be paired: both models must have answered the same ones.")
    return ratio_interval(a - b, np.ones_like(a) if sizes is None else sizes, resamples, seed, level)


def paired_difference(a: ArrayLike, b: ArrayLike, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> Interval:
    """mean(a - b) over paired units: `paired_interval` where every unit weighs the same."""
    return paired_interval(a, b, None, resamples, seed, level)


def difference_interval(
    a: ArrayLike, b: ArrayLike, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """mean(a) - mean(b) over units of their own, such as texts of two sources, each drawn again from its own (n,) and (m,).

    Raises ValueError as `ratio_interval`.
    """
    rng = np.random.default_rng(seed)
    a, b = _units(a, "a"), _units(b, "b")
    value = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Interval(value, math.nan, math.nan)
    figures = [rng.choice(a, len(a)).mean() - rng.choice(b, len(b)).mean() for _ in range(resamples)]
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def verdict(low: float, high: float, better: str) -> str:
    """ "wins", "loses" or "undecided": the interval of a difference, ours minus theirs, against nothing at all.

    `better` says which sign is good, "lower" (bits, cost) or "higher" (marks, accuracy). Without an interval: undecided.
    """
    if better not in ("lower", "higher"):
        raise ValueError(f'better = "{better}" must be "lower" or "higher".')
    if low > high:
        raise ValueError(f"an interval from {low} to {high} is upside down.")
    if low > 0:
        return "wins" if better == "higher" else "loses"
    if high < 0:
        return "wins" if better == "lower" else "loses"
    return "undecided"


def _units(values: ArrayLike, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} of shape {values.shape}: one number per story or prompt is needed, at least one.")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} hold {int((~np.isfinite(values)).sum())} numbers that are not finite.")
    return values
