"""Stories as tokens on disk: whole, found again, made again where anything does not agree."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from blm_core.config import ROOT, TokenizerConfig
from blm_core.tokenizer import Tokenizer, train
from blm_core.tokens import TokenStories, encode_splits, prepare_tokenizer

TRAIN = [
    [f"The {animal} had {n} apples.\nIt ate one and slept." for n in range(2, 6)] for animal in ("goat", "hen", "old mouse")
]
VALIDATION = [["A snail went up the wall.", "Down it came again: 🐌!\nThe end."]]


def write_stories(folder: Path, **splits: list[list[str]]) -> None:
    (folder / "stories").mkdir(parents=True, exist_ok=True)
    for split, shards in splits.items():
        for i, stories in enumerate(shards):
            lines = (json.dumps({"story": story}) + "\n" for story in stories)
            (folder / "stories" / f"{split}-data{i:02}.jsonl").write_text("".join(lines))


def texts(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(story) for story in TokenStories(folder, split)]


@pytest.fixture(scope="module")
def encoded_once(tokenizer, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    write_stories(root, train=TRAIN, validation=VALIDATION)
    encode_splits(root, tokenizer, root / "tokens", 0.0)
    return root


@pytest.fixture
def encoded(encoded_once, tmp_path) -> Path:
    """A copy, with its times, that a test may damage."""
    return shutil.copytree(encoded_once, tmp_path / "copy")


def test_stories_come_back_in_their_order_and_index_and_manifest_say_where_and_how_many(encoded_once, tokenizer):
    folder = encoded_once / "tokens"
    manifest = json.loads((folder / "manifest.json").read_text())
    for split, shards in (("train", TRAIN), ("validation", VALIDATION), ("official", [])):
        stories = [story for shard in shards for story in shard]
        assert texts(folder, split, tokenizer) == stories
        assert manifest["stories"][split] == len(stories)
        assert manifest["tokens"][split] == sum(len(tokenizer.encode(story)) + 1 for story in stories)
        assert manifest["bytes"][split] == sum(len(story.encode()) for story in stories)
        for i in range(len(shards)):
            tokens = np.fromfile(folder / f"{split}-data{i:02}.bin", dtype=np.uint16)
            starts = np.load(folder / f"{split}-data{i:02}.npy")
            assert starts.tolist() == [*np.flatnonzero(tokens == tokenizer.eot), len(tokens)]
    found = TokenStories(folder, "train")
    assert found.lengths.tolist() == [len(story) for story in found]
    with pytest.raises(IndexError):
        found[len(found)]


@pytest.mark.parametrize("damage", ["none", "cut off", ".npy", "manifest.json"])
def test_what_is_whole_is_found_and_not_touched_and_what_is_damaged_is_made_again(encoded, tokenizer, damage):
    folder = encoded / "tokens"
    contents = {path: path.read_bytes() for path in folder.iterdir()}
    made = (folder / "manifest.json").stat().st_mtime_ns
    if damage == "cut off":
        with open(folder / "train-data01.bin", "r+b") as file:
            file.truncate(10)
    elif damage != "none":
        next(folder.glob(f"*{damage}")).unlink()
    encode_splits(encoded, tokenizer, folder, 0.0)
    assert {path: path.read_bytes() for path in folder.iterdir()} == contents
    assert ((folder / "manifest.json").stat().st_mtime_ns == made) == (damage == "none")


def test_another_tokenizer_or_another_input_encodes_everything_again(encoded, tokenizer):
    other = train((story for shard in TRAIN for story in shard), encoded / "other.model", 300)
    encode_splits(encoded, other, encoded / "tokens", 0.0)
    assert texts(encoded / "tokens", "train", other) == [story for shard in TRAIN for story in shard]
    changed = [TRAIN[0], ["The hen left. Nobody ate apples."], TRAIN[2]]
    write_stories(encoded, train=changed)
    manifest = encode_splits(encoded, tokenizer, encoded / "tokens", 0.0)
    assert manifest["stories"]["train"] == 9
    assert texts(encoded / "tokens", "train", tokenizer) == [story for shard in changed for story in shard]


def test_an_interrupted_encoding_is_never_half_used(encoded, tokenizer):
    write_stories(encoded, train=[*TRAIN[:2], []])  # a shard may be empty
    broken = encoded / "stories" / "train-data01.jsonl"
    whole = broken.read_text()
    broken.write_text(whole[:-10])
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        encode_splits(encoded, tokenizer, encoded / "tokens", 0.0)
    with pytest.raises(FileNotFoundError, match="no encoded stories"):
        TokenStories(encoded / "tokens", "train")
    broken.write_text(whole)
    encode_splits(encoded, tokenizer, encoded / "tokens", 0.0)
    assert texts(encoded / "tokens", "train", tokenizer) == [*TRAIN[0], *TRAIN[1]]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_blank_line_share_of_training_stories_is_written_with_two_newlines(tmp_path, tokenizer, share):
    stories = [f"Goat {n} sat down.\nIt rose again." for n in range(200)]
    write_stories(tmp_path, train=[stories], validation=[stories])
    manifest = encode_splits(tmp_path, tokenizer, tmp_path / "tokens", share)
    written = texts(tmp_path / "tokens", "train", tokenizer)
    assert [story.replace("\n\n", "\n") for story in written] == stories
    assert sum("\n\n" in story for story in written) == pytest.approx(share * len(stories), abs=30 if share < 1 else 0)
    assert manifest["bytes"]["train"] == sum(len(story.encode()) for story in written)
    assert texts(tmp_path / "tokens", "validation", tokenizer) == stories


def test_a_vocabulary_is_found_again_and_learned_again_where_it_is_damaged_or_anything_differs(tmp_path):
    def learned(vocab_size: int = 300, max_stories: int = 100) -> tuple[int, bytes]:
        path = prepare_tokenizer(TokenizerConfig(vocab_size, max_stories), tmp_path, tmp_path / "tokenizer").path
        return path.stat().st_mtime_ns, path.read_bytes()

    write_stories(tmp_path, train=TRAIN)
    first = learned()
    assert learned() == first
    path = tmp_path / "tokenizer" / "tokenizer.model"
    path.write_bytes(first[1][:-5])
    assert learned()[1] == first[1]
    for change in ({"vocab_size": 301}, {"max_stories": 11}):
        before = learned()[0]
        assert learned(**change)[0] > before
    before = learned()[0]
    write_stories(tmp_path, train=[*TRAIN[:2], [*TRAIN[2], "A fox sat."]])
    assert learned()[0] > before


def test_processes_that_start_together_prepare_once_and_agree(tmp_path):
    code = "from blm_core import config, pipeline; print(pipeline.tokens(config.load('smoke'))['tokens']['train'])"
    environment = os.environ | {"BLM_BUILD": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sum("cleaning" in error for _, error in said) == 1
    manifest = json.loads((tmp_path / "smoke" / "tokens" / "manifest.json").read_text())
    assert {int(out) for out, _ in said} == {manifest["tokens"]["train"]}
