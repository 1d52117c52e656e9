"""What can be said of a text without a rater: likeness to real stories, copied runs, and whether a model knows story endings.

- `measure` and `distance`: numbers of each text, and how far a set of texts lies from real stories
- `copied`: the longest run of words shared with a stated sample of the training stories, and the nearest story by ROUGE-2
- `ending_line`: does a model find the true last sentence likeliest? Beside it, a rule that knows names only

A measure that a text cannot have, such as names kept in a text without names, is nan and counts as not defined.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

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
    if word.endswith("e"):
        stems.add(word[:-1])
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
    found = [word for word in words(fold(text)) if word.removesuffix("'s") not in called]
    return _share(sum(word in easy_words() for word in found), len(found))


def reading_grade(text: str) -> float:
    """Flesch-Kincaid grade of textstat: 0.39 words per sentence + 11.8 syllables per word - 15.59 (Kincaid et al., 1975)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of its import of pkg_resources
        from textstat import textstat

    textstat.set_rounding(False)
    return textstat.flesch_kincaid_grade(fold(text)) if words(fold(text)) else math.nan


def dialogue_share(text: str) -> float:
    """The share of words between double quotes; speech that is not closed goes on to the end of its line."""
    inside = total = 0
    for line in fold(text).splitlines():
        for i, part in enumerate(line.split('"')):
            count = len(words(part))
            total += count
            inside += count * (i % 2)
    return _share(inside, total)


def distinct(text: str, n: int, length: int) -> float:
    """Distinct n-grams of words over all n-grams (Li et al., 2016), in the first `length` words.

    The share falls as texts grow, so only equal lengths compare: a text with fewer words is nan.
    """
    found = words(fold(text))
    if len(found) < length:
        return math.nan
    grams = list(zip(*(found[i:length] for i in range(n)), strict=False))
    return _share(len(set(grams)), len(grams))


def names(text: str) -> set[str]:
    """Capitalised words of at least two letters that stand inside a sentence and never in lower case: mostly characters."""
    text = fold(text)
    lower = {word for word in re.findall(r"[A-Za-z]+", text) if word.islower()}
    return {name for name in NAME.findall(text) if name.lower() not in lower}


def names_kept(text: str) -> float:
    """The share of the names in the first third of the sentences that stand again in the last third.

    nan without such a name, or with fewer than three sentences.
    """
    parts = sentences(fold(text))
    if len(parts) < 3:
        return math.nan
    third = len(parts) // 3
    present = set(re.findall(r"[A-Za-z]+", " ".join(parts[:third]))) & names(text)
    last = set(re.findall(r"[A-Za-z]+", " ".join(parts[-third:])))
    return _share(len(present & last), len(present))


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

    0 is no distance. The interval is a bootstrap over the texts; mean and deviation of the real stories are taken as
    known, so there should be many of them. nan where the real stories do not vary or either side is not defined. Returns
    for each measure the interval and the number of texts behind it.
    """
    found = {}
    for name, values in measures.items():
        known = real[name][np.isfinite(real[name])]
        deviation = known.std(ddof=1) if len(known) > 1 else 0.0
        found[name] = _interval((values - known.mean()) / deviation if deviation > 0 else np.full(len(values), math.nan))
    return found


def set_against(ours: dict[str, tuple[Interval, int]], theirs: dict[str, tuple[Interval, int]]) -> Counter:
    """In how many measures `ours` is clearly "nearer" to real stories than `theirs`, clearly "farther", or "undecided".

    Both as `distance` gives them. Clearly means that the whole interval of one distance, taken without its sign, lies below
    the whole interval of the other. Measures that one side does not have are not counted.
    """
    counts: Counter = Counter()
    for name in ours.keys() & theirs.keys():
        (a_low, a_high), (b_low, b_high) = _size(ours[name][0]), _size(theirs[name][0])
        if math.isfinite(a_high) and math.isfinite(b_high):
            counts["nearer" if a_high < b_low else "farther" if a_low > b_high else "undecided"] += 1
    return counts


def _size(interval: Interval) -> tuple[float, float]:
    """The least and the greatest distance from 0 within `interval`."""
    ends = abs(interval.low), abs(interval.high)
    return (0.0 if interval.low <= 0 <= interval.high else min(ends)), max(ends)


def _interval(values: np.ndarray) -> tuple[Interval, int]:
    defined = values[np.isfinite(values)]
    if not len(defined):
        return Interval(math.nan, math.nan, math.nan), 0
    return mean_interval(defined), len(defined)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


# ---- Copying


@dataclass(frozen=True)
class Copied:
    """What one text shares with the sampled training stories.

    `longest` is the length of its longest run of words that stands in a story, `run` the run; `covered` the share of the
    text's words inside shared runs of at least COVER words. `rouge_2` is the precision and `f1` the F1 of ROUGE-2 (Lin, 2004)
    against the `nearest` story, by its position in the sample; None and 0 where no four words in a row are shared.
    """

    words: int
    longest: int
    run: str
    covered: float
    nearest: int | None
    rouge_2: float
    f1: float


COVER = 10
N_WORDS = 4  # shorter runs are in every story
CANDIDATES = 100  # stories that share most four-word runs for their length; the nearest is looked for among them
_BASE = np.uint64(0x9E3779B97F4A7C15)


def sample(stories: Iterable[str], count: int, seed: int = 0) -> tuple[list[str], int]:
    """`count` of the stories, drawn at random in one pass, and of how many. It bounds the memory of `copied`."""
    rng, kept, read = np.random.default_rng(seed), [], 0
    for read, story in enumerate(stories, 1):
        if len(kept) < count:
            kept.append(story)
        elif (place := int(rng.integers(read))) < count:
            kept[place] = story
    return kept, read


class Words:
    """Texts as numbers, with hashes of their runs of n words, which grow word by word; about 40 bytes a word."""

    def __init__(self, texts: Sequence[str], numbers: dict[str, int]):
        parts = [[numbers.setdefault(word, len(numbers)) for word in words(fold(text))] for text in texts]
        self.sizes = np.array([len(part) for part in parts], dtype=np.int64)
        self.tokens = np.fromiter(itertools.chain.from_iterable(parts), np.int64, int(self.sizes.sum()))
        self.owner = np.repeat(np.arange(len(texts)), self.sizes)  # of each word
        self._ends = np.cumsum(self.sizes)
        mixed = (self.tokens.astype(np.uint64) + np.uint64(1)) * _BASE
        self._mixed = mixed ^ (mixed >> np.uint64(29))
        self.n, self.at = 0, np.arange(len(self.tokens))  # where runs of n words begin, all of them in one text
        self.hashes = np.zeros(len(self.at), dtype=np.uint64)

    def grow(self) -> None:
        """One word more at the end of every run; runs that would leave their text go."""
        self.keep(self.at + self.n < self._ends[self.owner[self.at]])
        self.hashes = (self.hashes ^ self._mixed[self.at + self.n]) * _BASE
        self.hashes ^= self.hashes >> np.uint64(32)
        self.n += 1

    def keep(self, which: np.ndarray) -> None:
        self.at, self.hashes = self.at[which], self.hashes[which]


def copied(texts: Sequence[str], stories: Sequence[str]) -> list[Copied]:
    """What each text shares with `stories`. Give completions without their prompt: the prompt is not the model's.

    Runs are compared by 64-bit hashes, length by length; what is not shared at one length cannot be at the next.
    Raises ValueError where no story has a word.
    """
    from rouge_score.rouge_scorer import RougeScorer

    numbers: dict[str, int] = {}
    theirs, own = Words(stories, numbers), Words(texts, numbers)
    if not len(theirs.tokens):
        raise ValueError("there is no training story to search in.")
    longest, first = np.zeros(len(texts), dtype=np.int64), np.zeros(len(texts), dtype=np.int64)
    covered = np.zeros(len(own.tokens) + 1, dtype=np.int64)  # +1 where a long run begins, -1 behind it
    shared_fours: dict[int, Counter] = {}
    while len(own.at):
        own.grow(), theirs.grow()
        if own.n < N_WORDS:
            continue
        own.keep(np.isin(own.hashes, theirs.hashes))
        theirs.keep(np.isin(theirs.hashes, own.hashes))
        longest[own.owner[own.at]] = own.n
        first[own.owner[own.at[::-1]]] = own.at[::-1]  # the first of them stays
        if own.n == N_WORDS:
            shared_fours = _shared(own, theirs)
        if own.n == COVER:
            np.add.at(covered, own.at, 1)
            np.add.at(covered, own.at + COVER, -1)
    inside = np.cumsum(covered)[:-1] > 0
    spelling, scorer, found = list(numbers), RougeScorer(["rouge2"], tokenizer=_Tokenizer()), []
    for i, text in enumerate(texts):
        likely = sorted(shared_fours.get(i, {}).items(), key=lambda x: (-x[1] / (own.sizes[i] + theirs.sizes[x[0]]), x[0]))
        scores = [(scorer.score(stories[j], text)["rouge2"], j) for j, _ in likely[:CANDIDATES]]
        best, nearest = max(scores, key=lambda score: score[0].fmeasure, default=(None, None))
        run = " ".join(spelling[token] for token in own.tokens[first[i] : first[i] + longest[i]])
        share = _share(float(inside[own.owner == i].sum()), int(own.sizes[i])) if own.sizes[i] else 0.0
        rouge, f1 = (best.precision, best.fmeasure) if best else (0.0, 0.0)
        found.append(Copied(int(own.sizes[i]), int(longest[i]), run, share, nearest, rouge, f1))
    return found


def _shared(own: Words, theirs: Words) -> dict[int, Counter]:
    """For each text, how many of its runs stand in each story."""
    holders: dict[int, set[int]] = {}
    for story, run in zip(theirs.owner[theirs.at].tolist(), theirs.hashes.tolist(), strict=True):
        holders.setdefault(run, set()).add(story)
    counts: dict[int, Counter] = {}
    for i, run in zip(own.owner[own.at].tolist(), own.hashes.tolist(), strict=True):
        counts.setdefault(i, Counter()).update(holders[run])
    return counts


class _Tokenizer:
    """Words as everywhere in this project, for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return words(fold(text))


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


def ending_items(stories: list[str], seed: int = 0, limit: int | None = None) -> tuple[list[EndingItem], dict[str, int]]:
    """One item per story that yields one, in the stories' order, and how many do not, by reason.

    As in the Story Cloze test (Mostafazadeh et al., 2016), but with three wrong endings, drawn at random among the last
    sentences of other stories whose bytes differ by at most a quarter. A closing "The end." is left off.
    """
    rng = np.random.default_rng(seed)
    parts = [_without_the_end(sentences(story.strip())) for story in stories]
    last = [part[-1].strip() if part else "" for part in parts]
    said = [" ".join(words(ending)) for ending in last]  # endings that differ in case or punctuation are the same
    usable = np.array([len(part) > 1 and len(key.split()) >= MIN_WORDS for part, key in zip(parts, said, strict=True)])
    sizes = np.array([len(ending.encode()) for ending in last])
    counts = {"no ending of four words": int((~usable).sum()), "no other endings of that length": 0}
    items: list[EndingItem] = []
    for i, part in enumerate(parts):
        if not usable[i] or len(items) == limit:
            continue
        near = np.flatnonzero(usable & (abs(sizes - sizes[i]) <= LENGTH_TOLERANCE * sizes[i]))
        wrong: dict[str, str] = {}
        for j in rng.permutation(near):
            if said[j] != said[i]:
                wrong.setdefault(said[j], last[j])
            if len(wrong) == CHOICES - 1:
                break
        if len(wrong) < CHOICES - 1:
            counts["no other endings of that length"] += 1
            continue
        beginning = "".join(part[:-1])
        text = beginning.rstrip()
        endings, truth = [*wrong.values()], int(rng.integers(CHOICES))
        endings.insert(truth, last[i])
        items.append(EndingItem(i, text, tuple(beginning[len(text) :] + ending for ending in endings), truth))
    return items, counts


def fitted(items: list[EndingItem], models: Sequence[ComparedModel]) -> tuple[list[EndingItem], int]:
    """The items with first sentences left off until every ending fits into the context of all `models`; and of how many.

    All models then read the same text. Raises ValueError where even the ending alone does not fit.
    """
    done, shortened = [], 0
    for item in items:
        rest = sentences(item.beginning)
        while not all(model.fits("".join(rest) + ending) for model in models for ending in item.endings):
            if not rest:
                raise ValueError(f"an ending of story {item.story} is longer than the context of a model.")
            rest = rest[1:]
        beginning = "".join(rest)
        shortened += beginning != item.beginning
        done.append(EndingItem(item.story, beginning, item.endings, item.truth))
    return done, shortened


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
    scores = np.zeros((len(items), CHOICES))
    for row, item in enumerate(items):
        known = names(item.beginning)
        for column, ending in enumerate(item.endings):
            present = set(re.findall(r"[A-Za-z]+", ending))
            strange = names(ending) - set(re.findall(r"[A-Za-z]+", item.beginning))
            scores[row, column] = len(known & present) - len(strange)
    return scores


def chosen_rightly(scores: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """1 where the true ending has the highest score (n,); where k endings tie, 1 / k if it is one of them."""
    scores = np.asarray(scores, dtype=np.float64)
    best = scores == scores.max(1, keepdims=True)
    return best[np.arange(len(scores)), np.asarray(truth)] / best.sum(1)


def ending_line(
    stories: list[str], ours: ComparedModel, theirs: ComparedModel | None = None, limit: int | None = None, seed: int = 0
) -> dict:
    """How often each model finds the true ending likeliest per byte, with intervals over stories.

    `ours`, `theirs` and `names` (the rule `shared_names`) are intervals of accuracy; `above_names` is the verdict of ours
    against the rule, `verdict` ours against theirs ("not run" without them). `items`, `left_out` by reason and `shortened`
    say what was counted. Raises ValueError where no story yields an item.
    """
    items, left_out = ending_items(stories, seed, limit)
    if not items:
        raise ValueError(f"none of {len(stories)} stories yields endings to choose from: {left_out}.")
    items, shortened = fitted(items, [model for model in (ours, theirs) if model])
    truth = [item.truth for item in items]
    by_names = chosen_rightly(shared_names(items), truth)
    right = [chosen_rightly(ending_scores(model, items), truth) for model in (ours, theirs) if model]
    above = paired_difference(right[0], by_names)
    line = {"items": len(items), "left_out": left_out, "shortened": shortened, "chance": 1 / CHOICES}
    line |= {"ours": mean_interval(right[0]), "names": mean_interval(by_names), "difference_names": above}
    line |= {"above_names": verdict(above.low, above.high, better="higher")}
    if not theirs:
        return line | {"theirs": None, "difference": None, "verdict": "not run"}
    difference = paired_difference(*right)
    return line | {
        "theirs": mean_interval(right[1]),
        "difference": difference,
        "verdict": verdict(difference.low, difference.high, better="higher"),
    }


def _without_the_end(parts: list[str]) -> list[str]:
    return parts[:-1] if parts and words(parts[-1]) == ["the", "end"] else parts
