"""Ratings: one format for every judge, and what can be concluded from them.

A rating is one judge's answer about one pair of texts in one order. Intervals are bootstraps over prompts: ratings of the
same prompt, whatever the order, the judge or the sample, are drawn together.
"""

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from blm_core.evaluate import LEVEL, RESAMPLES, Interval, mean_interval
from blm_core.evidence.recording import read_lines
from blm_core.files import written_aside

CRITERIA = ("grammar", "creativity", "consistency", "plot")
AGES = ("3 or under", "4-5", "6-7", "8-9", "10-12", "13-16", "17 or over")
ELO = 400 / math.log(10)  # a strength of ln 10 more, ten wins to one, is 400 points


class RatingsError(ValueError):
    """Ratings, marks or a key that cannot be used; the message names the ids."""


@dataclass(frozen=True)
class Rating:
    """`first` and `second` are the models in the order shown, with their marks; `preferred` is first, second or tie.

    `pair` names two texts, `prompt` the beginning that they share, both by a hash; `id` is the item on the sheet; `kind` is the
    prompt's, where it has one.
    """

    id: str
    pair: str
    prompt: str
    rater: str
    first: str
    second: str
    first_marks: dict
    second_marks: dict
    preferred: str
    kind: str = ""

    @property
    def winner(self) -> str:
        """The model preferred, or "tie"."""
        return {"first": self.first, "second": self.second}.get(self.preferred, "tie")


def check_marks(answer: object) -> list[str]:
    """What is wrong with `answer`, which must be {"a": marks, "b": marks, "preferred": "a", "b" or "tie"}.

    Marks are {"grammar", "creativity", "consistency", "plot": 0 to 10, "age": one of AGES}, and nothing else.
    """
    if not isinstance(answer, dict):
        return [f"an object was expected, found {type(answer).__name__}"]
    problems = _keys(answer, ("a", "b", "preferred"), "the answer")
    if "preferred" in answer and answer["preferred"] not in ("a", "b", "tie"):
        problems.append(f'preferred is {_shown(answer["preferred"])}, not "a", "b" or "tie"')
    for side in ("a", "b"):
        marks = answer.get(side)
        if not isinstance(marks, dict):
            if side in answer:
                problems.append(f"{side} is {_shown(marks)}, not an object")
            continue
        problems += _keys(marks, (*CRITERIA, "age"), side)
        for name in CRITERIA:
            mark = marks.get(name, 0)
            if isinstance(mark, bool) or not isinstance(mark, int | float):
                problems.append(f"{side}.{name} is {_shown(mark)}, not a number")
            elif not 0 <= mark <= 10:
                problems.append(f"{side}.{name} is {mark}, not between 0 and 10")
        if "age" in marks and marks["age"] not in AGES:
            problems.append(f"{side}.age is {_shown(marks['age'])}, not one of {', '.join(AGES)}")
    return problems


def write_ratings(path: Path, ratings: Iterable[Rating]) -> None:
    with written_aside(path) as aside:
        aside.write_text("".join(json.dumps(asdict(rating)) + "\n" for rating in ratings), encoding="utf-8")


def read_ratings(*paths: Path) -> list[Rating]:
    """The ratings of all files. Raises RatingsError naming file and record, or the ids that one rater rated twice."""
    found = []
    for path in paths:
        for number, record in enumerate(read_lines(Path(path)), 1):
            try:
                rating = Rating(**record)
                answer = {"a": rating.first_marks, "b": rating.second_marks, "preferred": rating.preferred}
                answer["preferred"] = {"first": "a", "second": "b"}.get(rating.preferred, rating.preferred)
                problems = check_marks(answer)
            except TypeError as error:
                names = ", ".join(field.name for field in fields(Rating))
                problems = [f"not a rating with the fields {names} ({error})"]
            if problems:
                raise RatingsError(f"{path}, record {number}: {'; '.join(problems)}.")
            found.append(rating)
    seen: set = set()
    doubled = sorted({r.id for r in found if (r.rater, r.id) in seen or seen.add((r.rater, r.id))})
    if doubled:
        raise RatingsError(f"rated twice by the same rater: {', '.join(doubled)}. Was a file given twice?")
    return found


def between(ratings: Iterable[Rating], model: str, other: str) -> list[Rating]:
    """The ratings of pairs of these two models. Raises RatingsError where there is none."""
    ratings = list(ratings)
    chosen = [r for r in ratings if {r.first, r.second} == {model, other}]
    if not chosen:
        known = sorted({name for r in ratings for name in (r.first, r.second)})
        raise RatingsError(f"no rating compares {model} and {other}; the models rated are {', '.join(known) or 'none'}.")
    return chosen


def win_rate(ratings: Sequence[Rating], model: str, other: str) -> dict:
    """How often `model` is preferred to `other`: `wins`, `ties`, `losses`, `prompts` and the `rate` as an Interval.

    A tie counts one half. The rate is the mean over prompts of each prompt's mean, so that a prompt with many samples
    weighs no more than others; 0.5 is even.
    """
    chosen = between(ratings, model, other)
    scores = _by_prompt((r.prompt, _points(r, model)) for r in chosen)
    winners = [r.winner for r in chosen]
    return {
        "wins": winners.count(model),
        "ties": winners.count("tie"),
        "losses": winners.count(other),
        "prompts": len(scores),
        "rate": mean_interval(scores),
    }


def mean_marks(ratings: Sequence[Rating]) -> dict[str, dict[str, Interval]]:
    """Each model's mean mark by criterion, the mean over prompts of each prompt's mean."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for r in ratings:
        for model, marks in ((r.first, r.first_marks), (r.second, r.second_marks)):
            for name in CRITERIA:
                found[model][name].append((r.prompt, marks[name]))
    return {
        model: {name: mean_interval(_by_prompt(values)) for name, values in marks.items()} for model, marks in found.items()
    }


def mark_differences(ratings: Sequence[Rating], model: str, other: str) -> dict[str, Interval]:
    """Mark of `model` less that of `other` in the same pair, by criterion: paired, mean over prompts; 0 is even."""
    found: dict = defaultdict(list)
    for r in between(ratings, model, other):
        ours, theirs = (r.first_marks, r.second_marks) if r.first == model else (r.second_marks, r.first_marks)
        for name in CRITERIA:
            found[name].append((r.prompt, ours[name] - theirs[name]))
    return {name: mean_interval(_by_prompt(values)) for name, values in found.items()}


def ages(ratings: Sequence[Rating]) -> dict[str, dict[str, int]]:
    """How often each model's writer was put into each age group."""
    found: dict = {}
    for r in ratings:
        for model, marks in ((r.first, r.first_marks), (r.second, r.second_marks)):
            found.setdefault(model, dict.fromkeys(AGES, 0))[marks["age"]] += 1
    return found


def elo(
    ratings: Sequence[Rating], reference: str, prior: float = 0.5, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Bradley-Terry strengths on the Elo scale, less that of `reference`; 95 % bootstrap over prompts.

    A tie is half a win for both. `prior` wins are added both ways between models that met, so that a model which never
    lost has a finite strength. Raises RatingsError for an unknown reference or models that no chain of pairs connects.
    """
    models = sorted({name for r in ratings for name in (r.first, r.second)})
    if reference not in models:
        raise RatingsError(f"{reference} was not rated; the models rated are {', '.join(models) or 'none'}.")
    prompts = sorted({r.prompt for r in ratings})
    wins = np.zeros((len(prompts), len(models), len(models)))
    for r in ratings:
        first, second, prompt = models.index(r.first), models.index(r.second), prompts.index(r.prompt)
        points = _points(r, r.first)
        wins[prompt, first, second] += points
        wins[prompt, second, first] += 1 - points
    met = wins.sum(0) + wins.sum(0).T > 0
    reached = np.linalg.matrix_power(met.astype(int) + np.eye(len(models), dtype=int), len(models)) > 0
    if not reached.all():
        raise RatingsError(f"the models {', '.join(models)} fall into groups that no pair connects.")
    drawn = np.einsum("rp,pij->rij", _draws(len(prompts), resamples, seed), wins)
    strengths = ELO * bradley_terry(np.concatenate([wins.sum(0)[None], drawn]) + prior * met)
    strengths -= strengths[:, [models.index(reference)]]
    low, high = _ends(strengths[1:], len(prompts))
    return {name: Interval(*map(float, row)) for name, *row in zip(models, strengths[0], low, high, strict=True)}


def bradley_terry(wins: np.ndarray, tolerance: float = 1e-9, most: int = 10_000) -> np.ndarray:
    """Log strengths (R, M), mean 0, of R tournaments with `wins[r, i, j]` wins of i over j (R, M, M).

    Maximum likelihood by minorisation-maximisation (Hunter, 2004). Raises RatingsError where it does not settle, which is
    so where some model never won or never lost.
    """
    games = wins + wins.transpose(0, 2, 1)
    own = wins.sum(2)
    strengths = np.ones(own.shape)
    for _ in range(most):
        shares = games / (strengths[:, :, None] + strengths[:, None, :])
        with np.errstate(divide="ignore", invalid="ignore"):
            new = own / shares.sum(2)
            new /= np.exp(np.log(new).mean(1, keepdims=True))
        change = np.abs(new - strengths).max() if np.isfinite(new).all() else math.inf
        strengths = new
        if change < tolerance:
            return np.log(strengths)
        if change == math.inf:
            break
    raise RatingsError("Bradley-Terry strengths do not settle: a model that never won or never lost needs a prior.")


def position_bias(ratings: Sequence[Rating]) -> Interval:
    """How often the text shown first is preferred, a tie counting one half; 0.5 is no bias where both orders were asked."""
    return mean_interval(_by_prompt((r.prompt, _points(r, r.first)) for r in ratings))


def order_agreement(ratings: Sequence[Rating]) -> dict:
    """Of the pairs that a rater saw in both orders: the `share` with the same preference, Cohen's `kappa`, and `pairs`.

    Raises RatingsError where no pair was rated in both orders by the same rater.
    """
    orders: dict = defaultdict(dict)
    for r in ratings:
        orders[r.rater, r.pair].setdefault(r.first, []).append(r)
    both = [seen for seen in orders.values() if len(seen) == 2]
    if not both:
        raise RatingsError("no pair was rated in both orders by the same rater.")
    twice = [
        (one.prompt, one.winner, other.winner)
        for seen in both
        for one, other in zip(*(seen[model] for model in sorted(seen)), strict=False)
    ]
    return {
        "share": mean_interval(_by_prompt((prompt, a == b) for prompt, a, b in twice)),
        "kappa": cohens_kappa([a for _, a, _ in twice], [b for _, _, b in twice]),
        "pairs": len(twice),
    }


def rater_agreement(ratings: Sequence[Rating], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Krippendorff's alpha between raters: of the preference (nominal) and of each criterion (interval).

    A unit is a pair in one order, and one text of it for marks. Raises RatingsError where no unit has two raters.
    """
    units: dict = {name: defaultdict(list) for name in ("preferred", *CRITERIA)}
    for r in ratings:
        units["preferred"][r.prompt, r.pair, r.first].append(r.winner)
        for name in CRITERIA:
            units[name][r.prompt, r.pair, r.first, 1].append(r.first_marks[name])
            units[name][r.prompt, r.pair, r.first, 2].append(r.second_marks[name])
    if not any(len(values) > 1 for values in units["preferred"].values()):
        raise RatingsError("no pair was rated in the same order by two raters.")
    found = {}
    for name, own in units.items():
        prompts = sorted({key[0] for key in own})
        level = "nominal" if name == "preferred" else "interval"
        within, counts, differences = _coincidences(own.values(), level)
        place = np.array([prompts.index(key[0]) for key in own])
        within_prompt = np.zeros(len(prompts))
        counts_prompt = np.zeros((len(prompts), counts.shape[1]))
        np.add.at(within_prompt, place, within)
        np.add.at(counts_prompt, place, counts)
        draws = _draws(len(prompts), resamples, seed)
        value = _alpha(within.sum()[None], counts.sum(0)[None], differences)[0]
        low, high = _ends(_alpha(draws @ within_prompt, draws @ counts_prompt, differences), len(prompts))
        found[name] = Interval(float(value), float(low), float(high))
    return found


def cohens_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Agreement of two raters on the same items beyond chance (Cohen, 1960); nan where both only ever say the same one."""
    if len(a) != len(b) or not a:
        raise RatingsError(f"{len(a)} and {len(b)} judgements: both raters must have judged the same items.")
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    chance = sum((list(a).count(value) / len(a)) * (list(b).count(value) / len(b)) for value in set(a) | set(b))
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def krippendorff_alpha(units: Iterable[Sequence], level: str = "nominal") -> float:
    """Reliability of any number of raters (Krippendorff, 2011). `units` hold the values each was given, without gaps.

    `level` is nominal or interval. Units with fewer than two values do not count; nan where all values are equal.
    """
    within, counts, differences = _coincidences(units, level)
    return float(_alpha(within.sum()[None], counts.sum(0)[None], differences)[0])


def _coincidences(units: Iterable[Sequence], level: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per unit its disagreement (U,) and how often it has each value (U, V); differences between values (V, V)."""
    units = [list(values) if len(values) > 1 else [] for values in units]
    values = sorted({value for unit in units for value in unit})
    if not values:
        raise RatingsError("no unit has two values, so there is no agreement to measure.")
    if level == "nominal":
        differences = 1.0 - np.eye(len(values))
    elif level == "interval":
        differences = np.subtract.outer(np.array(values, float), np.array(values, float)) ** 2
    else:
        raise ValueError(f'level = "{level}" must be "nominal" or "interval".')
    counts = np.array([[unit.count(value) for value in values] for unit in units], dtype=np.float64)
    sizes = np.maximum(counts.sum(1) - 1, 1)
    return np.einsum("uc,ck,uk->u", counts, differences, counts) / sizes, counts, differences


def _alpha(within: np.ndarray, counts: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """1 - observed / expected disagreement, for R sets of units: (R,) and (R, V) to (R,)."""
    expected = np.einsum("rc,ck,rk->r", counts, differences, counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - (counts.sum(1) - 1) * within / expected, math.nan)


def _draws(units: int, resamples: int, seed: int) -> np.ndarray:
    """How often each unit is drawn in each resample; (resamples, units)."""
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.float64)


def _ends(figures: np.ndarray, units: int) -> np.ndarray:
    """The ends of the interval over resamples (axis 0); nan for one unit alone, or where no resample is defined."""
    if units < 2 or not np.isfinite(figures).any():
        return np.full((2, *figures.shape[1:]), math.nan)
    return np.nanquantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def _points(rating: Rating, model: str) -> float:
    """1 for a win of `model`, 0.5 for a tie, 0 for a loss."""
    return 0.5 if rating.winner == "tie" else float(rating.winner == model)


def _by_prompt(values: Iterable[tuple[str, float]]) -> list[float]:
    """The mean of each prompt's values, in the order of the prompts' names."""
    found = defaultdict(list)
    for prompt, value in values:
        found[prompt].append(float(value))
    return [float(np.mean(found[prompt])) for prompt in sorted(found)]


def _keys(found: dict, wanted: Sequence[str], where: str) -> list[str]:
    missing, foreign = [key for key in wanted if key not in found], [key for key in found if key not in wanted]
    problems = [f"{where} lacks {', '.join(missing)}"] if missing else []
    return problems + ([f"{where} has {', '.join(map(_shown, foreign))}, which was not asked for"] if foreign else [])


def _shown(value: object) -> str:
    return repr(value)[:40]
