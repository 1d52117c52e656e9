"""Copied runs and ROUGE-2 against training stories, on hand-made cases and against exhaustive search."""

import random
import time

import numpy as np
import pytest

from blm_core.clean import words
from blm_core.evidence import memory
from blm_core.evidence.memory import Index, rouge_2

STORIES = [
    "The small red boat went over the lake. It found a golden shell.",
    "A goat sat on a hill and ate the green grass until it was dark.",
    "The small red boat sank.",
]


def random_stories(count, vocabulary=12, seed=5):
    rng = random.Random(seed)
    names = [f"w{i}" for i in range(vocabulary)]
    return [" ".join(rng.choices(names, k=rng.randint(5, 40))) for _ in range(count)]


def longest_by_search(text, stories):
    """The longest run of words of `text` in any story, by trying all of them."""
    own, best = words(text), 0
    haystacks = [f" {' '.join(words(story))} " for story in stories]
    for start in range(len(own)):
        while start + best < len(own) and any(f" {' '.join(own[start : start + best + 1])} " in hay for hay in haystacks):
            best += 1
    return best


def test_the_longest_copied_run_is_found_with_its_story():
    found = Index(STORIES).check("One day THE GOAT sat on a hill, and ate the cake!")
    assert (found.longest, found.run, found.story) == (8, "goat sat on a hill and ate the", 1)
    assert found.words == 12


def test_a_run_does_not_cross_from_one_story_into_the_next():
    text = "it found a golden shell a goat sat on a hill"
    found = Index(STORIES).check(text)
    assert (found.longest, found.run) == (6, "a goat sat on a hill")


def test_a_training_story_itself_is_recognised_whole():
    index = Index(STORIES)
    for number, story in enumerate(STORIES):
        found = index.check(story)
        assert (found.longest, found.story, found.nearest) == (found.words, number, number)
        assert (found.precision, found.recall, found.f1) == (1, 1, 1)


def test_a_text_without_four_words_in_common_copies_nothing():
    index = Index(STORIES)
    for text in ("", "Hi", "the small red", "zebra quartz the small red umbrella", "unknown words only in this text"):
        found = index.check(text)
        assert (found.longest, found.story, found.nearest, found.f1) == (0, None, None, 0)


def test_unknown_words_never_match():
    assert Index(["a b c d"]).check("zig a b c zag zig a b c zag").longest == 0


def test_covered_is_the_share_of_words_inside_long_runs():
    found = Index(STORIES).check("So a goat sat on a hill and ate the green grass, but the small red boat sank.")
    # 11 of 18 words lie in a run of ten or more; the five at the end are too short a run.
    assert found.longest == 11
    assert found.covered == pytest.approx(11 / 18)


def test_rouge_2_by_hand():
    # ab bc cd against ab bc be, each once: two of three in common.
    assert rouge_2("abcd", "abcbe") == pytest.approx((2 / 3, 2 / 4, 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)))
    # Three times aa, but once in the reference.
    assert rouge_2("aaaa", "aa") == pytest.approx((1 / 3, 1, 0.5))
    assert rouge_2("ab", "ba") == rouge_2("", "ab") == (0, 0, 0)


@pytest.mark.parametrize("stride", [1, 3])
def test_runs_agree_with_exhaustive_search(stride):
    stories = random_stories(60)
    index = Index(stories, stride)
    certain = memory.N_WORDS + stride - 1
    seen = set()
    for text in random_stories(80, seed=6):
        found, truth = index.check(text), longest_by_search(text, stories)
        assert found.longest == truth if truth >= certain else found.longest <= truth
        if found.longest:
            assert found.run in " ".join(words(text))
            assert f" {found.run} " in f" {' '.join(index.story(found.story))} "
        seen.add(truth)
    assert len(seen) > 2


def test_the_nearest_story_of_a_changed_copy_is_the_one_that_exhaustive_search_finds():
    stories = [story for story in random_stories(90) if len(story.split()) >= 15]
    index = Index(stories)
    for number, story in enumerate(stories):
        changed = words(story)
        changed[:: memory.N_WORDS + 3] = ["unheard"] * len(changed[:: memory.N_WORDS + 3])
        found = index.check(" ".join(changed))
        scores = [rouge_2(changed, words(other)) for other in stories]
        assert found.nearest == number
        assert (found.precision, found.recall, found.f1) == pytest.approx(max(scores, key=lambda score: score[2]))


def test_hashes_that_collide_do_not_make_a_copy(monkeypatch):
    monkeypatch.setattr(memory, "_hashes", lambda tokens: np.zeros(len(tokens) - memory.N_WORDS + 1, np.uint64))
    index = Index(STORIES)
    assert index.check("The small goat sat on a hill").run == "goat sat on a hill"
    assert index.check("lake lake lake lake").longest == 0


def test_memory_is_what_is_stated():
    stories = random_stories(300)
    index, sparse = Index(stories), Index(stories, stride=4)
    assert index.bytes <= 16 * len(index.tokens) + 8 * len(stories)
    assert sparse.bytes <= (4 + 12 / 4) * len(index.tokens) + 8 * len(stories) + 12


def test_an_index_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no training story"):
        Index(["", "..."])
    with pytest.raises(ValueError, match="stride = 0"):
        Index(STORIES, stride=0)


def test_time_grows_with_the_text_not_with_the_square_of_the_stories():
    """Three thousand stories of a large vocabulary are indexed, and forty texts checked, within seconds."""
    stories = random_stories(3000, vocabulary=2000)
    began = time.perf_counter()
    index = Index(stories)
    for text in stories[:40]:
        assert index.check(text).f1 == 1
    assert time.perf_counter() - began < 20
