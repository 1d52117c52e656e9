"""Training windows: every token of an epoch once, in an order that depends on seed and epoch alone."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blm_core.tokens import NOT_SCORED, Batches, TokenStories, pack

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
    """Inputs, targets and story numbers of the windows of an epoch, taken from the batches that hold them."""
    first, last = epoch * batches.windows_per_epoch, (epoch + 1) * batches.windows_per_epoch
    size = batches.batch_size
    steps = range(first // size, -(-last // size))
    taken = torch.cat([batches.batch(step) for step in steps])
    return list(taken[first - steps.start * size :][: last - first].numpy())


def pieces(window: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of each story in a window."""
    inputs, targets, numbers = window
    return [(inputs[numbers == n].tolist(), targets[numbers == n].tolist()) for n in range(numbers.max() + 1)]


many_sizes = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
some_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=25)


@many_sizes
@given(lengths=some_lengths, seq_len=st.integers(1, 24), batch_size=st.integers(1, 6), seed=st.integers(0, 99))
def test_every_token_of_an_epoch_is_an_input_exactly_once(tmp_path, lengths, seq_len, batch_size, seed):
    stories = encoded(tmp_path, lengths)
    batches = Batches(stories, seq_len, batch_size, seed)
    every_token = sorted(token for story in stories for token in story.tolist())
    assert batches.tokens_per_epoch == len(every_token)
    for epoch in range(3):
        found = windows(batches, epoch)
        inputs = [token for window in found for token in window[0][window[2] >= 0].tolist()]
        assert sorted(inputs) == every_token
        padding = sum((window[2] < 0).sum() for window in found)
        assert padding == len(found) * seq_len - len(every_token)
        assert batches.padding == pytest.approx(padding / (len(found) * seq_len))


@many_sizes
@given(lengths=some_lengths, seq_len=st.integers(1, 24), seed=st.integers(0, 99))
def test_stories_are_whole_unless_longer_than_a_window_and_targets_are_what_follows(tmp_path, lengths, seq_len, seed):
    stories = encoded(tmp_path, lengths)
    expected = [
        (story[i : i + seq_len], [*story, EOT][i + 1 : i + seq_len + 1])
        for story in (story.tolist() for story in stories)
        for i in range(0, len(story), seq_len)
    ]
    found = windows(Batches(stories, seq_len, 2, seed), 0)
    assert sorted(piece for window in found for piece in pieces(window)) == sorted(expected)
    for inputs, targets, numbers in found:
        assert (targets[numbers < 0] == NOT_SCORED).all()
        assert (inputs[numbers < 0] == EOT).all()


@many_sizes
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=200))
def test_packing_places_every_piece_once_and_no_window_holds_too_much(lengths):
    patterns = pack(np.array(lengths), 16)
    placed = [length for pattern, times in patterns for length in pattern * times]
    assert sorted(placed) == sorted(lengths)
    assert max(sum(pattern) for pattern, _ in patterns) <= 16
    # Two windows that are not more than half full would have been one.
    assert sum(times for pattern, times in patterns if sum(pattern) <= 8) <= 1


def test_a_position_in_training_is_nothing_but_a_step(stories):
    straight = Batches(stories, 16, 4, seed=3)
    expected = [straight.batch(step) for step in range(30)]
    resumed = Batches(stories, 16, 4, seed=3)
    for step in (17, 3, 29, 17, 0):
        assert resumed.batch(step).equal(expected[step])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_the_order_of_windows_depends_on_seed_and_epoch_alone(stories, batch_size):
    reference, same = Batches(stories, 16, 4, seed=3), Batches(stories, 16, batch_size, seed=3)
    for epoch in (2, 0, 1):
        assert np.array_equal(windows(same, epoch), windows(reference, epoch))


def test_another_seed_and_another_epoch_give_other_windows(stories):
    batches, other = Batches(stories, 64, 4, seed=3), Batches(stories, 64, 4, seed=4)
    drawn = [
        {tuple(sorted(w[0][w[2] >= 0].tolist())) for w in windows(*which)} for which in ((batches, 0), (batches, 1), (other, 0))
    ]
    assert all(len(a & b) < len(a) / 2 for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_the_shares_of_all_processes_are_the_batch_of_one(stories, world_size):
    batches = Batches(stories, 16, 12, seed=3)
    for step in (0, 1, 9):
        shares = [batches.batch(step, rank, world_size) for rank in range(world_size)]
        assert torch.cat(shares).equal(batches.batch(step))
        assert {len(share) for share in shares} == {12 // world_size}


def test_only_the_first_stories_are_taken_where_so_many_are_asked_for(stories):
    batches = Batches(stories, 16, 4, seed=3, max_stories=7)
    inputs = [token for window in windows(batches, 1) for token in window[0][window[2] >= 0].tolist()]
    assert sorted(inputs) == sorted(token for i in range(7) for token in stories[i].tolist())


@pytest.mark.parametrize("ahead", [1, 4, 100])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_prefetched_batches_are_the_batches(stories, rank, world_size, ahead):
    batches = Batches(stories, 16, 4, seed=3)
    made = list(batches.prefetched(range(5, 15), rank, world_size, ahead))
    assert len(made) == 10
    for step, batch in zip(range(5, 15), made, strict=True):
        assert batch.equal(batches.batch(step, rank, world_size))


class DiskThatFails(TokenStories):
    """Encoded stories of which one cannot be read."""

    def __getitem__(self, i: int) -> np.ndarray:
        if i == 11:
            raise OSError("story 11 cannot be read")
        return super().__getitem__(i)


def test_an_error_while_prefetching_is_raised_where_the_batches_are_used(stories, tmp_path):
    batches = Batches(DiskThatFails(tmp_path, "train"), 16, 1, seed=3)
    made = []
    with pytest.raises(OSError, match="story 11"):
        made.extend(batches.prefetched(range(2 * batches.windows_per_epoch)))
    whole = Batches(stories, 16, 1, seed=3)
    assert all(batch.equal(whole.batch(step)) for step, batch in enumerate(made))
    with pytest.raises(OSError, match="story 11"):
        batches.batch(len(made))


def test_the_thread_ends_when_the_batches_are_no_longer_wanted(stories):
    before = set(threading.enumerate())
    data = Batches(stories, 16, 4, seed=3).prefetched(range(1000), ahead=1)
    next(data)
    started = set(threading.enumerate()) - before
    assert len(started) == 1
    data.close()
    for thread in started:
        thread.join(timeout=30)
        assert not thread.is_alive()
