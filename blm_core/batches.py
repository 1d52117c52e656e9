"""Training windows of whole stories, in an order that depends on (seed, epoch) alone.

- Stories are packed into windows of `seq_len` tokens by the histogram of their lengths (Krell et al. 2021): the longest
  that still fits goes in first. The histogram is the same in every epoch, so the pattern is made once, whatever the
  number of stories; an epoch draws anew which story fills which place and in which order the windows come.
- Every token of an epoch is an input exactly once. A story longer than a window is cut into pieces.
- Epochs follow each other without a gap, so a position in training is nothing but the number of a step.
"""

import queue
import threading
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from blm_core.shards import TokenStories

NOT_SCORED = -100  # target of padding, which cross_entropy passes over


def pack(lengths: np.ndarray, seq_len: int) -> list[tuple[tuple[int, ...], int]]:
    """How to fill windows of `seq_len` with pieces of the given lengths: (lengths in one window, number of such windows)."""
    counts = np.bincount(lengths, minlength=seq_len + 1)
    patterns = []
    while (left := np.flatnonzero(counts)).size:
        pattern, room = [], seq_len
        for length in left[::-1].tolist():
            fits = min(room // length, int(counts[length]))
            pattern += [length] * fits
            room -= fits * length
        times = min(int(counts[length]) // pattern.count(length) for length in set(pattern))
        for length in pattern:
            counts[length] -= times
        patterns.append((tuple(pattern), times))
    return patterns


class Batches:
    """The batches of a run, addressed by step."""

    def __init__(self, stories: TokenStories, seq_len: int, batch_size: int, seed: int, max_stories: int = 0):
        """Pack `stories` (the first `max_stories`, if not 0). Raises ValueError where there is no story."""
        self.stories, self.seq_len, self.batch_size, self.seed = stories, seq_len, batch_size, seed
        lengths = stories.lengths[:max_stories] if max_stories else stories.lengths
        self.tokens_per_epoch = int(lengths.sum())
        if not self.tokens_per_epoch:
            raise ValueError("there is no story to train on; run 01_data and 02_tokenizer first.")
        pieces = -(-lengths // seq_len)  # of each story
        self._story = np.repeat(np.arange(len(lengths)), pieces)
        self._start = (np.arange(len(self._story)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * seq_len
        self._length = np.minimum(lengths[self._story] - self._start, seq_len)
        patterns = pack(self._length, seq_len)
        self.windows_per_epoch = sum(times for _, times in patterns)
        sizes = np.concatenate([np.tile(pattern, times) for pattern, times in patterns])
        per_window = np.concatenate([np.full(times, len(pattern)) for pattern, times in patterns])
        self._first = np.concatenate([[0], np.cumsum(per_window)])  # window i holds places first[i] to first[i + 1]
        self._places = np.argsort(sizes, kind="stable")  # places from the shortest to the longest
        self._epoch = lru_cache(maxsize=2)(self._draw)

    @property
    def padding(self) -> float:
        """Share of the tokens in a window that are padding."""
        return 1 - self.tokens_per_epoch / (self.windows_per_epoch * self.seq_len)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the windows in an epoch, and the piece in each place."""
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = rng.permutation(len(self._length))
        piece = np.empty(len(shuffled), dtype=np.int64)
        piece[self._places] = shuffled[np.argsort(self._length[shuffled], kind="stable")]
        return rng.permutation(self.windows_per_epoch), piece

    def window(self, i: int) -> np.ndarray:
        """Window `i` of the endless sequence: inputs, targets and the number of the story in the window, (3, seq_len).

        The target of a story's last token is the token that ends it. Padding repeats that token and is not scored.
        """
        epoch, i = divmod(i, self.windows_per_epoch)
        order, pieces = self._epoch(epoch)
        out = np.full((3, self.seq_len), NOT_SCORED, dtype=np.int64)
        end = 0
        for number, piece in enumerate(pieces[self._first[order[i]] : self._first[order[i] + 1]]):
            story, start, length = self.stories[int(self._story[piece])], self._start[piece], self._length[piece]
            at = slice(end, end + length)
            out[0, at] = story[start : start + length]
            follow = story[start + 1 : start + length + 1]
            out[1, end : end + len(follow)] = follow
            if len(follow) < length:
                out[1, end + length - 1] = story[0]
            out[2, at] = number
            end += length
        out[0, end:] = self.stories[0][0]
        out[2, end:] = -1
        return out

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """The windows of one process in one step: (batch_size / world_size, 3, seq_len), int64."""
        share = self.batch_size // world_size
        first = step * self.batch_size + rank * share
        return torch.from_numpy(np.stack([self.window(i) for i in range(first, first + share)]))

    def prefetched(self, steps: range, rank: int = 0, world_size: int = 1, ahead: int = 4) -> Iterator[Tensor]:
        """The batches of `steps`, made ahead by a thread. An error in the thread is raised here."""
        made: queue.Queue = queue.Queue(ahead)
        stop = threading.Event()

        def put(item) -> None:
            while not stop.is_set():
                try:
                    return made.put(item, timeout=0.2)
                except queue.Full:
                    pass

        def work() -> None:
            try:
                for step in steps:
                    if stop.is_set():
                        return
                    put(self.batch(step, rank, world_size))
            except BaseException as error:
                put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            for _ in steps:
                item = made.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
