"""Training windows in an order that depends on (seed, epoch) alone.

Each epoch is all stories in a new order, one behind the other, and the epochs follow each other without a gap. Window i
is tokens i T to (i + 1) T of that stream, so every token of an epoch is an input exactly once, and a position in
training is nothing but the number of a step.
"""

import queue
import threading
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from blm_core.shards import TokenStories


class Batches:
    """The batches of a run, addressed by step."""

    def __init__(self, stories: TokenStories, seq_len: int, batch_size: int, seed: int):
        """Raises ValueError where there is not a single window of text."""
        self.stories, self.seq_len, self.batch_size, self.seed = stories, seq_len, batch_size, seed
        self.tokens_per_epoch = int(stories.lengths.sum())
        if self.tokens_per_epoch <= seq_len:
            raise ValueError(f"{self.tokens_per_epoch} training tokens do not fill one window of {seq_len}; use more stories.")
        self._epoch = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The stories of an epoch in order, and where each starts in it."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.stories))
        return order, np.concatenate([[0], np.cumsum(self.stories.lengths[order])])

    def read(self, position: int, count: int) -> np.ndarray:
        """`count` tokens of the endless stream from `position` on."""
        parts = []
        while count:
            epoch, offset = divmod(position, self.tokens_per_epoch)
            order, starts = self._epoch(epoch)
            i = int(np.searchsorted(starts, offset, side="right")) - 1
            part = self.stories[int(order[i])][offset - starts[i] :][:count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """The windows of one process in one step: (batch_size / world_size, seq_len + 1), int64."""
        share = self.batch_size // world_size
        first = step * self.batch_size + rank * share
        windows = [self.read(i * self.seq_len, self.seq_len + 1) for i in range(first, first + share)]
        return torch.from_numpy(np.stack(windows).astype(np.int64))

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
