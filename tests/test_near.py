"""Near-duplicates are found exactly: as by comparing every pair."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_core.near import NearDuplicates

FEW_WORDS = st.lists(st.sampled_from("abc"), max_size=14).map(" ".join)


def jaccard(one: str, other: str) -> Fraction:
    """Of the runs of four words; a text of fewer is one run, and one without words is near nothing."""
    words = one.split(), other.split()
    a, b = ({tuple(text[i : i + 4]) for i in range(max(1, len(text) - 3))} for text in words)
    return Fraction(len(a & b), len(a | b)) if all(words) else Fraction(0)


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
    for words in (text.split() for text in texts * 3):
        for i in rng.sample(range(len(words)), rng.randrange(0, 14)):
            words[i] = rng.choice(vocabulary)
        asked.append(" ".join(words[rng.randrange(0, len(words) // 3) :]))
    found = answers(texts, asked, threshold)
    assert 10 < sum(found) < len(found)  # both answers were called for
