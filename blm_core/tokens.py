"""Stories as 16-bit tokens on disk, and the training batches made from them.

On disk, each split has for every shard

- a `.bin` file (uint16): the tokens of story after story, each behind its `<|endoftext|>`, read by memory map;
- a `.npy` file (int64): where each story starts, and the end.

`manifest.json` names inputs, tokenizer and counts, and is written last; where anything does not agree with it, all of it is
made again.

In training,

- stories are packed into windows of `seq_len` tokens by the histogram of their lengths (Krell et al. 2021): the longest
  that still fits goes in first. The histogram is the same in every epoch, so the packing is computed once; each epoch
  draws anew which story fills which place and in which order the windows come;
- every token of an epoch is an input exactly once. A story longer than a window is cut into pieces;
- the batch of a step depends on the seed and the number of the step alone, so that a run can be resumed anywhere.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blm_core import clean, data
from blm_core.config import TokenizerConfig
from blm_core.files import found, read_json, read_json_lines, sha256, write_json, written_aside
from blm_core.tokenizer import Tokenizer, train

COUNTS = ("tokens", "stories", "bytes")


def prepare_tokenizer(config: TokenizerConfig, stories: Path, folder: Path) -> Tokenizer:
    """The vocabulary learned from the training stories below `stories`, made now or found in `folder`.

    Only the first `max_stories` stories are read: shards of the archive are not sorted.
    """
    path, note = Path(folder) / "tokenizer.model", Path(folder) / "tokenizer.json"
    made_from = {"vocab_size": config.vocab_size, "max_stories": config.max_stories, "inputs": _inputs(stories, "train")}
    known = found(note, made_from)
    if known and path.exists() and sha256(path) == known["sha256"]:
        return Tokenizer(path)
    tokenizer = train(islice(data.read_split(stories, "train"), config.max_stories), path, config.vocab_size)
    write_json(note, {"made_from": made_from, "sha256": sha256(path)})
    return tokenizer


def encode_splits(stories: Path, tokenizer: Tokenizer, folder: Path, blank_line_share: float) -> dict:
    """Encode every split below `stories` into `folder`, shards in parallel; returns the manifest, made now or found."""
    folder = Path(folder)
    made_from = {
        "tokenizer": tokenizer.hash,
        "blank_line_share": blank_line_share,
        "inputs": {split: _inputs(stories, split) for split in data.SPLITS},
    }
    manifest = found(folder / "manifest.json", made_from)
    if manifest and all(_whole(folder, shard) for shards in manifest["splits"].values() for shard in shards):
        return manifest
    (folder / "manifest.json").unlink(missing_ok=True)
    paths = {split: data.split_files(stories, split) for split in data.SPLITS}
    work = partial(_encode_shard, model=tokenizer.path, folder=folder, blank_line_share=blank_line_share)
    made = iter(data.pooled(work, [path for split in data.SPLITS for path in paths[split]], "encoding"))
    splits = {split: list(islice(made, len(paths[split]))) for split in data.SPLITS}
    counts = {what: {split: sum(shard[what] for shard in splits[split]) for split in data.SPLITS} for what in COUNTS}
    manifest = {"made_from": made_from, "splits": splits, **counts}
    write_json(folder / "manifest.json", manifest)
    return manifest


def _inputs(stories: Path, split: str) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in data.split_files(stories, split)}


def _whole(folder: Path, shard: dict) -> bool:
    tokens, starts = (folder / f"{shard['name']}{suffix}" for suffix in (".bin", ".npy"))
    return tokens.is_file() and tokens.stat().st_size == 2 * shard["tokens"] and starts.is_file()


def _encode_shard(path: Path, model: Path, folder: Path, blank_line_share: float) -> dict:
    """Encode one file of stories; its name and counts."""
    tokenizer, starts, size = Tokenizer(model), [0], 0
    with written_aside(folder / f"{path.stem}.bin") as aside, open(aside, "wb") as out:
        for record in read_json_lines(path):
            story = record["story"]
            coin = clean.story_key(story[::-1])  # a second one, independent of the split's
            if path.name.startswith("train") and clean.is_held_out(coin, blank_line_share):
                story = story.replace("\n", "\n\n")
            tokens = np.array([tokenizer.eot, *tokenizer.encode(story)], dtype=np.uint16)
            out.write(tokens.tobytes())
            starts.append(starts[-1] + len(tokens))
            size += len(story.encode())
    np.save(folder / f"{path.stem}.npy", np.array(starts, dtype=np.int64))
    return {"name": path.stem, "stories": len(starts) - 1, "tokens": starts[-1], "bytes": size}


class TokenStories:
    """The stories of one split as token arrays: `stories[i]` is the i-th, beginning with `<|endoftext|>`."""

    def __init__(self, folder: Path, split: str):
        manifest = read_json(Path(folder) / "manifest.json")
        if manifest is None:
            raise FileNotFoundError(f"{folder} holds no encoded stories; run 02_tokenizer first.")
        names = [shard["name"] for shard in manifest["splits"][split] if shard["tokens"]]
        self._tokens = [np.memmap(Path(folder) / f"{name}.bin", dtype=np.uint16, mode="r") for name in names]
        self._starts = [np.load(Path(folder) / f"{name}.npy") for name in names]
        self._first = np.cumsum([0, *(len(starts) - 1 for starts in self._starts)])
        self.lengths = np.concatenate([np.empty(0, np.int64), *map(np.diff, self._starts)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        start, end = self._starts[shard][i - self._first[shard] :][:2]
        return self._tokens[shard][start:end]


NOT_SCORED = -100  # target of padding, which cross_entropy passes over


def pack(lengths: np.ndarray, seq_len: int) -> list[tuple[tuple[int, ...], int]]:
    """How to fill windows of `seq_len`: lengths in one window, and how many such windows."""
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
        """Window `i` of the endless sequence: inputs, targets, number of the story, (3, seq_len).

        A story's last token has the token that ends it as target; padding is not scored.
        """
        epoch, i = divmod(i, self.windows_per_epoch)
        order, pieces = self._epoch(epoch)
        out = np.full((3, self.seq_len), NOT_SCORED, dtype=np.int64)
        end = 0
        for number, piece in enumerate(pieces[self._first[order[i]] : self._first[order[i] + 1]]):
            story = self.stories[int(self._story[piece])]
            start, length = self._start[piece], self._length[piece]
            at = slice(end, end + length)
            out[0, at] = story[start : start + length]
            out[1, at] = np.append(story, story[0])[start + 1 : start + length + 1]
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
        steps = iter(steps)
        with ThreadPoolExecutor(1) as thread:
            waiting = deque(thread.submit(self.batch, step, rank, world_size) for step in islice(steps, ahead))
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(thread.submit(self.batch, step, rank, world_size) for step in islice(steps, 1))
                yield batch
