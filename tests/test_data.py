"""From an archive to split stories: nothing lost without being counted, nothing shared between the splits."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from blm_core import clean
from blm_core.config import DataConfig
from blm_core.data import prepare, read_split, read_stories, split_files, split_hash
from blm_core.files import ArchiveError, DownloadError, read_json

SHARE = 0.2


def story(seed) -> str:
    """A text in the form of a story, unlike that of any other seed."""
    rng = random.Random(seed)
    return " ".join(" ".join(f"w{rng.randrange(60)}" for _ in range(8)).capitalize() + "." for _ in range(5))


def told_otherwise(text: str) -> str:
    """The same words in the same order."""
    return text.upper().replace(". ", "!\n\n").replace(" ", " - ", 3)


def nearly(text: str) -> str:
    """The same story but for one word; a training story by its own words."""
    changed = (text.replace(text.split()[3], f"w{number}", 1) for number in range(100, 200))
    return next(text for text in changed if not clean.is_held_out(clean.story_key(text), SHARE))


def pack(path: Path, shards: dict[str, list | bytes]) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in shards.items():
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(f"{name}.json")
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def records(texts) -> list[dict]:
    return [{"story": text} for text in texts]


def local(archive: Path, **values) -> DataConfig:
    return DataConfig(**{"archive": str(archive), "validation_file": "", "validation_share": SHARE} | values)


GOOD = [story(i) for i in range(120)]
HELD_OUT = [text for text in GOOD if clean.is_held_out(clean.story_key(text), SHARE)]
OFFICIAL = [story(f"official {i}") for i in range(12)]
PLANTED = [nearly(text) for text in HELD_OUT[:15] + OFFICIAL[:5]]
REPEATS = [told_otherwise(text) for text in GOOD[:7] + OFFICIAL[5:9]]
NOT_ONE = ["", " \n", "Too short.", GOOD[0][:-1], GOOD[0] + " 猫.", GOOD[0] + "\x07.", "\ud800" * 200]
SHARDS = {
    "data10": records(PLANTED),
    "data00": records(GOOD[:50]),
    "data01": b'[{"story": "Once',
    "data02": json.dumps({"stories": records(GOOD[:3])}).encode(),
    "data03": b"\xff\xfe" + json.dumps(records(GOOD[:3])).encode("utf-16-le"),
    "data05": [],
    "data07": [{"summary": "lost"}, {"story": None}, {"story": ["a"]}, "a story", None, 3.5],
    "data08": records(NOT_ONE),
    "data09": records(GOOD[50:] + REPEATS),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("archive")
    (folder / "valid.txt").write_text("<|endoftext|>".join(f"\n{text}\n" for text in [*OFFICIAL, ""]))
    return local(pack(folder / "stories.tar.gz", SHARDS), validation_file=str(folder / "valid.txt"))


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(config, folder)
    return folder


@pytest.fixture(scope="module")
def manifest(folder) -> dict:
    return read_json(folder / "manifest.json")


def test_every_record_is_kept_or_counted_as_dropped_with_its_reason_and_every_shard_read_or_named(folder, manifest, smoke):
    assert manifest["drops"] == {
        "no story": 6,
        "empty": 2,
        "too short": 1,
        "cut off": 1,
        "foreign characters": 3,
        "repeats another story": len(REPEATS),
        "near a held-out story": len(PLANTED),
    }
    assert [problem.split(" cannot be read")[0] for problem in manifest["problems"]] == [f"data0{i}.json" for i in (1, 2, 3)]
    for split in ("train", "validation", "official"):
        texts = list(read_split(folder, split))
        assert manifest["stories"][split] == len(texts)
        assert manifest["bytes"][split] == sum(len(text.encode()) for text in texts)
    assert manifest["words_per_story"] == {"40": len(GOOD)}
    sample = read_json(smoke.folder / "data" / "manifest.json")
    for found in (manifest, sample):
        kept = found["stories"]["train"] + found["stories"]["validation"]
        assert found["read"] == kept + sum(found["drops"].values())
    assert all(sample["drops"][reason] for reason in clean.DROPS if reason != "near a held-out story")
    assert sample["repairs"]["mojibake repaired"]


def test_no_story_nor_one_almost_like_it_is_on_both_sides_of_the_split(folder):
    assert set(read_split(folder, "validation")) == set(HELD_OUT)
    assert set(read_split(folder, "train")) == set(GOOD) - set(HELD_OUT)  # without repeats and near-duplicates
    assert list(read_split(folder, "official")) == OFFICIAL


def test_the_split_depends_on_neither_order_nor_case_nor_punctuation_nor_shard(folder, config, manifest, tmp_path):
    texts = random.Random(1).sample([*GOOD, *PLANTED, *REPEATS], len(GOOD + PLANTED + REPEATS))
    shards = {"data5": records(map(told_otherwise, texts[:50])), "data7": records(texts[50:])}
    found = prepare(replace(config, archive=str(pack(tmp_path / "again.tar.gz", shards))), tmp_path / "data")
    assert found["split_hash"] == manifest["split_hash"] == split_hash(read_split(folder, "validation"))
    again, before = (sorted(map(clean.story_key, read_split(made, "train"))) for made in (tmp_path / "data", folder))
    assert again == before


def test_a_result_is_found_again_made_anew_where_an_input_changed_and_kept_where_the_new_one_fails(tmp_path):
    archive, target = tmp_path / "a.tar.gz", tmp_path / "data"
    for size in (40, 60):
        assert prepare(local(pack(archive, {"data00": records(GOOD[:size])})), target)["read"] == size
    found = prepare(local(archive, near_duplicate=0.9), target)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*.json*")}
    assert prepare(local(archive, near_duplicate=0.9), target) == found
    short, unheld = records(["Too short."] * 3), records(text for text in GOOD[:20] if text not in HELD_OUT)
    failing = [
        (local(tmp_path / "gone.tar.gz"), DownloadError, "BLM_ARCHIVE"),
        (local(archive, validation_file=str(tmp_path / "gone.txt")), DownloadError, "BLM_VALIDATION"),
        (local(pack(tmp_path / "b.tar.gz", {"data00": short, "data01": b"{"})), ArchiveError, r"'too short': 3.*data01\.json"),
        (local(pack(tmp_path / "c.tar.gz", {"data00": unheld})), ArchiveError, "too few"),
    ]
    for config, error, why in failing:
        with pytest.raises(error, match=why):
            prepare(config, target)
        assert before.items() <= {path: path.stat().st_mtime_ns for path in target.rglob("*.json*")}.items()


def test_a_preparation_that_is_killed_half_way_is_made_again_from_the_start(config, manifest, folder, tmp_path):
    code = f"""import sys; from blm_core.config import DataConfig; from blm_core.data import prepare
if __name__ == '__main__':
    prepare({config}, sys.argv[1])"""
    target = tmp_path / "data"
    killed = subprocess.Popen([sys.executable, "-c", code, target], stderr=subprocess.PIPE, start_new_session=True)
    while not (target / "work" / "stories").exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.001)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (target / "manifest.json").exists()
    (target / "work" / "stories" / "train-data99.jsonl").write_text("")  # as of another archive
    assert prepare(config, target) == manifest
    again, before = ([path.read_bytes() for path in split_files(made, "train")] for made in (target, folder))
    assert again == before


def test_official_stories_are_read_from_a_text_with_markers_between_them(tmp_path):
    path = tmp_path / "valid.txt"
    path.write_text("\n One.\n\nTwo “a”. \n<|endoftext|>\n<|endoftext|> Three.<|endoftext|>\n", encoding="utf-8")
    assert read_stories(path) == ["One.\n\nTwo “a”.", "Three."]
    assert read_stories(path, normalise=True) == ['One.\nTwo "a".', "Three."]
    path.write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(ArchiveError, match=r"valid\.txt is not UTF-8 text"):
        read_stories(path)
