"""How many bits a model needs for a story, and how sure a figure is: the yardstick of training, evaluation and comparison.

Intervals are percentile bootstraps (Efron & Tibshirani, 1993): the units, stories or prompts, are drawn again with
replacement, the figure is computed anew each time, and 95 % of those figures lie between `low` and `high`. Units that all
agree give an interval without width, which says much of many units and nothing of a handful.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from blm_core.model import LanguageModel
from blm_core.tokenizer import Tokenizer

RESAMPLES = 10_000
LEVEL = 0.95


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
    work = sorted(work, key=lambda item: item[2] - item[1])[::-1]  # windows of about one length share a batch
    bits = np.zeros(len(stories))
    while work:
        width = work[0][2] - work[0][1]
        rows = max(batch_tokens, seq_len + 1) // width
        batch, work = work[:rows], work[rows:]
        tokens = torch.zeros(len(batch), width, dtype=torch.int64)
        targets = torch.full_like(tokens, -100)  # not scored
        for row, (i, start, end, scored) in enumerate(batch):
            tokens[row, : end - start] = torch.from_numpy(stories[i][start:end].astype(np.int64))
            targets[row, scored - start : end - start] = tokens[row, scored - start : end - start]
        logits = logits_of(tokens[:, :-1].to(device)).float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets[:, 1:].to(device), reduction="none")
        for (i, *_), nats in zip(batch, losses.sum(1, dtype=torch.float64).tolist(), strict=True):
            bits[i] += nats / math.log(2)
    return bits


class Interval(NamedTuple):
    """A figure and the ends of its interval; the ends of a figure of one unit are nan, and so is all of none."""

    value: float
    low: float
    high: float


def _bootstrap(*groups: tuple[np.ndarray, np.ndarray]) -> Interval:
    """sum(above) / sum(below) over the units of the first group, less that of a second one, each drawn again from its own."""
    for above, below in groups:
        if above.shape != below.shape or not np.isfinite(above).all() or (below < 0).any() or len(below) > 0 == below.sum():
            raise ValueError("every unit needs a finite numerator and a denominator; these are not negative, and not all 0.")
    sizes = [len(above) for above, _ in groups]
    rng = np.random.default_rng(0)

    def figure(chosen: list) -> float:
        ratios = [above[own].sum() / below[own].sum() for (above, below), own in zip(groups, chosen, strict=True)]
        return float(ratios[0] - sum(ratios[1:]))

    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of nothing but empty units says nothing
        value = figure([slice(None)] * len(groups)) if all(sizes) else math.nan
        if min(sizes) < 2:
            return Interval(value, math.nan, math.nan)
        figures = np.array([figure([rng.integers(size, size=size) for size in sizes]) for _ in range(RESAMPLES)])
    low, high = np.quantile(figures[np.isfinite(figures)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike) -> Interval:
    """sum(numerators) / sum(denominators) over units that are drawn together, such as bits and bytes of stories; both (n,)."""
    return _bootstrap((np.asarray(numerators, float), np.asarray(denominators, float)))


def mean_interval(values: ArrayLike) -> Interval:
    """The mean of one number per unit (n,). Shares are means of 0 and 1."""
    return ratio_interval(values, np.ones(len(values)))


def paired_difference(a: ArrayLike, b: ArrayLike) -> Interval:
    """mean(a - b) over units that both models answered, in the same order (n,)."""
    return mean_interval(np.subtract(a, b, dtype=float))


def difference_interval(a: ArrayLike, b: ArrayLike) -> Interval:
    """mean(a) - mean(b) over units of their own, such as texts of two sources (n,) and (m,)."""
    return _bootstrap(*((np.asarray(units, float), np.ones(len(units))) for units in (a, b)))


def verdict(low: float, high: float, better: str) -> str:
    """ "wins", "loses" or "undecided": the interval of a difference, ours minus theirs, against 0; without one, undecided.

    `better` says which sign is good, "lower" (bits, cost) or "higher" (marks, accuracy).
    """
    if better not in ("lower", "higher"):
        raise ValueError(f'better = "{better}" must be "lower" or "higher".')
    if low > 0 or high < 0:
        return "wins" if (low > 0) == (better == "higher") else "loses"
    return "undecided"


class Score(NamedTuple):
    """What a model needs for a set of stories, each scored alone; the interval is a 95 % bootstrap over stories."""

    stories: int
    bytes: int
    tokens: int
    bits_per_byte: float
    low: float
    high: float


def score(model: LanguageModel, tokenizer: Tokenizer, stories: list[str]) -> tuple[Score, np.ndarray, np.ndarray]:
    """The score of `stories`, and bits and bytes of each; the end-of-text symbol is neither scored nor counted.

    Raises ValueError where there is no story.
    """
    if not any(stories):
        raise ValueError("there is no story to score: the text is empty.")
    encoded = [np.array([tokenizer.eot, *tokenizer.encode(story)]) for story in stories]
    sizes = np.array([len(story.encode()) for story in stories])
    bits = np.zeros(len(stories))
    for start in tqdm(range(0, len(stories), 100), desc="scoring", unit="x100 stories", leave=False):
        part = slice(start, start + 100)
        bits[part] = story_bits(model, encoded[part], model.config.seq_len, model.device)
    tokens = sum(len(story) - 1 for story in encoded)
    return Score(len(stories), int(sizes.sum()), tokens, *ratio_interval(bits, sizes)), bits, sizes
