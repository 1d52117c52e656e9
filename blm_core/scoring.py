"""How many bits a model needs for a story: the yardstick of training, evaluation and comparison."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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
    work.sort(key=lambda item: item[2] - item[1])
    bits = np.zeros(len(stories))
    while work:
        width = 1
        batch = []
        while work and max(width, work[-1][2] - work[-1][1]) * (len(batch) + 1) <= max(batch_tokens, seq_len + 1):
            batch.append(work.pop())
            width = max(width, batch[-1][2] - batch[-1][1])
        tokens = torch.zeros(len(batch), width, dtype=torch.int64)
        targets = torch.full((len(batch), width), -100, dtype=torch.int64)  # -100: not scored
        for row, (i, start, end, scored) in enumerate(batch):
            tokens[row, : end - start] = torch.from_numpy(stories[i][start:end].astype(np.int64))
            targets[row, scored - start : end - start] = tokens[row, scored - start : end - start]
        logits = logits_of(tokens[:, :-1].to(device)).float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets[:, 1:].to(device), ignore_index=-100, reduction="none")
        for (i, *_), nats in zip(batch, losses.sum(1, dtype=torch.float64).tolist(), strict=True):
            bits[i] += nats / math.log(2)
    return bits
