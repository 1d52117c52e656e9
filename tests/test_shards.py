"""Stories as tokens on disk: whole, found again, made again where anything does not agree."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from blm_core.config import ROOT, TokenizerConfig
from blm_core.files import read_json, write_json_lines
from blm_core.tokenizer import Tokenizer, train
from blm_core.tokens import TokenStories, encode_splits, prepare_tokenizer

TRAIN = [[f"The {animal} had {n} apples.\nIt ate one and slept." for n in range(2, 6)] for animal in ("goat", "hen", "mouse")]
VALIDATION = [["A snail went up the wall.", "Down it came again: 🐌!\nThe end."]]
FEW = TokenizerConfig(vocab_size=300, max_stories=100)


def write_stories(folder: Path, **splits: list[list[str]]) -> None:
    for split, shards in splits.items():
        for i, stories in enumerate(shards):
            write_json_lines(folder / "stories" / f"{split}-data{i:02}.jsonl", ({"story": story} for story in stories))


def check(root: Path, tokenizer: Tokenizer, **splits: list[list[str]]) -> None:
    """The encoded stories are these, in their order, and index and manifest say where and how many."""
    folder = root / "tokens"
    manifest = read_json(folder / "manifest.json")
    for split, shards in splits.items():
        stories, found = [*chain(*shards)], TokenStories(folder, split)
        assert [tokenizer.decode(story) for story in found] == stories
        assert {story[0] for story in found} <= {tokenizer.eot}
        assert found.lengths.tolist() == [len(tokenizer.encode(story)) + 1 for story in stories]
        counts = [manifest[what][split] for what in ("stories", "tokens", "bytes")]
        assert counts == [len(stories), found.lengths.sum(), sum(len(story.encode()) for story in stories)]


@pytest.fixture
def root(tokenizer, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    write_stories(root, train=TRAIN, validation=VALIDATION)
    encode_splits(root, tokenizer, root / "tokens", 0.0)
    return root


def test_stories_come_back_are_found_again_and_made_again_where_they_are_damaged(root, tokenizer):
    check(root, tokenizer, train=TRAIN, validation=VALIDATION, official=[])
    with pytest.raises(IndexError):
        TokenStories(root / "tokens", "train")[12]
    manifest, data, index = (root / "tokens" / name for name in ("manifest.json", "train-data01.bin", "train-data01.npy"))
    contents = {path: path.read_bytes() for path in (root / "tokens").iterdir()}
    made = manifest.stat().st_mtime_ns
    encode_splits(root, tokenizer, root / "tokens", 0.0)
    assert manifest.stat().st_mtime_ns == made
    for damage in (lambda: data.write_bytes(data.read_bytes()[:10]), index.unlink):
        damage()
        encode_splits(root, tokenizer, root / "tokens", 0.0)
        assert {path: path.read_bytes() for path in (root / "tokens").iterdir()} == contents


def test_another_vocabulary_or_input_encodes_everything_again_and_an_interrupted_encoding_is_never_half_used(root, tmp_path):
    other = train(chain(*TRAIN), tmp_path / "other.model", 300)
    changed = [TRAIN[0], ["The hen left. Nobody ate apples."], []]  # a shard may be empty
    encode_splits(root, other, root / "tokens", 0.0)
    check(root, other, train=TRAIN)
    write_stories(root, train=changed)
    whole = (broken := root / "stories" / "train-data01.jsonl").read_text()
    broken.write_text(whole[:-10])
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        encode_splits(root, other, root / "tokens", 0.0)
    with pytest.raises(FileNotFoundError, match="no encoded stories"):
        TokenStories(root / "tokens", "train")
    broken.write_text(whole)
    encode_splits(root, other, root / "tokens", 0.0)
    check(root, other, train=changed)


def test_the_blank_line_share_of_training_stories_is_written_with_two_newlines(tmp_path, tokenizer):
    stories = [f"Goat {n} sat down.\nIt rose again." for n in range(200)]
    write_stories(tmp_path, train=[stories], validation=[stories])
    encode_splits(tmp_path, tokenizer, tmp_path / "tokens", 0.5)
    written = [tokenizer.decode(story) for story in TokenStories(tmp_path / "tokens", "train")]
    assert [story.replace("\n\n", "\n") for story in written] == stories
    assert sum("\n\n" in story for story in written) == pytest.approx(100, abs=30)
    check(tmp_path, tokenizer, train=[written], validation=[stories])


def test_a_vocabulary_is_found_again_and_learned_again_where_it_is_damaged_or_anything_differs(tmp_path):
    def learned(config: TokenizerConfig = FEW) -> tuple[int, bytes]:
        path = prepare_tokenizer(config, tmp_path, tmp_path / "tokenizer").path
        return path.stat().st_mtime_ns, path.read_bytes()

    write_stories(tmp_path, train=TRAIN)
    first = learned()
    assert learned() == first
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(first[1][:-5])
    assert learned()[1] == first[1]
    times = [learned(config)[0] for config in (FEW, TokenizerConfig(301, 100), TokenizerConfig(301, 11))]
    write_stories(tmp_path, train=[[*TRAIN[0], "A fox sat."]])
    times.append(learned(TokenizerConfig(301, 11))[0])
    assert len(set(times)) == 4


def test_processes_that_start_together_prepare_once_and_agree(tmp_path):
    code = "from blm_core import config, pipeline; print(pipeline.tokens(config.load('smoke'))['tokens']['train'])"
    environment = os.environ | {"BLM_BUILD": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sum("cleaning" in error for _, error in said) == 1
    manifest = read_json(tmp_path / "smoke" / "tokens" / "manifest.json")
    assert {int(out) for out, _ in said} == {manifest["tokens"]["train"]}
