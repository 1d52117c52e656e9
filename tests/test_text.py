"""What a text is like, what it copies, and endings: on cases computed by hand and against exhaustive search."""

import math
import random

import numpy as np
import pytest
from tiny_models import save_gpt2

from blm_core.data import read_split
from blm_core.evaluate import Interval
from blm_core.evidence import text as t
from blm_core.evidence.models import load
from blm_core.evidence.text import EndingItem, copied, sentences


@pytest.fixture(scope="module")
def stories(smoke):
    return list(read_split(smoke.folder / "data", "validation"))


# ---- Likeness


def test_sentences_end_where_a_reader_would_end_them():
    for expected in (
        ['"Look! A hen," said Odo. ', "He ran."],
        ['"Stop!" Odo cried. ', "The fox sat!"],
        ['"Stop!" ', "Odo ran away."],
        ["\u201cNo. Not now,\u201d she said. ", "Then she slept."],
        ["Mr. Fox met Mrs. Hen. ", "They sang."],
        ["He waited... ", "Nothing came?! ", "No."],
        ['"It never closes. So\n', "the next line does."],
        ["It cost 3.50 in all."],
    ):
        assert sentences("".join(expected)) == expected


def test_measures_by_hand_are_nan_where_a_text_cannot_have_them():
    # Words of the list are easy in all regular forms, and names do not count.
    forms = {"carry": "carried", "bake": "baking", "stop": "stopped", "happy": "happily", "box": "boxes", "big": "biggest"}
    assert all(form in t.inflections(word) for word, form in forms.items())
    assert t.easy_share("The cats jumped, and Zlatko ran") == 1
    assert t.easy_share("The CATS jumped over legislation") == pytest.approx(4 / 5)
    assert t.dialogue_share('"Come in," said the cat. \u201cNow!\u201d') == pytest.approx(3 / 6)
    assert t.dialogue_share('"Come in\nThe cat sat.') == pytest.approx(2 / 5)  # speech ends with its line
    assert t.distinct_pairs("the cat and the cat and the dog sat", 8) == pytest.approx(4 / 7)
    assert t.names("Then Mia met Otto. They saw The Bear. Mom, Dad and I met the bear. Birds sang.") == {"Mia", "Otto", "Dad"}
    text = "One day Mia met Otto and Ann. They ran. They sat. They ate. Otto slept. So did Mia."
    assert t.names_kept(text) == pytest.approx(2 / 3)
    assert math.isnan(t.names_kept("A cat met a dog. They ran. They sat."))
    found = t.measure(["A cat ran. " * 40, "...", 'A dog said, "No." ' * 30], length=20)
    assert found["reading grade"][0] == pytest.approx(0.39 * 3 + 11.8 - 15.59)  # of Flesch and Kincaid
    assert found["dialogue"][2] == 1 / 4
    assert all(np.isnan(values).tolist() in ([False, True, False], [True] * 3) for values in found.values())


def test_distance_is_in_deviations_of_the_real_stories_and_compared_by_whole_intervals():
    real = {"a": np.array([1.0, 2.0, 3.0, np.nan])}
    assert t.distance({"a": np.array([4.0, 6.0, np.nan])}, real)["a"] == (pytest.approx(3), 2, 4)
    ours = [(0.1, -0.2, 0.4), (-2.0, -2.5, -1.5), (1.0, 0.5, 1.5), (0.3, 0.2, 0.4)]
    theirs = [(-1.0, -1.5, -0.5), (0.5, 0.2, 0.9), (-1.2, -1.6, -0.8), (math.nan,) * 3]
    ours, theirs = ({str(i): Interval(*ends) for i, ends in enumerate(of)} for of in (ours, theirs))
    assert (t.clearly_nearer(ours, theirs), t.clearly_nearer(theirs, ours)) == (["0"], ["1"])


# ---- Copying


def test_the_longest_run_is_found_and_does_not_cross_from_one_story_into_the_next():
    told = ["The red boat went over the lake. It found a golden shell.", "A goat sat on a hill and ate the grass.", "It sank."]
    texts = ["One day THE GOAT sat on a hill, and ate the cake!", "it found a golden shell a goat sat on a hill"]
    assert copied(texts, told) == [8, 6]
    assert copied(told, told) == [12, 10, 0]
    assert copied(["", "the red boat", "zebra the red boat umbrella", "zig zag zig zag zig zag"], told) == [0] * 4


def test_runs_agree_with_exhaustive_search():
    rng = random.Random(5)
    stories = [" ".join(rng.choices("abcdefghijkl", k=rng.randint(5, 40))) for _ in range(140)]
    told, texts = "\n".join(stories[:60]), stories[60:]
    for found, text in zip(copied(texts, stories[:60]), map(str.split, texts), strict=True):
        longest = max(n for n in range(len(text) + 1) for i in range(len(text) - n + 1) if " ".join(text[i : i + n]) in told)
        assert found == (longest if longest >= t.N_WORDS else 0)


def test_a_sample_has_the_stated_size_and_every_story_about_the_same_chance():
    assert t.sample("abc", 100) == (["a", "b", "c"], 3)
    kept, read = t.sample(range(20_000), 1000)
    assert (len(set(kept)), read) == (1000, 20_000)
    assert np.histogram(kept, 4, (0, 20_000))[0] == pytest.approx(250, abs=50)


# ---- Endings


def test_wrong_endings_come_from_other_stories_and_are_about_as_long(stories):
    items = t.ending_items(stories)
    assert len(items) > 10
    assert t.ending_items(stories, limit=5) == items[:5]
    assert len({item.truth for item in items}) > 1
    lasts = [sentences(story)[-1].strip() for story in stories]
    for item in items:
        endings = [ending.strip() for ending in item.endings]
        true = endings[item.truth]
        assert any(story.strip().startswith(item.beginning + item.endings[item.truth]) for story in stories)
        assert len(set(endings)) == 4
        assert set(endings) - {true} <= set(lasts)
        assert all(abs(len(ending) - len(true)) <= t.LENGTH_TOLERANCE * len(true) for ending in endings)
    # A story without a telling ending yields nothing, and "The end." is left off.
    base = [f"A goose sat here. Then goose number {word} swam away. The end." for word in ("one", "two", "six", "ten")]
    items = t.ending_items(["Only one long sentence stands here.", "A goose sat. It slept.", *base])
    assert [item.endings[item.truth] for item in items[:2]] == [f" Then goose number {n} swam away." for n in ("one", "two")]
    assert len(items) == 4


def test_the_rule_of_names_a_choice_that_is_shared_where_scores_tie_and_scores_per_byte(stories, tmp_path):
    endings = [" So they went home.", " And Mia hugged Otto.", " And Zoe hugged Mia.", " And Zoe ran."]
    assert t.shared_names([EndingItem("One day Mia met Otto.", endings, 1)]).tolist() == [[0, 2, 0, -1]]
    scores = np.array([[-1, -2, -3, -4], [-1, -2, -3, -4], [-1, -1, -2, -2], [-1, -1, -1, -1]])
    items = [EndingItem("", endings, truth) for truth in (0, 1, 1, 2)]
    assert t.chosen_rightly(scores, items).tolist() == [1.0, 0.0, 0.5, 0.25]
    # A model's score is per byte of the ending.
    gpt2, items = load(save_gpt2(tmp_path / "gpt2"), "cpu"), t.ending_items(stories, limit=3)
    beginning, ending = items[1].beginning, items[1].endings[2]
    before, whole = gpt2.story_bits([beginning, beginning + ending])
    assert t.ending_scores(gpt2, items)[1, 2] == pytest.approx((before - whole) / len(ending.encode()), rel=1e-4)
