"""How many bits a model needs for a story: the yardstick of training, evaluation and comparison.

Bootstrap intervals: how far a figure would move if other stories or prompts had been drawn.

Percentile bootstrap (Efron & Tibshirani, 1993): the units, stories or prompts, are drawn again with replacement, the
figure is computed anew each time, and 95 % of those figures lie between `low` and `high`. Paired figures draw the same
units for both models. One story alone has no interval: its ends are nan. Units that all agree give an interval without
width, which says much of many units and nothing of a handful.

Bits per byte of any text under a model.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from blm_core.hardware import precision
from blm_core.model import LanguageModel
from blm_core.tokenizer import Tokenizer


def windows(length: int, seq_len: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored) of the windows that predict tokens 1 … length - 1, each token once.

    A text that fits is one window. A longer one is cut so that every later token sees at least half a context.
    """
    found, scored, start = [], 1, 0
    while scored < length:
        end = min(start + seq_len + 1, length)
        found.append((start, end, scored))
        scored, start = end, end - seq_len // 2 - 1
    return found


@torch.no_grad()
def story_bits(
    logits_of: Callable[[Tensor], Tensor],
    stories: list[np.ndarray],
    seq_len: int,
    device: torch.device,
    batch_tokens: int = 8192,
) -> np.ndarray:
    """Bits of each story, given its first token and nothing else.

    `logits_of` maps tokens (B, T) to logits (B, T, V) of a causal model with a context of `seq_len`; `stories` are
    token arrays that begin with a start token. The bits of `n` tokens behind it are -sum log2 p. Returns (len(stories),).
    """
    work = [(i, *window) for i, story in enumerate(stories) for window in windows(len(story), seq_len)]
    work.sort(key=lambda item: item[2] - item[1])
    bits = np.zeros(len(stories))
    while work:
        width = 1
        batch = []
        while work and max(width, work[-1][2] - work[-1][1]) * (len(batch) + 1) <= max(batch_tokens, seq_len + 1):
            batch.append(work.pop())
            width = max(width, batch[-1][2] - batch[-1][1])
        tokens = torch.zeros(len(batch), width, dtype=torch.int64)
        targets = torch.full((len(batch), width), -100, dtype=torch.int64)  # -100: not scored
        for row, (i, start, end, scored) in enumerate(batch):
            tokens[row, : end - start] = torch.from_numpy(stories[i][start:end].astype(np.int64))
            targets[row, scored - start : end - start] = tokens[row, scored - start : end - start]
        logits = logits_of(tokens[:, :-1].to(device)).float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets[:, 1:].to(device), ignore_index=-100, reduction="none")
        for (i, *_), nats in zip(batch, losses.sum(1, dtype=torch.float64).tolist(), strict=True):
            bits[i] += nats / math.log(2)
    return bits


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


@dataclass(frozen=True)
class Score:
    """What a model needs for a set of stories, each scored alone; the interval is a 95 % bootstrap over stories."""

    stories: int
    bytes: int
    tokens: int
    bits_per_byte: float
    low: float
    high: float

    def as_dict(self) -> dict:
        return asdict(self)


def score(
    model: LanguageModel, tokenizer: Tokenizer, stories: list[str], dtype: str = "float32"
) -> tuple[Score, np.ndarray, np.ndarray]:
    """The score of `stories`, and bits and bytes of each.

    Every byte of the text counts, and nothing else: the end-of-text symbol is neither scored nor counted.
    Raises ValueError where there is no story.
    """
    if not any(stories):
        raise ValueError("there is no story to score: the text is empty.")
    encoded = [np.array([tokenizer.eot, *tokenizer.encode(story)]) for story in stories]
    sizes = np.array([len(story.encode()) for story in stories])
    bits = np.zeros(len(stories))
    with precision(model.device, dtype):
        for start in tqdm(range(0, len(stories), 100), desc="scoring", unit="x100 stories"):
            part = slice(start, start + 100)
            bits[part] = story_bits(model, encoded[part], model.config.seq_len, model.device)
    value, low, high = ratio_interval(bits, sizes)
    tokens = sum(len(story) - 1 for story in encoded)
    return Score(len(stories), int(sizes.sum()), tokens, value, low, high), bits, sizes
