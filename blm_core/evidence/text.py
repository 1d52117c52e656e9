"""What can be said of a text without a rater: likeness to real stories, copied runs, and whether a model knows story endings.

- `measure` and `distance`: numbers of each text, and how far a set of texts lies from real stories
- `copied`: the longest run of words shared with a stated sample of the training stories
- `ending_items`, `ending_scores`: is the true last sentence of a story the likeliest of four? `shared_names` knows names only

A measure that a text cannot have, such as names kept in a text without names, is nan.
"""

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from importlib import resources
from itertools import pairwise, takewhile
from typing import NamedTuple

import numpy as np

from blm_core.clean import fold, words
from blm_core.evaluate import Interval, mean_interval
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
    stems = {word, word.removesuffix("e"), re.sub("(?<=[^aeiou])y$", "i", word)}
    if re.search("[^aeiou][aeiou][^aeiouwxy]$", word):
        stems.add(word + word[-1])
    return {word} | {stem + ending for stem in stems for ending in ("s", "es", "ed", "ing", "er", "est", "ly", "'s")}


@lru_cache
def _textstat():
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of its import of pkg_resources
        import textstat

    textstat.set_rounding(False)
    return textstat


@lru_cache
def easy_words() -> frozenset[str]:
    """Words that most children of ten know (Dale and Chall, 1995; textstat's copy), with their regular forms."""
    listed = (resources.files(_textstat()) / "resources/en/easy_words.txt").read_text().split()
    return frozenset(form for word in listed for form in inflections(word.lower()))


def easy_share(text: str) -> float:
    """The share of the words of `text` that are on the Dale-Chall list; names of characters are left out, as its rules say."""
    called = {name.lower() for name in names(text)}
    return _mean([word in easy_words() for word in words(fold(text)) if word.removesuffix("'s") not in called])


def reading_grade(text: str) -> float:
    """Flesch-Kincaid grade of textstat: 0.39 words per sentence + 11.8 syllables per word - 15.59 (Kincaid et al., 1975)."""
    return _textstat().flesch_kincaid_grade(fold(text)) if words(fold(text)) else math.nan


def dialogue_share(text: str) -> float:
    """The share of words between double quotes; speech that is not closed goes on to the end of its line."""
    parts = (part for line in fold(text).splitlines() for part in enumerate(line.split('"')))
    return _mean([i % 2 for i, part in parts for _ in words(part)])


def distinct_pairs(text: str, length: int) -> float:
    """The share of distinct pairs of neighbouring words (Li et al., 2016) in the first `length` words; nan with fewer."""
    found = words(fold(text))[:length]
    return len(set(pairwise(found))) / (length - 1) if len(found) == length else math.nan


def names(text: str) -> set[str]:
    """Capitalised words of at least two letters that stand inside a sentence and never in lower case: mostly characters."""
    text = fold(text)
    written = _words_as_written(text)
    return {name for name in NAME.findall(text) if name.lower() not in written}


def names_kept(text: str) -> float:
    """The share of the names in the first third of the sentences that stand again in the last third."""
    parts = sentences(fold(text))
    third = len(parts) // 3
    last = _words_as_written(" ".join(parts[-third:]))
    return _mean([name in last for name in _words_as_written(" ".join(parts[:third])) & names(text)])


def _words_as_written(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", text))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def measure(texts: Sequence[str], length: int = 100) -> dict[str, np.ndarray]:
    """Every measure of every text, by name: arrays (len(texts),). Repetition is counted in the first `length` words."""
    measures = {
        "easy words": easy_share,
        "reading grade": reading_grade,
        "dialogue": dialogue_share,
        "distinct pairs": partial(distinct_pairs, length=length),
        "names kept": names_kept,
    }
    return {name: np.array([of(text) for text in texts], dtype=np.float64) for name, of in measures.items()}


def mean_where_defined(values: np.ndarray) -> Interval:
    return mean_interval(values[np.isfinite(values)])


def distance(measures: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> dict[str, Interval]:
    """(mean of texts - mean of real stories) / standard deviation of real (Glass's delta), which count as known."""
    return {
        name: mean_where_defined((values - np.nanmean(real[name])) / np.nanstd(real[name], ddof=1))
        for name, values in measures.items()
    }


def clearly_nearer(ours: dict[str, Interval], theirs: dict[str, Interval]) -> list[str]:
    """The measures in which `ours` lies nearer to real stories than `theirs`: their intervals without sign do not meet."""
    largest = {name: max(high, -low) for name, (_, low, high) in ours.items()}
    return [name for name, (_, low, high) in theirs.items() if largest[name] < max(low, -high)]


# ---- Copying

N_WORDS = 4  # shorter runs are in every story


def sample(stories: Iterable, count: int) -> tuple[list, int]:
    """`count` of the stories, drawn at random in one pass, and of how many. It bounds the time of `copied`."""
    rng, kept, read = np.random.default_rng(0), [], 0
    for read, story in enumerate(stories, 1):
        if len(kept) < count:
            kept.append(story)
        elif (place := int(rng.integers(read))) < count:
            kept[place] = story
    return kept, read


def copied(texts: Sequence[str], stories: Iterable[str]) -> list[int]:
    """The longest run of words that each text shares with one of `stories`; 0 where no four words in a row are shared.

    Give completions without their prompt: the prompt is not the model's.
    """
    own = [words(fold(text)) for text in texts]
    places = defaultdict(list)  # of each run of four words in the texts
    for i, text in enumerate(own):
        for at in range(len(text) - N_WORDS + 1):
            places[tuple(text[at : at + N_WORDS])].append((i, at))
    longest = [0] * len(own)
    for story in stories:
        told = words(fold(story))
        for start in range(len(told) - N_WORDS + 1):
            for i, at in places.get(tuple(told[start : start + N_WORDS]), ()):
                shared = takewhile(lambda both: both[0] == both[1], zip(own[i][at:], told[start:], strict=False))
                longest[i] = max(longest[i], len(list(shared)))
    return longest


# ---- Endings

CHOICES = 4  # endings per story, one of them true
LENGTH_TOLERANCE = 0.25  # a wrong ending's bytes differ from the true one's by at most this share
MIN_WORDS = 4  # of an ending; "The end." tells nothing


class EndingItem(NamedTuple):
    """A story without its last sentence, and four endings. Each ending begins with the story's own white space."""

    beginning: str
    endings: list[str]
    truth: int  # index of the true ending


def ending_items(stories: list[str], limit: int | None = None) -> list[EndingItem]:
    """One item per story that yields one, as in the Story Cloze test (Mostafazadeh et al., 2016), but with three wrong endings.

    They are drawn among the last sentences of other stories, of about as many bytes. A closing "The end." is left off.
    """
    rng = np.random.default_rng(0)
    parts = [sentences(story.strip()) for story in stories]
    parts = [part[:-1] if words("".join(part[-1:])) == ["the", "end"] else part for part in parts]
    last = ["".join(part[-1:]).strip() for part in parts]
    said = [" ".join(words(ending)) for ending in last]  # endings that differ in case or punctuation are the same
    usable = np.array([len(part) > 1 and len(key.split()) >= MIN_WORDS for part, key in zip(parts, said, strict=True)])
    sizes = np.array([len(ending.encode()) for ending in last])
    items: list[EndingItem] = []
    for i in np.flatnonzero(usable):
        if len(items) == limit:
            break
        near = np.flatnonzero(usable & (abs(sizes - sizes[i]) <= LENGTH_TOLERANCE * sizes[i]))
        others: dict[str, str] = {}
        for j in rng.permutation(near):
            if said[j] != said[i]:
                others.setdefault(said[j], last[j])
        endings = list(others.values())[: CHOICES - 1]
        if len(endings) < CHOICES - 1:
            continue
        truth = int(rng.integers(CHOICES))
        endings.insert(truth, last[i])
        beginning = "".join(parts[i][:-1])
        text = beginning.rstrip()
        items.append(EndingItem(text, [beginning[len(text) :] + ending for ending in endings], truth))
    return items


def ending_scores(model: ComparedModel, items: list[EndingItem]) -> np.ndarray:
    """log2 P(ending | beginning) per byte of the ending (n, 4): bits of the beginning less bits of both together."""
    texts = [item.beginning + ending for item in items for ending in ("", *item.endings)]
    bits = model.story_bits(texts).reshape(len(items), 1 + CHOICES)
    return (bits[:, :1] - bits[:, 1:]) / [[len(ending.encode()) for ending in item.endings] for item in items]


def shared_names(items: list[EndingItem]) -> np.ndarray:
    """How many names of the beginning each ending has, less the names that the beginning has not (n, 4).

    A rule that reads nothing else: a wrong ending from another story often gives itself away by its names.
    """

    def score(beginning: str, ending: str) -> int:
        return len(names(beginning) & _words_as_written(ending)) - len(names(ending) - _words_as_written(beginning))

    return np.array([[score(item.beginning, ending) for ending in item.endings] for item in items])


def chosen_rightly(scores: np.ndarray, items: list[EndingItem]) -> np.ndarray:
    """1 where the true ending has the highest score (n,); where k endings tie, 1 / k if it is one of them."""
    best = scores == scores.max(1, keepdims=True)
    return best[np.arange(len(items)), [item.truth for item in items]] / best.sum(1)
