"""What can be said of a text without a rater: likeness to real stories, copied runs, and whether a model knows story endings.

- `measure` and `distance`: numbers of each text, and how far a set of texts lies from real stories
- `copied`: the longest run of words shared with a stated sample of the training stories
- `ending_line`: does a model find the true last sentence likeliest? Beside it, a rule that knows names only

A measure that a text cannot have, such as names kept in a text without names, is nan and counts as not defined.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from blm_core.clean import CLOSED, fold, words
from blm_core.evaluate import Interval, mean_interval, paired_difference, verdict

if TYPE_CHECKING:
    from blm_core.evidence.models import ComparedModel

# A capitalised word behind a lower-case letter, a digit or a comma: it is not capitalised because a sentence starts.
NAME = re.compile(r"(?<=[a-z0-9,;] )[A-Z][a-z]+")
TITLES = re.compile(r"(?:^|[\s\"'(])(?:Mr|Mrs|Ms|Dr|St)\.$")  # a full stop behind these ends no sentence
# `"Stop!" Tom cried.` is one sentence: a few words and a verb of speech belong to the quotation before them.
SPEECH = re.compile(
    r"(?:[\w']+ ){1,3}(?:said|asked|answered|replied|cried|called|shouted|yelled|whispered|exclaimed|laughed|added|thought)\b"
)
STOP = re.compile(r"[.!?]+(?P<close>[\"')\u201d\u2019]*)(?P<gap>\s+|$)")

# ---- Likeness to real stories


def sentences(text: str) -> list[str]:
    """The sentences of `text` with the white space behind them; joined, they are the text again.

    A sentence ends at `.`, `!` or `?`, with the quotation marks that close there, and at every newline. No sentence ends
    inside a quotation; one that is never closed ends with its paragraph.
    """
    found = []
    for paragraph in re.findall(r"[^\n]*\n\s*|[^\n]+$", text):
        start = 0
        for stop in STOP.finditer(paragraph):
            inside, after = paragraph[: stop.end("close")], paragraph[stop.end() :]
            if inside.count('"') % 2 or inside.count("\u201c") > inside.count("\u201d") or TITLES.search(inside):
                continue
            if stop["close"] and (after[:1].islower() or (not stop[0].startswith(".") and SPEECH.match(after))):
                continue
            found.append(paragraph[start : stop.end()])
            start = stop.end()
        if start < len(paragraph):
            found.append(paragraph[start:])
    return found


def inflections(word: str) -> set[str]:
    """`word` and its regular forms: -s, -ed, -ing, -er, -est, -ly, with y to i, dropped e and doubled consonant."""
    stems = {word}
    if re.search("[^aeiou]y$", word):
        stems.add(word[:-1] + "i")
    stems.add(word.removesuffix("e"))
    if re.search("[^aeiou][aeiou][^aeiouwxy]$", word):
        stems.add(word + word[-1])
    return {word} | {stem + ending for stem in stems for ending in ("s", "es", "ed", "ing", "er", "est", "ly", "'s")}


@lru_cache
def easy_words() -> frozenset[str]:
    """The Dale-Chall list of words that most children of ten know (Dale and Chall, 1995; textstat's copy) and their forms."""
    listed = (resources.files("textstat") / "resources/en/easy_words.txt").read_text().split()
    return frozenset(form for word in listed for form in inflections(word.lower()))


def easy_share(text: str) -> float:
    """The share of the words of `text` that are on the Dale-Chall list; names of characters are left out, as its rules say."""
    called = {name.lower() for name in names(text)}
    return _mean([word in easy_words() for word in words(fold(text)) if word.removesuffix("'s") not in called])


def reading_grade(text: str) -> float:
    """Flesch-Kincaid grade of textstat: 0.39 words per sentence + 11.8 syllables per word - 15.59 (Kincaid et al., 1975)."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of its import of pkg_resources
        from textstat import textstat

    textstat.set_rounding(False)
    return textstat.flesch_kincaid_grade(fold(text)) if words(fold(text)) else math.nan


def dialogue_share(text: str) -> float:
    """The share of words between double quotes; speech that is not closed goes on to the end of its line."""
    parts = (part for line in fold(text).splitlines() for part in enumerate(line.split('"')))
    return _mean([i % 2 for i, part in parts for _ in words(part)])


def distinct(text: str, n: int, length: int) -> float:
    """Distinct n-grams of words over all n-grams (Li et al., 2016), in the first `length` words.

    The share falls as texts grow, so only equal lengths compare: a text with fewer words is nan.
    """
    found = words(fold(text))
    if len(found) < length:
        return math.nan
    grams = list(zip(*(found[i:length] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams)


def names(text: str) -> set[str]:
    """Capitalised words of at least two letters that stand inside a sentence and never in lower case: mostly characters."""
    text = fold(text)
    written = _words_as_written(text)
    return {name for name in NAME.findall(text) if name.lower() not in written}


def names_kept(text: str) -> float:
    """The share of the names in the first third of the sentences that stand again in the last third.

    nan without such a name, or with fewer than three sentences.
    """
    parts = sentences(fold(text))
    if len(parts) < 3:
        return math.nan
    third = len(parts) // 3
    last = _words_as_written(" ".join(parts[-third:]))
    return _mean([name in last for name in _words_as_written(" ".join(parts[:third])) & names(text)])


def _words_as_written(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", text))


def measure(texts: Sequence[str], length: int = 100) -> dict[str, np.ndarray]:
    """Every measure of every text, by name: arrays (len(texts),). Repetition is counted in the first `length` words."""
    found = {
        "easy words": [easy_share(text) for text in texts],
        "reading grade": [reading_grade(text) for text in texts],
        "dialogue": [dialogue_share(text) for text in texts],
        "distinct words": [distinct(text, 1, length) for text in texts],
        "distinct pairs": [distinct(text, 2, length) for text in texts],
        "repeated fours": [1 - distinct(text, 4, length) for text in texts],
        "ends closed": [float(bool(CLOSED.search(fold(text).rstrip()))) for text in texts],
        "names kept": [names_kept(text) for text in texts],
    }
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def summary(measures: dict[str, np.ndarray]) -> dict[str, tuple[Interval, int]]:
    """The mean of each measure with its interval, and on how many texts it is defined; none gives nan and 0."""
    return {name: _interval(values) for name, values in measures.items()}


def distance(measures: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> dict[str, tuple[Interval, int]]:
    """How far texts lie from real stories: (mean - mean of real) / standard deviation of real (Glass's delta).

    The interval is a bootstrap over the texts; mean and deviation of the real stories are taken as known, so there should be
    many of them. nan where they do not vary or either side is not defined. Beside it, the number of texts behind it.
    """
    found = {}
    for name, values in measures.items():
        known = real[name][np.isfinite(real[name])]
        deviation = known.std(ddof=1) if len(known) > 1 else 0.0
        found[name] = _interval((values - known.mean()) / deviation if deviation > 0 else np.full(len(values), math.nan))
    return found


def set_against(ours: dict[str, tuple[Interval, int]], theirs: dict[str, tuple[Interval, int]]) -> Counter:
    """In how many measures `ours` is clearly "nearer" to real stories than `theirs`, clearly "farther", or "undecided".

    Both as `distance` gives them, compared without their sign; clearly means that the two intervals do not meet.
    """
    counts: Counter = Counter()
    for name in ours.keys() & theirs.keys():
        (_, a_low, a_high), (_, b_low, b_high) = ours[name][0], theirs[name][0]
        if np.isfinite([a_low, b_low]).all():
            nearer = max(a_high, -a_low) < max(b_low, -b_high)
            farther = max(a_low, -a_high) > max(b_high, -b_low)
            counts["nearer" if nearer else "farther" if farther else "undecided"] += 1
    return counts


def _interval(values: np.ndarray) -> tuple[Interval, int]:
    defined = values[np.isfinite(values)]
    return mean_interval(defined) if len(defined) else Interval(math.nan, math.nan, math.nan), len(defined)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# ---- Copying

N_WORDS = 4  # shorter runs are in every story


class Copied(NamedTuple):
    """The longest run of words, and its length, that a text shares with a story; 0 where no four words in a row are shared."""

    longest: int
    run: str


def sample(stories: Iterable[str], count: int, seed: int = 0) -> tuple[list[str], int]:
    """`count` of the stories, drawn at random in one pass, and of how many. It bounds the time of `copied`."""
    rng, kept, read = np.random.default_rng(seed), [], 0
    for read, story in enumerate(stories, 1):
        if len(kept) < count:
            kept.append(story)
        elif (place := int(rng.integers(read))) < count:
            kept[place] = story
    return kept, read


def copied(texts: Sequence[str], stories: Iterable[str]) -> list[Copied]:
    """What each text shares with `stories`. Give completions without their prompt: the prompt is not the model's.

    Every run of four words of a story that stands in a text too is followed for as long as both agree.
    """
    own = [words(fold(text)) for text in texts]
    places = defaultdict(list)  # of each run of four words in the texts
    for i, text in enumerate(own):
        for at in range(len(text) - N_WORDS + 1):
            places[tuple(text[at : at + N_WORDS])].append((i, at))
    longest = [[] for _ in own]
    for story in stories:
        told = words(fold(story))
        for start in range(len(told) - N_WORDS + 1):
            for i, at in places.get(tuple(told[start : start + N_WORDS]), ()):
                size = max(len(longest[i]) + 1, N_WORDS)  # what is no longer than the best so far is not followed
                while (run := own[i][at : at + size]) == told[start : start + size] and len(run) == size:
                    longest[i], size = run, size + 1
    return [Copied(len(run), " ".join(run)) for run in longest]


# ---- Endings

CHOICES = 4  # endings per story, one of them true
LENGTH_TOLERANCE = 0.25  # a wrong ending's bytes differ from the true one's by at most this share
MIN_WORDS = 4  # of an ending; "The end." tells nothing


@dataclass(frozen=True)
class EndingItem:
    """A story without its last sentence, and four endings. Each ending begins with the story's own white space."""

    story: int  # index of the story
    beginning: str
    endings: tuple[str, ...]
    truth: int  # index of the true ending


def ending_items(stories: list[str], seed: int = 0, limit: int | None = None) -> list[EndingItem]:
    """One item per story that yields one, in the stories' order.

    As in the Story Cloze test (Mostafazadeh et al., 2016), but with three wrong endings, drawn at random among the last
    sentences of other stories whose bytes differ by at most a quarter. A closing "The end." is left off.
    """
    rng = np.random.default_rng(seed)
    parts = [sentences(story.strip()) for story in stories]
    parts = [part[:-1] if words("".join(part[-1:])) == ["the", "end"] else part for part in parts]
    last = ["".join(part[-1:]).strip() for part in parts]
    said = [" ".join(words(ending)) for ending in last]  # endings that differ in case or punctuation are the same
    usable = np.array([len(part) > 1 and len(key.split()) >= MIN_WORDS for part, key in zip(parts, said, strict=True)])
    sizes = np.array([len(ending.encode()) for ending in last])
    items: list[EndingItem] = []
    for i in np.flatnonzero(usable).tolist():
        if len(items) == limit:
            break
        near = np.flatnonzero(usable & (abs(sizes - sizes[i]) <= LENGTH_TOLERANCE * sizes[i]))
        others: dict[str, str] = {}
        for j in rng.permutation(near):
            if said[j] != said[i]:
                others.setdefault(said[j], last[j])
        wrong = list(others.values())[: CHOICES - 1]
        if len(wrong) < CHOICES - 1:
            continue
        beginning = "".join(parts[i][:-1])
        text = beginning.rstrip()
        truth = int(rng.integers(CHOICES))
        endings = [*wrong[:truth], last[i], *wrong[truth:]]
        items.append(EndingItem(i, text, tuple(beginning[len(text) :] + ending for ending in endings), truth))
    return items


def fitted(items: list[EndingItem], models: Sequence[ComparedModel]) -> list[EndingItem]:
    """The items with first sentences left off until every ending fits into the context of all `models`.

    All models then read the same text.
    """
    done = []
    for item in items:
        rest = sentences(item.beginning)
        while rest and not all(model.fits("".join(rest) + ending) for model in models for ending in item.endings):
            rest = rest[1:]
        done.append(replace(item, beginning="".join(rest)))
    return done


def ending_scores(model: ComparedModel, items: list[EndingItem]) -> np.ndarray:
    """Log-probability of every ending in nats per byte of the ending (n, 4)."""
    prompts = [item.beginning for item in items for _ in item.endings]
    endings = [ending for item in items for ending in item.endings]
    nats = model.logprob(prompts, endings)
    return (nats / [len(ending.encode()) for ending in endings]).reshape(len(items), CHOICES)


def shared_names(items: list[EndingItem]) -> np.ndarray:
    """How many names of the beginning each ending has, less the names that the beginning has not (n, 4).

    A rule that reads nothing else: a wrong ending from another story often gives itself away by its names.
    """
    return np.array([[_shared_names(item.beginning, ending) for ending in item.endings] for item in items])


def _shared_names(beginning: str, ending: str) -> int:
    return len(names(beginning) & _words_as_written(ending)) - len(names(ending) - _words_as_written(beginning))


def chosen_rightly(scores: np.ndarray, items: list[EndingItem]) -> np.ndarray:
    """1 where the true ending has the highest score (n,); where k endings tie, 1 / k if it is one of them."""
    best = scores == scores.max(1, keepdims=True)
    return best[np.arange(len(items)), [item.truth for item in items]] / best.sum(1)


def ending_line(
    stories: list[str], ours: ComparedModel, theirs: ComparedModel | None = None, limit: int | None = None, seed: int = 0
) -> dict:
    """How often each model finds the true ending likeliest per byte, with intervals over stories.

    `ours`, `theirs` and `names` (the rule `shared_names`) are intervals of accuracy over `items` stories; `above_names` is the
    verdict of ours against the rule. Raises ValueError where no story yields an item.
    """
    models = [model for model in (ours, theirs) if model]
    items = fitted(ending_items(stories, seed, limit), models)
    if not items:
        raise ValueError(f"none of {len(stories)} stories yields endings to choose from.")
    by_names = chosen_rightly(shared_names(items), items)
    right = [chosen_rightly(ending_scores(model, items), items) for model in models]
    difference = paired_difference(right[0], by_names)
    return {
        "items": len(items),
        "ours": mean_interval(right[0]),
        "theirs": mean_interval(right[1]) if theirs else None,
        "names": mean_interval(by_names),
        "difference_names": difference,
        "above_names": verdict(difference.low, difference.high, better="higher"),
    }
