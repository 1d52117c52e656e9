"""Near-duplicates of a fixed set of texts, found exactly.

Two texts are near-duplicates when the sets of their four-word shingles overlap by at least a threshold t (Jaccard).
If J(x, y) >= t, then x holds at least t |y| shingles of y, so it must hold one of any |y| - ceil(t |y|) + 1 of them
(prefix filtering; Chaudhuri, Ganti and Kaushik 2006). Only that many are indexed, the rarest ones; every hit is then
checked in full. Memory grows with the fixed set (the held-out stories) only.
"""

import math
from functools import lru_cache

import numpy as np

from blm_core.clean import words
from blm_core.files import text_sha256

N_WORDS = 4
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], dtype=np.uint64)


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int(text_sha256(word)[:16], 16)


def shingles(text: str) -> np.ndarray:
    """The sorted, distinct 64-bit hashes of all runs of four words in `text` (of all words, if there are fewer)."""
    hashes = np.array([_word_hash(word) for word in words(text)], dtype=np.uint64)
    width = min(N_WORDS, len(hashes))
    if width == 0:
        return hashes
    n = len(hashes) - width + 1
    return np.unique(sum((hashes[i : i + n] * _MIX[i] for i in range(width)), start=np.zeros(n, np.uint64)))


class NearDuplicates:
    """An index of fixed texts that answers whether another text is a near-duplicate of one of them."""

    def __init__(self, texts, threshold: float):
        self.threshold, self.sets = threshold, [shingles(text) for text in texts]
        picked = [np.empty(0, np.uint64)]
        known, counts = np.unique(np.concatenate(picked + self.sets), return_counts=True)
        for own in self.sets:
            size = len(own) - math.ceil(threshold * len(own)) + 1
            rarest = np.argsort(counts[np.searchsorted(known, own)], kind="stable")[:size]
            picked.append(own[rarest])
        owners = np.repeat(np.arange(len(picked)) - 1, list(map(len, picked)))
        order = np.argsort(np.concatenate(picked), kind="stable")
        self.index, self.owners = np.concatenate(picked)[order], owners[order]

    def match(self, text: str) -> int | None:
        """The position of an indexed text that `text` is a near-duplicate of, or None."""
        own = shingles(text)
        first, last = np.searchsorted(self.index, own, "left"), np.searchsorted(self.index, own, "right")
        hits = [self.owners[a:b] for a, b in zip(first, last, strict=True) if a < b]
        for candidate in np.unique(np.concatenate(hits)) if hits else ():
            other = self.sets[candidate]
            shared = len(np.intersect1d(own, other, assume_unique=True))
            if shared >= self.threshold * (len(own) + len(other) - shared):
                return int(candidate)
        return None
