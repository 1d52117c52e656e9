"""Training windows: every token of an epoch once, in an order that depends on seed and epoch alone."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blm_core.tokens import NOT_SCORED, Batches, TokenStories

EOT = 0


def encoded(folder: Path, lengths: list[int]) -> TokenStories:
    """Stories of the given lengths in which no token but the first of each, `EOT`, appears twice."""
    tokens = np.arange(1, sum(lengths) + 1)
    starts = np.cumsum([0, *lengths])
    tokens[starts[:-1]] = EOT
    tokens.astype(np.uint16).tofile(folder / "train-data00.bin")
    np.save(folder / "train-data00.npy", starts)
    manifest = {"splits": {"train": [{"name": "train-data00", "tokens": int(starts[-1])}]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TokenStories(folder, "train")


@pytest.fixture
def stories(tmp_path) -> TokenStories:
    rng = np.random.default_rng(5)
    return encoded(tmp_path, rng.integers(1, 40, size=60).tolist())


def windows(batches: Batches, epoch: int) -> list[np.ndarray]:
    """Inputs, targets and story numbers of the windows of an epoch."""
    count = batches.windows_per_epoch
    return [batches.window(i) for i in range(epoch * count, (epoch + 1) * count)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 24), st.integers(0, 60))
def test_every_token_of_an_epoch_is_an_input_once_with_what_follows_as_target(tmp_path, lengths, seq_len, most):
    stories = encoded(tmp_path, lengths)
    batches = Batches(stories, seq_len, 2, seed=1, max_stories=most)
    expected = sorted(  # stories are whole unless longer than a window
        (story[i : i + seq_len], [*story, EOT][i + 1 : i + seq_len + 1])
        for story in (story.tolist() for story in list(stories)[: most or None])
        for i in range(0, len(story), seq_len)
    )
    for epoch in range(3):
        found, pieces, padding = windows(batches, epoch), [], 0
        for inputs, targets, numbers in found:
            pieces += [(inputs[numbers == n].tolist(), targets[numbers == n].tolist()) for n in range(numbers.max() + 1)]
            padding += (numbers < 0).sum()
            assert set(targets[numbers < 0]) <= {NOT_SCORED}
        assert sum((numbers >= 0).sum() * 2 <= seq_len for _, _, numbers in found) <= 1  # two such would have been one window
        assert sorted(pieces) == expected
        assert batches.tokens_per_epoch == len(found) * seq_len - padding
        assert batches.padding == pytest.approx(padding / (len(found) * seq_len))


def test_a_position_in_training_is_nothing_but_a_step_and_the_processes_share_its_batch(stories):
    straight, resumed = Batches(stories, 16, 12, seed=3), Batches(stories, 16, 12, seed=3)
    expected = [straight.batch(step) for step in range(30)]
    for step in (17, 3, 29, 17, 0):
        assert resumed.batch(step).equal(expected[step])
        for world_size in (2, 3, 12):
            shares = [straight.batch(step, rank, world_size) for rank in range(world_size)]
            assert {len(share) for share in shares} == {12 // world_size}
            assert torch.cat(shares).equal(expected[step])


def test_the_order_of_windows_depends_on_seed_and_epoch_alone(stories):
    batches, other = Batches(stories, 64, 4, seed=3), Batches(stories, 64, 4, seed=4)
    reference = torch.cat([batches.batch(step) for step in range(6)])
    for size in (1, 3, 8):
        same = Batches(stories, 64, size, seed=3)
        assert torch.cat([same.batch(step) for step in range(24 // size)]).equal(reference)
    drawn = [
        {tuple(sorted(w[0][w[2] >= 0].tolist())) for w in windows(*which)} for which in ((batches, 0), (batches, 1), (other, 0))
    ]
    assert all(len(a & b) < len(a) / 2 for i, a in enumerate(drawn) for b in drawn[:i])


class DiskThatFails(TokenStories):
    """Encoded stories of which one cannot be read."""

    def __getitem__(self, i: int) -> np.ndarray:
        if i == 11:
            raise OSError("story 11 cannot be read")
        return super().__getitem__(i)


@pytest.mark.parametrize("ahead", [1, 100])
def test_prefetched_batches_are_the_batches_until_one_fails_and_leave_no_thread(stories, tmp_path, ahead):
    threads = set(threading.enumerate())
    whole, failing = Batches(stories, 16, 2, seed=3), Batches(DiskThatFails(tmp_path, "train"), 16, 2, seed=3)
    made = list(whole.prefetched(range(5, 15), 1, 2, ahead))
    assert torch.stack(made).equal(torch.stack([whole.batch(step, 1, 2) for step in range(5, 15)]))
    with pytest.raises(OSError, match="story 11"):
        list(failing.prefetched(range(whole.windows_per_epoch), ahead=ahead))
    unfinished = whole.prefetched(range(1000), ahead=ahead)
    next(unfinished)
    unfinished.close()
    assert set(threading.enumerate()) <= threads
