"""Stories as tokens on disk: whole, found again, made again where anything does not agree."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from blm_core.config import TokenizerConfig
from blm_core.tokenizer import Tokenizer, train
from blm_core.tokens import TokenStories, encode_splits, prepare_tokenizer

TRAIN = [
    [f"The {animal} had {n} apples.\nIt ate one and slept." for n in range(2, 6)] for animal in ("goat", "hen", "old mouse")
]
VALIDATION = [["A snail went up the wall.", "Down it came again: 🐌!\nThe end."]]


def write_stories(folder: Path, **splits: list[list[str]]) -> Path:
    (folder / "stories").mkdir(parents=True, exist_ok=True)
    for split, shards in splits.items():
        for i, stories in enumerate(shards):
            lines = (json.dumps({"story": story}) + "\n" for story in stories)
            (folder / "stories" / f"{split}-data{i:02}.jsonl").write_text("".join(lines))
    return folder


def texts(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(story) for story in TokenStories(folder, split)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder: Path, stem: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(f"{stem}.*")}


@pytest.fixture(scope="module")
def encoded_once(tokenizer, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    write_stories(root / "data", train=TRAIN, validation=VALIDATION)
    encode_splits(root / "data", tokenizer, root / "tokens", 0.0)
    return root


@pytest.fixture
def encoded(encoded_once, tmp_path) -> Path:
    """A copy, with its times, that a test may damage."""
    return shutil.copytree(encoded_once, tmp_path / "copy")


def test_tokens_decode_back_to_the_stories_in_their_order(encoded_once, tokenizer):
    assert texts(encoded_once / "tokens", "train", tokenizer) == [story for shard in TRAIN for story in shard]
    assert texts(encoded_once / "tokens", "validation", tokenizer) == VALIDATION[0]
    assert texts(encoded_once / "tokens", "official", tokenizer) == []


def test_the_index_gives_the_boundaries_of_the_stories(encoded_once, tokenizer):
    stories = TokenStories(encoded_once / "tokens", "train")
    for i, shard in enumerate(TRAIN):
        tokens = np.fromfile(encoded_once / "tokens" / f"train-data{i:02}.bin", dtype=np.uint16)
        bounds = np.load(encoded_once / "tokens" / f"train-data{i:02}.npy")
        starts = np.flatnonzero(tokens == tokenizer.eot)
        assert bounds.tolist() == [*starts, len(tokens)]
        assert len(bounds) == len(shard) + 1
    assert stories.lengths.tolist() == [len(story) for story in stories]
    with pytest.raises(IndexError):
        stories[len(stories)]


def test_the_manifest_counts_stories_tokens_and_bytes(encoded_once, tokenizer):
    manifest = json.loads((encoded_once / "tokens" / "manifest.json").read_text())
    for split, shards in (("train", TRAIN), ("validation", VALIDATION), ("official", [])):
        stories = [story for shard in shards for story in shard]
        assert manifest["stories"][split] == len(stories)
        assert manifest["tokens"][split] == sum(len(tokenizer.encode(story)) + 1 for story in stories)
        assert manifest["bytes"][split] == sum(len(story.encode()) for story in stories)


def test_what_is_finished_is_found_and_not_touched(encoded, tokenizer):
    before = times(encoded / "tokens", "*")
    encode_splits(encoded / "data", tokenizer, encoded / "tokens", 0.0)
    assert times(encoded / "tokens", "*") == before


def test_another_tokenizer_encodes_everything_again(encoded, tokenizer):
    other = train((story for shard in TRAIN for story in shard), encoded / "other.model", 300)
    encode_splits(encoded / "data", other, encoded / "tokens", 0.0)
    assert texts(encoded / "tokens", "train", other) == [story for shard in TRAIN for story in shard]


def test_a_changed_input_is_encoded_again_and_the_others_are_kept(encoded, tokenizer):
    kept = times(encoded / "tokens", "train-data00")
    changed = [TRAIN[0], ["The hen left. Nobody ate apples."], TRAIN[2]]
    write_stories(encoded / "data", train=changed)
    manifest = encode_splits(encoded / "data", tokenizer, encoded / "tokens", 0.0)
    assert manifest["stories"]["train"] == 9
    assert texts(encoded / "tokens", "train", tokenizer) == [story for shard in changed for story in shard]
    assert times(encoded / "tokens", "train-data00") == kept


@pytest.mark.parametrize("gone", ["", ".bin", ".npy", ".json", ".*"], ids=lambda suffix: f"{suffix or 'nothing'} is gone")
@pytest.mark.parametrize("manifest", ["kept", "gone"])
def test_a_damaged_shard_is_made_again_and_finished_ones_are_kept(encoded, tokenizer, gone, manifest):
    tokens, whole = encoded / "tokens", contents(encoded / "tokens")
    before = {stem: times(tokens, stem) for stem in ("train-data00", "train-data02", "validation-data00")}
    for path in tokens.glob(f"train-data01{gone}") if gone else ():
        path.unlink()
    if not gone:
        with open(tokens / "train-data01.bin", "r+b") as file:
            file.truncate(10)
    if manifest == "gone":
        (tokens / "manifest.json").unlink()
    encode_splits(encoded / "data", tokenizer, tokens, 0.0)
    expected = {name for name in whole if gone != ".json" or manifest == "gone" or name != "train-data01.json"}
    assert contents(tokens) == {name: whole[name] for name in expected}
    assert {stem: times(tokens, stem) for stem in before} == before


def test_an_interrupted_encoding_is_never_half_used_and_goes_on_where_it_stopped(tmp_path, tokenizer):
    write_stories(tmp_path, train=[*TRAIN[:2], []])
    broken = tmp_path / "stories" / "train-data01.jsonl"
    whole = broken.read_text()
    broken.write_text(whole[:-10])
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        encode_splits(tmp_path, tokenizer, tmp_path / "tokens", 0.0)
    with pytest.raises(FileNotFoundError, match="no encoded stories"):
        TokenStories(tmp_path / "tokens", "train")
    finished = times(tmp_path / "tokens", "train-data00")
    assert len(finished) == 3
    assert times(tmp_path / "tokens", "train-data01") == {}
    broken.write_text(whole)
    encode_splits(tmp_path, tokenizer, tmp_path / "tokens", 0.0)
    assert texts(tmp_path / "tokens", "train", tokenizer) == [*TRAIN[0], *TRAIN[1]]
    assert times(tmp_path / "tokens", "train-data00") == finished


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_blank_line_share_of_training_stories_is_written_with_two_newlines(tmp_path, tokenizer, share):
    stories = [f"Goat {n} sat down.\nIt rose again." for n in range(200)]
    write_stories(tmp_path, train=[stories], validation=[stories])
    manifest = encode_splits(tmp_path, tokenizer, tmp_path / "tokens", share)
    written = texts(tmp_path / "tokens", "train", tokenizer)
    assert [story.replace("\n\n", "\n") for story in written] == stories
    assert sum("\n\n" in story for story in written) == pytest.approx(share * len(stories), abs=30 if 0 < share < 1 else 0)
    assert manifest["bytes"]["train"] == sum(len(story.encode()) for story in written)
    assert texts(tmp_path / "tokens", "validation", tokenizer) == stories


@pytest.fixture
def vocabulary(tmp_path):
    """Learn 310 pieces from what lies in `tmp_path`, or find them."""
    stories = [
        f"The {a} saw a {b} {c}.\nIt ran." for a in ("goat", "hen", "fox") for b in ("wet", "dry") for c in ("hill", "log")
    ]
    write_stories(tmp_path, train=[stories])

    def prepare(vocab_size=300, max_stories=100, split_hash="0"):
        config = TokenizerConfig(vocab_size=vocab_size, max_stories=max_stories)
        return prepare_tokenizer(config, tmp_path, tmp_path / "tokenizer", split_hash)

    return prepare


@pytest.mark.parametrize("change", [{}, {"vocab_size": 301}, {"max_stories": 11}, {"split_hash": "1"}])
def test_a_vocabulary_is_found_again_and_learned_again_from_another_configuration_or_split(vocabulary, change):
    path = vocabulary().path
    before = path.stat().st_mtime_ns
    assert (vocabulary(**change).path.stat().st_mtime_ns == before) == (not change)


def test_a_damaged_vocabulary_is_learned_again(vocabulary):
    path = vocabulary().path
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    vocabulary()
    assert path.read_bytes() == whole
