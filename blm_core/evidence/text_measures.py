"""What a text is like, in numbers that can be compared with those of real stories.

Each measure is a plain function of one text, except self-BLEU, which needs a set. A measure that a text cannot have, such
as names kept in a text without names, is nan and counts as not defined. `measure` gathers them; `distance` says how far a
set of texts lies from real stories.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from blm_core.clean import CLOSED, fold, words
from blm_core.evaluate import Interval, mean_interval
from blm_core.evidence.endings import sentences

# A capitalised word behind a lower-case letter, a digit or a comma: it is not capitalised because a sentence starts.
NAME = re.compile(r"(?<=[a-z0-9,;] )[A-Z][a-z]+")
VOWELS = re.compile("[aeiouy]+")
SILENT = re.compile("[^aeiouyl]e$|[aeiouy]le$|[^aeiouytd]ed$|[^aeiouysxzcgh]es$")
SMOOTHING = 0.1  # stands for a count of none in BLEU (Chen & Cherry, 2014, method 1)


def child_vocabulary(stories: Iterable[str], minimum: int = 10) -> frozenset[str]:
    """The words that occur in at least `minimum` stories: what a small reader of the training stories would know."""
    counts: Counter = Counter()
    for story in stories:
        counts.update(set(words(story)))
    return frozenset(word for word, count in counts.items() if count >= minimum)


def known_share(text: str, vocabulary: frozenset[str]) -> float:
    """The share of the words of `text` that are in `vocabulary`."""
    found = words(fold(text))
    return _share(sum(word in vocabulary for word in found), len(found))


def syllables(word: str) -> int:
    """Groups of vowels, less a silent ending (-e, -ed, -es); at least one."""
    word = word.lower()
    return max(1, len(VOWELS.findall(word)) - bool(SILENT.search(word)))


def reading_grade(text: str) -> float:
    """Flesch-Kincaid grade: 0.39 words per sentence + 11.8 syllables per word - 15.59 (Kincaid et al., 1975)."""
    found, count = words(fold(text)), len(sentences(text))
    if not found:
        return math.nan
    return 0.39 * len(found) / count + 11.8 * sum(map(syllables, found)) / len(found) - 15.59


def dialogue_share(text: str) -> float:
    """The share of words between double quotes; speech that is not closed goes on to the end of its line."""
    inside = total = 0
    for line in fold(text).splitlines():
        for i, part in enumerate(line.split('"')):
            count = len(words(part))
            total += count
            inside += count * (i % 2)
    return _share(inside, total)


def ngrams(items: Sequence, n: int) -> list[tuple]:
    return list(zip(*(items[i:] for i in range(n)), strict=False))


def distinct(text: str, n: int, length: int = 0) -> float:
    """Distinct n-grams of words over all n-grams (Li et al., 2016), in the first `length` words.

    The share falls as texts grow, so only equal lengths compare: a text with fewer words is nan. 0 takes all words.
    """
    found = words(fold(text))
    if len(found) < length:
        return math.nan
    grams = ngrams(found[: length or None], n)
    return _share(len(set(grams)), len(grams))


def repeated_4grams(text: str, length: int = 0) -> float:
    """The share of runs of four words that stood in the text before, in its first `length` words as in `distinct`."""
    return 1 - distinct(text, 4, length)


def self_bleu(texts: Sequence[str], n: int = 4, length: int = 0) -> np.ndarray:
    """BLEU-n of each text against all others as references (Zhu et al., 2018); the higher, the more alike. (len(texts),)

    BLEU as Papineni et al. (2002): clipped precisions of 1 … n, geometric mean, closest length for the brevity penalty.
    A precision of none counts as 0.1 matches. It grows with the number of texts and with their length: compare sets of
    equal size, and of the first `length` words; texts with fewer are nan and no reference.
    """
    found = [words(fold(text)) for text in texts]
    used = [i for i, own in enumerate(found) if len(own) >= max(length, 1)]
    values = np.full(len(texts), math.nan)
    if len(used) < 2:
        return values
    found = {i: found[i][: length or None] for i in used}
    sizes = np.array([len(found[i]) for i in used])
    logs = {i: [] for i in used}
    for k in range(1, n + 1):
        counts = {i: Counter(ngrams(found[i], k)) for i in used}
        # The highest count in any text, who has it, and the highest elsewhere: what the others offer to each text.
        best: dict[tuple, tuple[int, int, int]] = {}
        for i, own in counts.items():
            for gram, count in own.items():
                first, owner, second = best.get(gram, (0, -1, 0))
                best[gram] = (count, i, first) if count > first else (first, owner, max(second, count))
        for i, own in counts.items():
            offered = ((count, best[gram]) for gram, count in own.items())
            matches = sum(min(count, second if owner == i else first) for count, (first, owner, second) in offered)
            if total := own.total():
                logs[i].append(math.log(max(matches, SMOOTHING) / total))
    for position, i in enumerate(used):
        if len(logs[i]) < n:  # too short for one n-gram
            continue
        others = np.delete(sizes, position)
        closest = min(others, key=lambda size, own=sizes[position]: (abs(size - own), size))
        values[i] = min(1.0, math.exp(1 - closest / sizes[position])) * math.exp(sum(logs[i]) / n)
    return values


def ends(text: str) -> float:
    """1 where the text closes with . ! or ?, quotes and brackets behind it allowed, else 0."""
    return float(bool(CLOSED.search(fold(text).rstrip())))


def names(text: str) -> set[str]:
    """Capitalised words of at least two letters that stand inside a sentence and never in lower case: mostly characters."""
    text = fold(text)
    lower = {word for word in re.findall(r"[A-Za-z]+", text) if word.islower()}
    return {name for name in NAME.findall(text) if name.lower() not in lower}


def names_kept(text: str, beginning: str = "") -> float:
    """The share of the names in the beginning that stand again in the last third of the sentences of `text`.

    `beginning` is the prompt that `text` continues; without one it is the first third of the sentences of `text`. What
    counts as a name is found in both together. nan without such a name, or with fewer than three sentences.
    """
    parts = sentences(fold(text))
    if len(parts) < 3:
        return math.nan
    third = len(parts) // 3
    start = fold(beginning) or " ".join(parts[:third])
    present = set(re.findall(r"[A-Za-z]+", start)) & names(f"{beginning} {text}")
    last = set(re.findall(r"[A-Za-z]+", " ".join(parts[-third:])))
    return _share(len(present & last), len(present))


def inflections(word: str) -> set[str]:
    """`word` and its regular forms: -s, -ed, -ing, -er, -est, -ly, with y to i, dropped e and doubled consonant."""
    word = word.lower()
    stems = {word}
    if re.search("[^aeiou]y$", word):
        stems.add(word[:-1] + "i")
    if word.endswith("e"):
        stems.add(word[:-1])
    if re.search("[^aeiou][aeiou][^aeiouwxy]$", word):
        stems.add(word + word[-1])
    return {word} | {stem + ending for stem in stems for ending in ("s", "es", "ed", "ing", "er", "est", "ly")}


def required_used(text: str, required: Sequence[str]) -> float:
    """The share of the `required` words that stand in `text`, in any regular form (the *Instruct* check)."""
    found = set(words(fold(text)))
    return _share(sum(bool(inflections(word) & found) for word in required), len(required))


def measure(
    texts: Sequence[str],
    vocabulary: frozenset[str],
    beginnings: Sequence[str] | None = None,
    required: Sequence[Sequence[str]] | None = None,
    length: int = 100,
    self_bleu_texts: int = 200,
) -> dict[str, np.ndarray]:
    """Every measure of every text, by name: arrays (len(texts),), nan where a text cannot have it.

    `beginnings` are the prompts that the texts continue, `required` the words that each was asked to use. Repetition,
    distinct-n and self-BLEU read the first `length` words, self-BLEU of the first `self_bleu_texts` texts that are long
    enough.
    """
    for name, given in (("beginnings", beginnings), ("required", required)):
        if given is not None and len(given) != len(texts):
            raise ValueError(f"{len(given)} {name} for {len(texts)} texts: one for each is needed.")
    starts = beginnings if beginnings is not None else [""] * len(texts)
    long_enough = [i for i, text in enumerate(texts) if len(words(fold(text))) >= max(length, 1)][:self_bleu_texts]
    alike = np.full(len(texts), math.nan)
    alike[long_enough] = self_bleu([texts[i] for i in long_enough], length=length)
    found = {
        "known words": [known_share(text, vocabulary) for text in texts],
        "reading grade": [reading_grade(text) for text in texts],
        "dialogue": [dialogue_share(text) for text in texts],
        "repeated 4-grams": [repeated_4grams(text, length) for text in texts],
        **{f"distinct-{n}": [distinct(text, n, length) for text in texts] for n in (1, 2, 3)},
        "self-BLEU": alike,
        "ends closed": [ends(text) for text in texts],
        "names kept": [names_kept(text, start) for text, start in zip(texts, starts, strict=True)],
    }
    if required is not None:
        found["required words"] = [required_used(text, asked) for text, asked in zip(texts, required, strict=True)]
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def summary(measures: dict[str, np.ndarray]) -> dict[str, tuple[Interval, int]]:
    """The mean of each measure with its interval, and on how many texts it is defined; none gives nan and 0."""
    return {name: _interval(values) for name, values in measures.items()}


def distance(measures: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> dict[str, tuple[Interval, int]]:
    """How far texts lie from real stories: (mean - mean of real) / standard deviation of real (Glass's delta).

    0 is no distance. The interval is a bootstrap over the texts; mean and deviation of the real stories are taken as
    known, so there should be many of them. nan where the real stories do not vary or either side is not defined. Returns
    for each measure that both have the interval and the number of texts behind it.
    """
    found = {}
    for name in measures:
        if name not in real:
            continue
        known = real[name][np.isfinite(real[name])]
        deviation = known.std(ddof=1) if len(known) > 1 else 0.0
        if deviation > 0:
            found[name] = _interval((measures[name] - known.mean()) / deviation)
        else:
            found[name] = Interval(math.nan, math.nan, math.nan), 0
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
