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
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from blm_core import clean, data
from blm_core.config import PRESETS, DataConfig
from blm_core.data import SAMPLE_FOLDER, prepare, read_records, read_split, read_stories, split_files
from blm_core.files import ArchiveError, DownloadError, read_json

WORDS = """apple barn candle duck engine fence goose hat island jug kettle lamp mouse nest owl pond quilt rope
snow tent uncle van well yard zebra asked baked carried dug ended found gave heard jumped kept lost made napped opened
painted ran sang told used waited yawned blue cold dark empty funny green happy idle jolly kind loud muddy near old"""
VOCABULARY = WORDS.split()
SHARE = 0.2


def story(seed, words: int = 40) -> str:
    """A text in the form of a story, unlike that of any other seed."""
    chosen = random.Random(seed).choices(VOCABULARY, k=words)
    sentences = [" ".join(chosen[i : i + 8]).capitalize() for i in range(0, words, 8)]
    return ". ".join(sentences) + "."


def told_otherwise(text: str) -> str:
    """The same words in the same order."""
    return text.upper().replace(". ", "!\n\n").replace(" ", " - ", 3)


def nearly(text: str, seed) -> str:
    """The same story but for one word; a training story by its own words."""
    rng = random.Random(seed)
    while True:
        words = text.split()
        words[rng.randrange(1, 8)] = rng.choice(VOCABULARY)
        changed = " ".join(words)
        key = clean.story_key(changed)
        if key != clean.story_key(text) and not clean.is_held_out(key, SHARE):
            return changed


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


def runs(text: str) -> set[tuple]:
    words = clean.words(text)
    return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def keys(folder: Path, split: str) -> set[int]:
    return {clean.story_key(text) for text in read_split(folder, split)}


GOOD = [story(i) for i in range(240)]
HELD_OUT = [text for text in GOOD if clean.is_held_out(clean.story_key(text), SHARE)]
OFFICIAL = [story(f"official {i}") for i in range(12)]
PLANTED = [nearly(text, i) for i, text in enumerate(HELD_OUT[:15] + OFFICIAL[:5])]
REPEATS = [told_otherwise(text) for text in GOOD[:7]]
LEAKED = [told_otherwise(text) for text in OFFICIAL[5:9]]
INSTRUCTION = {"prompt:": "Tell one.", "words": ["barn", "duck", "rope"], "features": ["Dialogue", "half a pair: \ud800"]}
SHARDS = {
    "data100": records(PLANTED),  # numbers beyond 99, not in order
    "data00": records(GOOD[:100]),
    "data99": records(GOOD[150:]),
    "data01": b'[{"story": "Once',
    "data02": json.dumps({"stories": records(GOOD[:3])}).encode(),
    "data03": b"\xff\xfe" + json.dumps(records(GOOD[:3])).encode("utf-16-le"),
    "data04": b"[" * 100_000,
    "data05": [],
    "data06": b"",
    "data07": [
        *({"summary": "lost"}, {"story": None}, {"story": 7}, {"story": ["a"]}, "a story", ["a"], None, 3.5),
        {"story": story("with everything"), "instruction": INSTRUCTION, "summary": "s", "source": "GPT-4"},
        {"story": story("odd fields"), "instruction": "a string", "source": ["GPT-4"]},
        {"story": story("more odd fields"), "instruction": {"words": "barn", "features": None}, "source": None},
    ],
    "data08": records(
        ["", " \n", "Too short.", story("cut off")[:-1], story("foreign") + " 猫.", story("bell") + "\x07.", "\ud800" * 200]
    ),
    "data09": records(GOOD[100:150] + REPEATS + LEAKED),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("archive")
    (folder / "valid.txt").write_text("<|endoftext|>".join(f"\n{text}\n" for text in [*OFFICIAL, ""]))
    archive = pack(folder / "stories.tar.gz", SHARDS)
    return local(archive, validation_file=str(folder / "valid.txt"))


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(config, folder)
    return folder


@pytest.fixture(scope="module")
def manifest(folder) -> dict:
    return read_json(folder / "manifest.json")


def test_every_record_that_was_read_is_kept_or_counted_as_dropped_with_its_reason(manifest):
    assert manifest["read"] == sum(len(shard) for shard in SHARDS.values() if isinstance(shard, list))
    kept = manifest["stories"]["train"] + manifest["stories"]["validation"]
    assert manifest["read"] == kept + sum(manifest["drops"].values())
    assert manifest["drops"] == {
        "no story": 8,
        "other source": 0,
        "empty": 2,
        "too short": 1,
        "cut off": 1,
        "foreign characters": 3,
        "repeats another story": len(REPEATS) + len(LEAKED),
        "near a held-out story": len(PLANTED),
    }


def test_broken_shards_and_records_are_reported_with_shard_and_index(manifest):
    problems = manifest["problems"]["first"]
    assert manifest["problems"]["count"] == len(problems) == 5 + 8
    assert {(problem["shard"], problem["index"]) for problem in problems} == {
        *((f"data{i:02}.json", None) for i in (1, 2, 3, 4, 6)),
        *(("data07.json", i) for i in range(8)),
    }
    reasons = {problem["shard"]: problem["reason"] for problem in problems}
    assert "list of records" in reasons["data02.json"]
    assert reasons["data07.json"] == "no story"


def test_the_counts_are_those_of_what_was_written_and_words_features_and_source_stay_with_their_story(folder, manifest):
    for split in ("train", "validation", "official"):
        texts = list(read_split(folder, split))
        assert manifest["stories"][split] == len(texts)
        assert manifest["bytes"][split] == sum(len(text.encode()) for text in texts)
    kept = {record["story"]: record for split in ("train", "validation") for record in read_records(folder, split)}
    assert manifest["words_per_story"] == Counter(str(len(clean.words(text))) for text in kept)
    assert manifest["sources"] == {"not stated": len(kept) - 1, "GPT-4": 1}
    assert manifest["features"] == {"Dialogue": 1, "half a pair: \ud800": 1}
    assert manifest["words_asked"] == {"barn": 1, "duck": 1, "rope": 1}
    wanted = {"words": INSTRUCTION["words"], "features": INSTRUCTION["features"], "source": "GPT-4"}
    assert kept[story("with everything")] == {"story": story("with everything")} | wanted
    assert kept[story("odd fields")] == {"story": story("odd fields")}


def test_no_story_nor_one_almost_like_it_is_on_both_sides_of_the_split(folder, config):
    assert {text for text in GOOD if clean.story_key(text) in keys(folder, "validation")} == set(HELD_OUT)
    assert not any(clean.is_held_out(key, SHARE) for key in keys(folder, "train"))
    assert list(read_split(folder, "official")) == OFFICIAL
    kept = [clean.story_key(text) for split in ("train", "validation", "official") for text in read_split(folder, split)]
    assert len(set(kept)) == len(kept)
    outside = [runs(text) for split in ("validation", "official") for text in read_split(folder, split)]

    def near(text: str) -> bool:
        return any(len(runs(text) & other) >= config.near_duplicate * len(runs(text) | other) for other in outside)

    assert all(map(near, PLANTED))
    assert not any(map(near, read_split(folder, "train")))


def test_a_finished_preparation_leaves_stories_in_order_and_manifest_and_is_not_repeated(folder, config, manifest):
    before = stamps(folder)
    assert prepare(config, folder) == manifest
    assert stamps(folder) == before
    assert {path.name for path in folder.iterdir()} == {"stories", "manifest.json"}
    names = sorted(SHARDS, key=lambda name: int(name[4:]))
    assert [path.name for path in split_files(folder, "train")] == [f"train-{name}.jsonl" for name in names]


def test_the_split_depends_on_neither_order_nor_case_nor_punctuation_nor_shard(folder, config, manifest, tmp_path):
    found = [record for shard in SHARDS.values() if isinstance(shard, list) for record in shard if isinstance(record, dict)]
    texts = [record["story"] for record in found if isinstance(record.get("story"), str)]
    random.Random(1).shuffle(texts)
    texts = [told_otherwise(text) if clean.reason_to_drop(text, 100) is None else text for text in texts]
    again = pack(tmp_path / "again.tar.gz", {"data5": records(texts[:50]), "data7": records(texts[50:])})
    found = prepare(replace(config, archive=str(again)), tmp_path / "data")
    assert found["split_hash"] == manifest["split_hash"]
    for split in ("train", "validation", "official"):
        assert keys(tmp_path / "data", split) == keys(folder, split)


def test_a_changed_archive_a_changed_configuration_and_a_filter_by_source_are_each_prepared_anew(tmp_path):
    archive, target = tmp_path / "a.tar.gz", tmp_path / "data"
    texts = [record | {"source": "GPT-4" if i % 3 else "GPT-3.5"} for i, record in enumerate(records(GOOD[:60]))]
    pack(archive, {"data00": texts[:40]})
    assert prepare(local(archive), target)["read"] == 40
    pack(archive, {"data00": texts[:40], "data01": texts[40:]})
    assert prepare(local(archive), target)["read"] == 60
    found = prepare(local(archive, sources=("GPT-4",)), target)
    assert found["drops"]["other source"] == 20
    assert found["sources"] == {"GPT-4": 40}
    assert {record["source"] for record in read_records(target, "train")} == {"GPT-4"}
    # and one that fails costs nothing of what is there
    before = stamps(target)
    with pytest.raises(DownloadError, match="BLM_ARCHIVE"):
        prepare(local(tmp_path / "gone.tar.gz"), target)
    (tmp_path / "bad.tar.gz").write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(ArchiveError, match="cannot be unpacked"):
        prepare(local(tmp_path / "bad.tar.gz"), target)
    with pytest.raises(DownloadError, match="BLM_VALIDATION"):
        prepare(local(archive, validation_file=str(tmp_path / "gone.txt")), target)
    assert {path: stamp for path, stamp in stamps(target).items() if path in before} == before
    assert prepare(local(archive, sources=("GPT-4",)), target) == found


@pytest.mark.parametrize("reached", ["cleaned", "stories"])
def test_a_preparation_that_is_killed_half_way_is_made_again_from_the_start(config, manifest, folder, tmp_path, reached):
    code = (
        "import sys; from blm_core.config import DataConfig; from blm_core.data import prepare\n"
        f"if __name__ == '__main__':\n    prepare({config}, sys.argv[1])\n"
    )
    target = tmp_path / "data"
    killed = subprocess.Popen([sys.executable, "-c", code, target], stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (target / reached).exists():
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (target / "manifest.json").exists()
    assert prepare(config, target) == manifest
    again, before = ([path.read_bytes() for path in split_files(made, "train")] for made in (target, folder))
    assert again == before


@pytest.mark.parametrize(
    ("shards", "why"),
    [
        ({"data00": records(["Too short."] * 3), "data01": b"{"}, r"too short.*3.*data01\.json"),
        ({"data00": records(text for text in GOOD[:20] if text not in HELD_OUT)}, "too few"),
    ],
    ids=["nothing kept", "none to hold out"],
)
def test_an_archive_that_cannot_be_used_is_refused_with_the_reasons(tmp_path, shards, why):
    with pytest.raises(ArchiveError, match=why):
        prepare(local(pack(tmp_path / "a.tar.gz", shards)), tmp_path / "data")
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_official_stories_are_read_from_a_text_with_markers_between_them(tmp_path):
    path = tmp_path / "valid.txt"
    path.write_text("\n One.\n\nTwo “a”. \n<|endoftext|>\n<|endoftext|> Three.<|endoftext|>\n", encoding="utf-8")
    assert read_stories(path) == ["One.\n\nTwo “a”.", "Three."]
    assert read_stories(path, normalise=True) == ['One.\nTwo "a".', "Three."]
    path.write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(ArchiveError, match=r"valid\.txt is not UTF-8 text"):
        read_stories(path)


def peak_memory(folder: Path, n_shards: int) -> int:
    """The largest resident memory in KiB that preparing `n_shards` shards takes in any of its processes."""
    folder.mkdir()
    shards = {f"data{i:02}": records(story(f"{i} {j}", words=240) for j in range(800)) for i in range(n_shards)}
    archive = pack(folder / "a.tar.gz", shards)
    code = (
        "import re, resource, sys; from pathlib import Path\n"
        "from blm_core.config import DataConfig; from blm_core.data import prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare(DataConfig(sys.argv[1], ''), Path(sys.argv[2]))\n"
        # the own peak that `resource` gives may be that of the process which started this one
        "    own = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]\n"
        "    print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, archive, folder / "data"], capture_output=True, text=True, check=True)
    return max(map(int, run.stdout.split()))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_archive(tmp_path):
    small, large = peak_memory(tmp_path / "small", 2), peak_memory(tmp_path / "large", 10)
    added = sum(path.stat().st_size for path in split_files(tmp_path / "large" / "data", "train")[2:]) / 1024
    assert added > 6000
    assert large - small < added / 2


SAMPLE = [record for path in sorted(SAMPLE_FOLDER.glob("data*.json")) for record in read_json(path)]
WHOLE = [record for record in SAMPLE if set(record) == {"story", "instruction", "summary", "source"}]


def test_smoke_keeps_every_whole_story_of_the_sample_and_meets_every_kind_of_fault(smoke):
    manifest = prepare(smoke.data, smoke.folder / "data")
    assert len(WHOLE) >= 200
    kept = keys(smoke.folder / "data", "train") | keys(smoke.folder / "data", "validation")
    assert kept == {clean.story_key(clean.normalise(record["story"])) for record in WHOLE}
    assert manifest["read"] == len(SAMPLE) == len(kept) + sum(manifest["drops"].values())
    for drop in ("no story", "empty", "too short", "cut off", "foreign characters", "repeats another story"):
        assert manifest["drops"][drop]
    assert manifest["repairs"]["mojibake repaired"]
    assert manifest["repairs"]["white space tidied"]
    assert manifest["stories"]["validation"] == pytest.approx(PRESETS["smoke"].data.validation_share * len(kept), rel=0.5)
    assert data.split_hash(read_split(smoke.folder / "data", "validation")) == manifest["split_hash"]
