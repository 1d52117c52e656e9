"""Is it memory? What a text shares with the training stories, found exactly.

An index holds every training word once, as a number, and the sorted 64-bit hashes of its runs of four words. Each hit is
compared word by word, so no collision counts. Memory is 16 bytes per word of the stories (20 beyond two thousand million
words); with `stride` s it is 4 + 12 / s, and runs of at least 4 + s - 1 words are still found with certainty.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from blm_core.clean import fold, words

N_WORDS = 4
CANDIDATES = 500  # stories that share most four-word runs for their length; the nearest is looked for among them
_BETWEEN = -1  # stands between stories; no word of a text equals it
_UNKNOWN = -2  # a word that no story has
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Copied:
    """What one text shares with the training stories.

    `run` is its longest run of words that stands in a story, `longest` the run's length and `story` the position of
    that story; `covered` is the share of the text's words inside any shared run of at least `COVER` words. ROUGE-2 is
    that of the `nearest` story: clipped bigrams in common over those of the text (precision) and of the story (recall).
    Without a hit, `story` and `nearest` are None and the numbers 0.
    """

    words: int
    longest: int
    run: str
    story: int | None
    covered: float
    nearest: int | None
    precision: float
    recall: float
    f1: float


COVER = 10


class Index:
    """All training stories, ready to be searched for what a text copies."""

    def __init__(self, stories: Iterable[str], stride: int = 1):
        """Read `stories` once. Raises ValueError where none has a word or `stride` is below 1."""
        if stride < 1:
            raise ValueError(f"stride = {stride} must be at least 1.")
        numbers: dict[str, int] = {}
        parts, starts, at = [], [], 0
        for story in tqdm(stories, desc="indexing", unit="story"):
            own = [numbers.setdefault(word, len(numbers)) for word in words(story)]
            starts.append(at)
            parts.append(np.array([*own, _BETWEEN], dtype=np.int32))
            at += len(own) + 1
        if not numbers:
            raise ValueError("there is no training story to search in.")
        self.numbers, self.stride = numbers, stride
        self.spelling = list(numbers)
        self.starts = np.array(starts)
        self.tokens = np.concatenate([*parts, np.full(N_WORDS, _BETWEEN, np.int32)])  # so that a window never runs out
        hashes = _hashes(self.tokens)
        wide = np.int32 if len(hashes) < 2**31 else np.int64
        positions = np.arange(0, len(hashes), stride, dtype=wide)
        whole = np.ones(len(positions), dtype=bool)
        for i in range(N_WORDS):
            whole &= self.tokens[positions + i] != _BETWEEN
        positions = positions[whole]
        hashes = hashes[positions]
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.positions = hashes[order], positions[order]

    @property
    def bytes(self) -> int:
        """Memory of the arrays, without the spelling of the words."""
        return sum(array.nbytes for array in (self.tokens, self.hashes, self.positions, self.starts))

    def story(self, number: int) -> list[str]:
        """The words of a story by its position."""
        return [self.spelling[token] for token in self._story(number)]

    def check(self, text: str) -> Copied:
        """What `text` shares with the stories. Give a completion without its prompt: the prompt is not the model's."""
        own = np.array([self.numbers.get(word, _UNKNOWN) for word in words(fold(text))], dtype=np.int32)
        at, found = self._hits(own)
        if not len(at):
            return Copied(len(own), 0, "", None, 0.0, None, 0.0, 0.0, 0.0)
        before, behind = self._extended(own, at, found)
        lengths = before + behind
        best = int(lengths.argmax())
        longest, first = int(lengths[best]), int(at[best] - before[best])
        story = int(self._owners(found[best : best + 1])[0])
        run = " ".join(self.spelling[token] for token in own[first : first + longest])
        return Copied(len(own), longest, run, story, _covered(len(own), at - before, lengths), *self._nearest(own, at, found))

    def _story(self, number: int) -> np.ndarray:
        end = self.starts[number + 1] if number + 1 < len(self.starts) else len(self.tokens) - N_WORDS
        return self.tokens[self.starts[number] : end - 1]

    def _owners(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, positions, "right") - 1

    def _hits(self, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every (position in the text, position in the stories) at which the same four words begin."""
        if len(own) < N_WORDS:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        hashes = _hashes(own)
        first, last = np.searchsorted(self.hashes, hashes, "left"), np.searchsorted(self.hashes, hashes, "right")
        counts = last - first
        at = np.repeat(np.arange(len(hashes)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found = self.positions[np.repeat(first, counts) + within].astype(np.int64)
        same = np.ones(len(at), dtype=bool)
        for i in range(N_WORDS):
            same &= own[at + i] == self.tokens[found + i]
        return at[same], found[same]

    def _extended(self, own: np.ndarray, at: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many words match before each hit, and from it on."""
        sizes = []
        for step, first in ((-1, -1), (1, N_WORDS)):
            size = np.zeros(len(at), dtype=np.int64)
            alive, offset = np.arange(len(at)), first
            while len(alive):
                here, there = at[alive] + offset, found[alive] + offset
                inside = (here >= 0) & (here < len(own)) & (there >= 0) & (there < len(self.tokens))
                alive, here, there = alive[inside], here[inside], there[inside]
                alive = alive[own[here] == self.tokens[there]]
                size[alive] += 1
                offset += step
            sizes.append(size)
        return sizes[0], sizes[1] + N_WORDS

    def _nearest(self, own: np.ndarray, at: np.ndarray, found: np.ndarray) -> tuple[int, float, float, float]:
        """Position, precision, recall and F1 of the story nearest by ROUGE-2 (Lin, 2004) among the likely ones."""
        shared = np.unique(self._owners(found) * len(own) + at) // len(own)  # a run counts once in each story
        stories, counts = np.unique(shared, return_counts=True)
        sizes = np.diff(self.starts, append=len(self.tokens) - N_WORDS)[stories] - 1
        likely = np.sort(np.argsort(-counts / (len(own) + sizes), kind="stable")[:CANDIDATES])
        stories, sizes = stories[likely], sizes[likely]
        wanted, times = np.unique(_pairs(own[:-1], own[1:]), return_counts=True)
        row = np.repeat(np.arange(len(stories)), sizes - 1)
        first = np.repeat(self.starts[stories] - np.cumsum(sizes - 1) + sizes - 1, sizes - 1) + np.arange(len(row))
        pairs = _pairs(self.tokens[first], self.tokens[first + 1])
        place = np.minimum(np.searchsorted(wanted, pairs), len(wanted) - 1)
        same = wanted[place] == pairs
        held = np.bincount(row[same] * len(wanted) + place[same], minlength=len(stories) * len(wanted))
        shared = np.minimum(held.reshape(len(stories), -1), times).sum(1)
        best = stories[(2 * shared / (len(own) + sizes - 2)).argmax()]
        return int(best), *rouge_2(own.tolist(), self._story(best).tolist())


def rouge_2(text: Sequence, reference: Sequence) -> tuple[float, float, float]:
    """Precision, recall and F1 of the pairs of neighbouring words of `text` against `reference` (Lin, 2004)."""
    own, other = (Counter(itertools.pairwise(items)) for items in (text, reference))
    shared = (own & other).total()
    if not shared:
        return 0.0, 0.0, 0.0
    precision, recall = shared / own.total(), shared / other.total()
    return precision, recall, 2 * precision * recall / (precision + recall)


def _pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """One number for each pair of words; (n,)."""
    return (left.astype(np.int64) << 32) + right


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of the four words that begin at each position; (n - 3,)."""
    n = len(tokens) - N_WORDS + 1
    mixed = (tokens.astype(np.int64).view(np.uint64) + np.uint64(3)) * _MIX
    mixed ^= mixed >> np.uint64(29)
    hashes = np.zeros(n, dtype=np.uint64)
    for i in range(N_WORDS):
        hashes = (hashes ^ mixed[i : i + n]) * _MIX
        hashes ^= hashes >> np.uint64(32)
    return hashes


def _covered(length: int, first: np.ndarray, lengths: np.ndarray) -> float:
    """The share of `length` words that lie in a run of at least COVER words."""
    long = lengths >= COVER
    edges = np.zeros(length + 1, dtype=np.int64)
    np.add.at(edges, first[long], 1)
    np.add.at(edges, first[long] + lengths[long], -1)
    return float((np.cumsum(edges)[:-1] > 0).mean())
