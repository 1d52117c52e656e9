"""Near-duplicates are found exactly: as by comparing every pair."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_core.near import NearDuplicates, shingles

FEW_WORDS = st.lists(st.sampled_from("abc"), max_size=14).map(" ".join)


def runs(text: str) -> set[tuple]:
    words = text.split()
    return {tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3))} if words else set()


def jaccard(one: str, other: str) -> Fraction:
    a, b = runs(one), runs(other)
    return Fraction(len(a & b), len(a | b)) if a and b else Fraction(0)


def answers(texts: list[str], asked: list[str], threshold: float) -> list[bool]:
    """Whether each text asked has a match, which must be one that comparing every pair finds."""
    index, found = NearDuplicates(texts, threshold), []
    for text in asked:
        near = {i for i, other in enumerate(texts) if jaccard(text, other) >= Fraction(threshold)}
        match = index.match(text)
        assert match in near if near else match is None
        found.append(bool(near))
    return found


@settings(deadline=None)
@given(st.lists(FEW_WORDS, max_size=6), st.lists(FEW_WORDS, min_size=1, max_size=6), st.integers(1, 64))
def test_a_match_is_found_exactly_where_comparing_every_pair_finds_one(texts, asked, threshold):
    answers(texts, asked, threshold / 64)  # a binary fraction: its products are exact


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.75])
def test_long_texts_with_some_words_changed_are_judged_as_by_comparing_every_pair(threshold):
    rng = random.Random(threshold)
    vocabulary = [f"w{i}" for i in range(300)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randrange(30, 200))) for _ in range(40)]
    asked = []
    for text in texts * 3:
        words = text.split()
        for i in rng.sample(range(len(words)), rng.randrange(0, 14)):
            words[i] = rng.choice(vocabulary)
        asked.append(" ".join(words[rng.randrange(0, len(words) // 3) :]))
    found = answers(texts, asked, threshold)
    assert 10 < sum(found) < len(found)  # both answers were called for


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.55, 0.7, 0.9])
def test_a_threshold_that_binary_fractions_only_approximate_loses_no_clear_match(threshold):
    words = [f"w{i}" for i in range(103)]  # 100 runs of four words
    index = NearDuplicates([" ".join(words)], threshold)
    for shared in range(1, 101):
        text = " ".join(words[: shared + 3])  # its runs are a part of the others: Jaccard is shared / 100
        if abs(shared / 100 - threshold) > 1e-9:
            assert (index.match(text) is not None) == (shared / 100 > threshold)


@pytest.mark.parametrize("text", ["sun", "the sun", "the sun set"])
def test_a_text_of_fewer_than_four_words_is_one_run_and_one_without_words_is_near_nothing(text):
    assert len(shingles(text)) == 1
    index = NearDuplicates([text, "the sun set late", "...", ""], 0.1)
    assert index.match(text) == 0
    for other in (f"{text} again and again", "...", ""):
        assert index.match(other) is None
