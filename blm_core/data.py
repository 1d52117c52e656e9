"""From the archive to clean, split stories on disk.

- One shard at a time in each of a pool of processes; what stays in memory is eight bytes per story.
- A story is held out by a hash of its words. Exact repeats are dropped, and training stories that are near-duplicates
  of a held-out story too, so none crosses the split.
- Everything counted goes into `manifest.json`, written last: where it is, the work is finished.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from blm_core import END_OF_TEXT, clean
from blm_core.config import ROOT, SAMPLE, DataConfig
from blm_core.files import (
    ArchiveError,
    fetch,
    found,
    is_address,
    pack_sample,
    read_json_lines,
    sha256,
    text_sha256,
    unpack,
    write_json,
    write_json_lines,
)
from blm_core.near import NearDuplicates

SAMPLE_FOLDER = ROOT / "blm_core" / "sample"
VERSION = 3  # of the cleaning; raise it when stories come out differently
MAX_WORDS = 1000  # longer stories share the last bar of the histogram


def prepare(config: DataConfig, folder: Path) -> dict:
    """Clean and split the archive into `folder`; returns the manifest, made now or found.

    Raises DownloadError or ArchiveError.
    """
    folder = Path(folder)
    made_from = _made_from(config)
    if manifest := found(folder / "manifest.json", made_from):
        return manifest
    if config.archive == SAMPLE:
        archive = pack_sample(SAMPLE_FOLDER, folder / "sample.tar.gz")
    else:
        archive = fetch(config.archive, folder)
    official = []
    if config.validation_file:
        path = fetch(config.validation_file, folder, variable="BLM_VALIDATION")
        official = read_stories(path)
    shards = unpack(archive, folder / "shards")

    cleaned = folder / "cleaned"
    first = pooled(partial(_clean_shard, config=config, folder=cleaned), shards, "cleaning")
    problems = [problem for result in first for problem in result["problems"]]
    counts = sum((Counter(result["counts"]) for result in first), Counter())
    names = [shard.stem for shard in shards]
    keep, held_out = _plan(names, cleaned, config.validation_share, official)
    if not any(mask.any() for mask in keep):
        raise ArchiveError(f"no story of {archive} was kept; reasons: {dict(counts)}; problems: {problems[:3]}")
    texts = list(official)
    for name in names:
        lines = zip(read_json_lines(cleaned / f"{name}.jsonl"), held_out[name], strict=True)
        texts += [record["story"] for record, held in lines if held]
    index = NearDuplicates(texts, config.near_duplicate)

    (folder / "manifest.json").unlink(missing_ok=True)  # only now: an archive that fails costs no earlier result
    shutil.rmtree(folder / "stories", ignore_errors=True)
    work = [(name, mask, held_out[name]) for name, mask in zip(names, keep, strict=True)]
    second = pooled(partial(_split_shard, cleaned=cleaned, folder=folder / "stories"), work, "splitting", _set_index, (index,))
    totals: dict[str, Counter] = {}
    for result in second:
        for name, counter in result.items():
            totals.setdefault(name, Counter()).update(counter)
    if official:
        write_json_lines(folder / "stories" / "official.jsonl", ({"story": story} for story in official))
        totals["stories"]["official"] = len(official)
        totals["bytes"]["official"] = sum(len(story.encode()) for story in official)
    for drop in clean.DROPS:
        counts[drop] += totals["dropped"][drop]
    if not totals["stories"]["train"] or not totals["stories"]["validation"]:
        raise ArchiveError(f"{archive}: {dict(totals['stories'])} stories are too few to train and validate on.")
    manifest = {
        "made_from": made_from,
        "archive": {"name": archive.name, "bytes": archive.stat().st_size, "sha256": sha256(archive)},
        "read": counts["read"],
        "repairs": {name: counts[name] for name in clean.REPAIRS},
        "drops": {name: counts[name] for name in clean.DROPS},
        "problems": {"count": len(problems), "first": problems[:20]},
        "stories": dict(totals["stories"]),
        "bytes": dict(totals["bytes"]),
        "words_per_story": {str(k): v for k, v in sorted(totals["lengths"].items())},
        "features": dict(totals["features"].most_common()),
        "words_asked": dict(totals["words_asked"].most_common(200)),
        "sources": dict(totals["sources"].most_common()),
        "split_hash": split_hash(read_split(folder, "validation")),
    }
    shutil.rmtree(cleaned)
    shutil.rmtree(folder / "shards")
    write_json(folder / "manifest.json", manifest)
    return manifest


def read_stories(path: Path, normalise: bool = False) -> list[str]:
    """The stories of a text file, separated by `<|endoftext|>`; surrounding white space is not part of a story.

    Raises ArchiveError where the file is not UTF-8.
    """
    try:
        stories = [part.strip() for part in Path(path).read_text(encoding="utf-8").split(END_OF_TEXT)]
    except UnicodeDecodeError as error:
        raise ArchiveError(
            f"{path} is not UTF-8 text: {error}. Name a file of stories with {END_OF_TEXT} between them."
        ) from error
    return [clean.normalise(story) if normalise else story for story in stories if story]


def read_split(folder: Path, split: str) -> Iterator[str]:
    """The stories of `split` (train, validation, official), one at a time, in the archive's order."""
    return (record["story"] for record in read_records(folder, split))


def read_records(folder: Path, split: str) -> Iterator[dict]:
    """The records of `split`: `story`, and where known `words`, `features`, `source`."""
    for path in split_files(folder, split):
        yield from read_json_lines(path)


def split_files(folder: Path, split: str) -> list[Path]:
    paths = (Path(folder) / "stories").glob(f"{split}*.jsonl")
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def split_hash(stories) -> str:
    """One hash for a set of stories, whatever their order: the same stories give the same hash on any machine."""
    keys = sorted({clean.story_key(story) for story in stories})
    return text_sha256(" ".join(f"{key:016x}" for key in keys))[:16]


def pooled(function, items: list, what: str, initializer=None, arguments=()) -> list:
    """`function` over `items` in a pool of processes, results in order, with a progress bar."""
    workers = max(1, min(len(items), os.cpu_count() or 1))
    context = get_context("spawn")  # threads of torch or Jupyter do not survive a fork
    with ProcessPoolExecutor(workers, context, initializer, arguments) as pool:
        return list(tqdm(pool.map(function, items), total=len(items), desc=what, unit="shard"))


def _made_from(config: DataConfig) -> dict:
    """What the result depends on. A local file is named by size and time: reading gigabytes to compare them is slow."""
    made_from = {"version": VERSION, **vars(config), "sources": list(config.sources)}
    for name in ("archive", "validation_file"):
        source = made_from[name]
        if source == SAMPLE:
            made_from[name] = {path.name: sha256(path) for path in sorted(SAMPLE_FOLDER.glob("data*.json"))}
        elif not is_address(source) and (path := Path(source).expanduser()).is_file():
            made_from[name] = [path.name, path.stat().st_size, path.stat().st_mtime_ns]
    return made_from


def _clean_shard(shard: Path, config: DataConfig, folder: Path) -> dict:
    """Clean one shard into `folder/NAME.jsonl`, its stories' keys into `folder/NAME.npy`."""
    counts, problems, records, keys = Counter(), [], [], []
    try:
        content = json.loads(shard.read_text(encoding="utf-8"))
        if not isinstance(content, list):
            raise ValueError(f"a list of records was expected, found {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        content = []
        problems.append({"shard": shard.name, "index": None, "reason": f"not valid JSON: {error}"[:200]})
    counts["read"] = len(content)
    for i, record in enumerate(content):
        story = record.get("story") if isinstance(record, dict) else None
        if not isinstance(story, str):
            counts["no story"] += 1
            problems.append({"shard": shard.name, "index": i, "reason": "no story"})
        elif config.sources and record.get("source") not in config.sources:
            counts["other source"] += 1
        else:
            story, repairs = clean.repair(story)
            reason = clean.reason_to_drop(story, config.min_characters)
            if reason:
                counts[reason] += 1
            else:
                counts.update(repairs)
                records.append({"story": story, **_instruction(record)})
                keys.append(clean.story_key(story))
    write_json_lines(folder / f"{shard.stem}.jsonl", records)
    np.save(folder / f"{shard.stem}.npy", np.array(keys, dtype=np.uint64))
    return {"counts": dict(counts), "problems": problems}


def _instruction(record: dict) -> dict:
    """What the story was asked to be, as far as the record says."""
    instruction = record.get("instruction") if isinstance(record.get("instruction"), dict) else {}
    known = {name: instruction[name] for name in ("words", "features") if isinstance(instruction.get(name), list)}
    return known | ({"source": record["source"]} if isinstance(record.get("source"), str) else {})


def _plan(names: list[str], cleaned: Path, share: float, official: list[str]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """For each shard, which stories are the first of their kind, and which of those are held out."""
    keys = [np.load(cleaned / f"{name}.npy") for name in names]
    outside = np.array([clean.story_key(story) for story in official], dtype=np.uint64)
    joined = np.concatenate([outside, *keys])
    first = np.zeros(len(joined), dtype=bool)
    first[np.unique(joined, return_index=True)[1]] = True
    bounds = np.cumsum([len(outside), *map(len, keys)])
    keep = np.split(first, bounds)[1:-1]
    limit = np.uint64(int(share * 2**64))  # the rule of clean.is_held_out, for whole arrays
    return keep, {name: mask & (own < limit) for name, mask, own in zip(names, keep, keys, strict=True)}


def _set_index(index: NearDuplicates) -> None:
    global _index
    _index = index


def _split_shard(work: tuple[str, np.ndarray, np.ndarray], cleaned: Path, folder: Path) -> dict[str, Counter]:
    """Write the kept stories of one shard to `train-` and `validation-NAME.jsonl`, and count them."""
    name, keep, held_out = work
    counts: dict[str, Counter] = {
        key: Counter() for key in ("stories", "bytes", "dropped", "lengths", "features", "words_asked", "sources")
    }
    out: dict[str, list] = {"train": [], "validation": []}
    for record, kept, held in zip(read_json_lines(cleaned / f"{name}.jsonl"), keep, held_out, strict=True):
        if not kept:
            counts["dropped"]["repeats another story"] += 1
            continue
        if not held and _index.match(record["story"]) is not None:
            counts["dropped"]["near a held-out story"] += 1
            continue
        split = "validation" if held else "train"
        out[split].append(record)
        counts["stories"][split] += 1
        counts["bytes"][split] += len(record["story"].encode())
        counts["lengths"][min(len(clean.words(record["story"])), MAX_WORDS)] += 1
        counts["features"].update(map(str, record.get("features", [])))
        counts["words_asked"].update(map(str, record.get("words", [])))
        counts["sources"][record.get("source", "not stated")] += 1
    for split, records in out.items():
        write_json_lines(folder / f"{split}-{name}.jsonl", records)
    return counts
