"""From the archive to clean, split stories on disk.

- One shard at a time in each of a pool of processes; what stays in memory is eight bytes per story and the held-out stories.
- A story is held out by a hash of its words. Exact repeats are dropped, and training stories that are near-duplicates
  of a held-out story too, so none crosses the split.
- Everything counted goes into `manifest.json`, written last: where it is, the work is finished.
"""

import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from blm_core import END_OF_TEXT, clean, files
from blm_core.config import ROOT, SAMPLE, DataConfig
from blm_core.files import ArchiveError
from blm_core.near import NearDuplicates

SAMPLE_FOLDER = ROOT / "blm_core" / "sample"
SPLITS = ("train", "validation", "official")
VERSION = 3  # of the cleaning; raise it when stories come out differently


def prepare(config: DataConfig, folder: Path) -> dict:
    """Clean and split the archive into `folder`; returns the manifest, made now or found.

    Raises DownloadError or ArchiveError; an earlier result stays until the new one is whole.
    """
    folder = Path(folder)
    made_from = _made_from(config)
    if manifest := files.found(folder / "manifest.json", made_from):
        return manifest
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)  # what a killed run left
    archive = _packed_sample(folder) if config.archive == SAMPLE else files.fetch(config.archive, folder)
    official = read_stories(files.fetch(config.validation_file, folder, "BLM_VALIDATION")) if config.validation_file else []
    shards = files.unpack(archive, work / "shards")

    cleaned = pooled(partial(_clean_shard, config=config, folder=work / "cleaned"), shards, "cleaning")
    counts = sum((shard["counts"] for shard in cleaned), Counter())
    problems = [shard["problem"] for shard in cleaned if shard["problem"]]
    keys = [shard["keys"] for shard in cleaned]
    index = NearDuplicates(official + [text for shard in cleaned for text in shard["held_out"]], config.near_duplicate)
    jobs = list(zip(shards, keys, _first_of_their_kind(official, keys), strict=True))
    lengths = Counter()
    for shard_counts, shard_lengths in pooled(partial(_split_shard, config=config, work=work, index=index), jobs, "splitting"):
        counts += shard_counts
        lengths += shard_lengths
    drops = {reason: counts[reason] for reason in clean.DROPS}
    if not counts["train", "stories"] or not counts["validation", "stories"]:
        raise ArchiveError(f"{archive} has too few stories to train and validate on. Dropped: {drops}. {problems[:3]}")
    if official:
        files.write_json_lines(work / "stories" / "official.jsonl", ({"story": story} for story in official))
        counts["official", "stories"] = len(official)
        counts["official", "bytes"] = sum(len(story.encode()) for story in official)

    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "stories", ignore_errors=True)
    (work / "stories").rename(folder / "stories")
    shutil.rmtree(work)
    manifest = {
        "made_from": made_from,
        "archive": {"name": archive.name, "bytes": archive.stat().st_size, "sha256": files.sha256(archive)},
        "problems": problems,
        "read": counts["read"],
        "repairs": {name: counts[name] for name in clean.REPAIRS},
        "drops": drops,
        "stories": {split: counts[split, "stories"] for split in SPLITS if counts[split, "stories"]},
        "bytes": {split: counts[split, "bytes"] for split in SPLITS if counts[split, "stories"]},
        "words_per_story": {str(words): stories for words, stories in sorted(lengths.items())},
        "split_hash": split_hash(read_split(folder, "validation")),
    }
    files.write_json(folder / "manifest.json", manifest)
    return manifest


def read_stories(path: Path, normalise: bool = False) -> list[str]:
    """The stories of a text file, separated by `<|endoftext|>`; surrounding white space is not part of a story.

    Raises ArchiveError where the file is not UTF-8.
    """
    try:
        stories = [part.strip() for part in Path(path).read_text(encoding="utf-8").split(END_OF_TEXT)]
    except UnicodeDecodeError as error:
        raise ArchiveError(f"{path} is not UTF-8 text: {error}. Name a file of stories with {END_OF_TEXT} between.") from error
    return [clean.normalise(story) if normalise else story for story in stories if story]


def read_split(folder: Path, split: str) -> Iterator[str]:
    """The stories of `split` (train, validation, official), one at a time, in the archive's order."""
    for path in split_files(folder, split):
        yield from (record["story"] for record in files.read_json_lines(path))


def split_files(folder: Path, split: str) -> list[Path]:
    return sorted((Path(folder) / "stories").glob(f"{split}*.jsonl"))


def split_hash(stories) -> str:
    """One hash for a set of stories, whatever their order: the same stories give the same hash on any machine."""
    keys = sorted({clean.story_key(story) for story in stories})
    return files.text_sha256(" ".join(f"{key:016x}" for key in keys))[:16]


def pooled(function, items: list, what: str) -> list:
    """`function` over `items` in a pool of processes, results in order, with a progress bar."""
    workers = max(1, min(len(items), os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # threads of torch or Jupyter do not survive a fork
        return list(tqdm(pool.map(function, items), total=len(items), desc=what, unit="shard"))


def _made_from(config: DataConfig) -> dict:
    """What the result depends on. A local file is named by size and time: reading gigabytes to compare them is slow."""
    made_from = {"version": VERSION, **vars(config)}
    for name in ("archive", "validation_file"):
        path = os.path.expanduser(made_from[name])
        if os.path.isfile(path):
            made_from[name] = [os.path.basename(path), os.stat(path).st_size, os.stat(path).st_mtime_ns]
    return made_from


def _packed_sample(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "sample.tar.gz", "w:gz") as archive:
        archive.add(SAMPLE_FOLDER, "sample")
    return folder / "sample.tar.gz"


def _clean_shard(shard: Path, config: DataConfig, folder: Path) -> dict:
    """Clean one shard into `folder`: its counts, its stories' keys, the held-out ones themselves, and why it cannot be read."""
    problem, counts, stories = None, Counter(), []
    try:
        records = json.loads(shard.read_text(encoding="utf-8"))
        if not isinstance(records, list):
            raise ValueError("it is not a list of records")
    except (ValueError, RecursionError) as error:
        records, problem = [], f"{shard.name} cannot be read: {error}"
    counts["read"] = len(records)
    for record in records:
        story = record.get("story") if isinstance(record, dict) else None
        if not isinstance(story, str):
            counts["no story"] += 1
            continue
        story, repairs = clean.repair(story)
        if reason := clean.reason_to_drop(story, config.min_characters):
            counts[reason] += 1
        else:
            counts.update(repairs)
            stories.append(story)
    files.write_json_lines(folder / f"{shard.stem}.jsonl", ({"story": story} for story in stories))
    keys = np.array([clean.story_key(story) for story in stories], dtype=np.uint64)
    held_out = [story for story, held in zip(stories, clean.is_held_out(keys, config.validation_share), strict=True) if held]
    return {"counts": counts, "keys": keys, "held_out": held_out, "problem": problem}


def _first_of_their_kind(official: list[str], keys: list[np.ndarray]) -> list[np.ndarray]:
    """For each shard, which of its stories repeat neither an official story nor an earlier one."""
    outside = np.array([clean.story_key(story) for story in official], dtype=np.uint64)
    joined = np.concatenate([outside, *keys])
    first = np.zeros(len(joined), dtype=bool)
    first[np.unique(joined, return_index=True)[1]] = True
    return np.split(first, np.cumsum([len(outside), *map(len, keys)]))[1:-1]


def _split_shard(job: tuple, config: DataConfig, work: Path, index: NearDuplicates) -> tuple[Counter, Counter]:
    """Write the stories of one shard that are kept to `train-` and `validation-NAME.jsonl`; counts, and lengths in words."""
    shard, keys, first = job
    held_out = clean.is_held_out(keys, config.validation_share)
    counts, lengths, out = Counter(), Counter(), {"train": [], "validation": []}
    lines = files.read_json_lines(work / "cleaned" / f"{shard.stem}.jsonl")
    for record, is_first, is_held_out in zip(lines, first, held_out, strict=True):
        story = record["story"]
        if not is_first:
            counts["repeats another story"] += 1
        elif not is_held_out and index.match(story) is not None:
            counts["near a held-out story"] += 1
        else:
            split = "validation" if is_held_out else "train"
            out[split].append(record)
            counts[split, "stories"] += 1
            counts[split, "bytes"] += len(story.encode())
            lengths[len(clean.words(story))] += 1
    for split, records in out.items():
        files.write_json_lines(work / "stories" / f"{split}-{shard.name}l", records)
    return counts, lengths
