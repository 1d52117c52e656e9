"""Stories as 16-bit tokens on disk, read by memory map.

Each split becomes one `.bin` file a shard (uint16: the tokens of story after story, each behind its `<|endoftext|>`)
and one `.npy` file (int64: where each story starts, and the end). `manifest.json` names inputs, tokenizer and counts,
and is written last; what does not agree with it is made again.
"""

from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from blm_core import clean, data
from blm_core.config import TokenizerConfig
from blm_core.files import read_json, sha256, write_json, written_aside
from blm_core.tokenizer import Tokenizer, train

SPLITS = ("train", "validation", "official")


def prepare_tokenizer(config: TokenizerConfig, stories: Path, folder: Path, split_hash: str) -> Tokenizer:
    """The vocabulary learned from the training stories below `stories`, made now or found in `folder`.

    Only the first `max_stories` stories are read: shards of the archive are not sorted.
    """
    path = Path(folder) / "tokenizer.model"
    made_from = {
        "vocab_size": config.vocab_size,
        "model_type": config.model_type,
        "max_stories": config.max_stories,
        "split_hash": split_hash,
        "inputs": _inputs(stories, "train"),
    }
    known = read_json(path.with_suffix(".json"))
    if known and known["made_from"] == made_from and path.exists() and sha256(path) == known["sha256"]:
        return Tokenizer(path)
    sample = (story for story, _ in zip(data.read_split(stories, "train"), range(config.max_stories), strict=False))
    tokenizer = train(sample, path, config.vocab_size, config.model_type)
    write_json(path.with_suffix(".json"), {"made_from": made_from, "sha256": sha256(path)})
    return tokenizer


def encode_splits(stories: Path, tokenizer: Tokenizer, folder: Path, blank_line_share: float) -> dict:
    """Encode every split below `stories` into `folder`; returns the manifest, made now or found.

    Shards are encoded in parallel; after an interruption the finished ones are kept.
    """
    folder = Path(folder)
    made_from = {
        "tokenizer": tokenizer.hash,
        "blank_line_share": blank_line_share,
        "inputs": {split: _inputs(stories, split) for split in SPLITS},
    }
    manifest = read_json(folder / "manifest.json")
    if (
        manifest
        and manifest["made_from"] == made_from
        and all(_whole(folder, s) for shards in manifest["splits"].values() for s in shards)
    ):
        return manifest
    (folder / "manifest.json").unlink(missing_ok=True)
    splits = {}
    for split in SPLITS:
        paths = data.split_files(stories, split)
        share = blank_line_share if split == "train" else 0.0
        work = partial(_encode_shard, model=tokenizer.path, folder=folder, blank_line_share=share)
        splits[split] = data.pooled(work, paths, f"encoding {split}") if paths else []
    manifest = {
        "made_from": made_from,
        "splits": splits,
        "tokens": {split: sum(shard["tokens"] for shard in shards) for split, shards in splits.items()},
        "stories": {split: sum(shard["stories"] for shard in shards) for split, shards in splits.items()},
        "bytes": {split: sum(shard["bytes"] for shard in shards) for split, shards in splits.items()},
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def _inputs(stories: Path, split: str) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in data.split_files(stories, split)}


def _whole(folder: Path, shard: dict) -> bool:
    tokens, offsets = (folder / f"{shard['name']}{suffix}" for suffix in (".bin", ".npy"))
    return tokens.is_file() and tokens.stat().st_size == 2 * shard["tokens"] and offsets.is_file()


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


def _encode_shard(path: Path, model: Path, folder: Path, blank_line_share: float) -> dict:
    """Encode one file of stories; a finished shard made from the same input is kept."""
    tokenizer = _tokenizer(model)
    note = folder / f"{path.stem}.json"
    made_from = {"input": sha256(path), "tokenizer": tokenizer.hash, "blank_line_share": blank_line_share}
    known = read_json(note)
    if known and known["made_from"] == made_from and _whole(folder, known):
        return known
    note.unlink(missing_ok=True)
    offsets, size = [0], 0
    with written_aside(folder / f"{path.stem}.bin") as aside, open(aside, "wb") as out:
        for record in data.read_jsonl(path):
            story = record["story"]
            if clean.is_held_out(clean.story_key(story[::-1]), blank_line_share):  # a second, independent coin
                story = story.replace("\n", "\n\n")
            tokens = np.array([tokenizer.eot, *tokenizer.encode(story)], dtype=np.uint16)
            out.write(tokens.tobytes())
            offsets.append(offsets[-1] + len(tokens))
            size += len(story.encode())
    with written_aside(folder / f"{path.stem}.npy") as aside, open(aside, "wb") as out:
        np.save(out, np.array(offsets, dtype=np.int64))
    done = {"name": path.stem, "made_from": made_from, "stories": len(offsets) - 1, "tokens": offsets[-1], "bytes": size}
    write_json(note, done)
    return done


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
