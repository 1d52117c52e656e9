"""A parametric scaling law, fitted to the runs of the study `scaling` (Hoffmann et al. 2022, approach 3).

    L(N, D) = E + A N^-alpha + B D^-beta

L is bits per byte on held-out stories, N the parameters outside the embedding, D the tokens trained on. For given
exponents the law is linear in E, A and B, so only the exponents are searched, on a grid that is then refined.
"""

import contextlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Law:
    """The fitted constants. N is counted in millions of parameters and D in millions of tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N, D):
        """Bits per byte at `N` million parameters and `D` million tokens."""
        return self.E + self.A * np.asarray(N, float) ** -self.alpha + self.B * np.asarray(D, float) ** -self.beta

    def optimum(self, flops) -> tuple[np.ndarray, np.ndarray]:
        """The N and D, in millions, at which a budget of `flops` = 6 N D reaches the lowest loss."""
        product = np.asarray(flops, float) / 6e12
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = ratio * product ** (self.beta / (self.alpha + self.beta))
        return N, product / N


def fit(N, D, L) -> Law:
    """The law with the least squared error of log L over runs of `N`, `D` (millions) and `L` (bits per byte).

    Raises ValueError for fewer runs than constants, and for runs that no law with positive constants describes.
    """
    N, D, L = (np.asarray(values, float) for values in (N, D, L))
    if len(L) < 6:
        raise ValueError(f"{len(L)} runs do not determine the five constants of the law; six are the least.")
    low, high = np.array([0.05, 0.05]), np.array([1.5, 1.5])
    best = (np.inf, None)
    for _ in range(4):
        exponents = np.stack(np.meshgrid(*np.linspace(low, high, 25).T), -1).reshape(-1, 2)  # (G, 2)
        powers = np.stack([N ** -exponents[:, :1], D ** -exponents[:, 1:]], -1)  # (G, runs, 2)
        columns = np.concatenate([np.ones_like(powers[..., :1]), powers], -1)  # (G, runs, 3)
        # Least squares in relative errors, which for small errors are those of log L.
        constants = np.linalg.pinv(columns / L[:, None]) @ np.ones(len(L))  # (G, 3): E, A, B
        predicted = (columns @ constants[..., None])[..., 0]  # (G, runs)
        valid = (constants >= 0).all(1) & (predicted > 0).all(1)
        error = np.where(valid, (np.log(np.where(predicted > 0, predicted, 1) / L) ** 2).sum(1), np.inf)
        i = int(error.argmin())
        best = min(best, (error[i], Law(*constants[i].tolist(), *exponents[i].tolist())), key=lambda found: found[0])
        if not np.isfinite(best[0]):
            raise ValueError("no law with positive constants describes these runs: the loss does not fall with N and D.")
        centre, width = np.array([best[1].alpha, best[1].beta]), (high - low) / 6
        low, high = np.maximum(centre - width, 0.01), centre + width
    return best[1]


def resampled(N, D, L, resamples: int = 200, seed: int = 0) -> list[Law]:
    """The law fitted to bootstrap resamples of the runs, for intervals of whatever follows from it."""
    N, D, L = (np.asarray(values, float) for values in (N, D, L))
    rng = np.random.default_rng(seed)
    laws = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(L), len(L))
        with contextlib.suppress(ValueError):  # a resample can lack all sizes or budgets but one
            laws.append(fit(N[chosen], D[chosen], L[chosen]))
    return laws


def interval(values) -> tuple[float, float]:
    """The middle 95 % of `values`."""
    low, high = np.quantile(np.asarray(values, float), [0.025, 0.975])
    return float(low), float(high)
