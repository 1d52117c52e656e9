"""What a text is like, each measure on cases computed by hand."""

import math

import numpy as np
import pytest

from blm_core.evaluate import Interval
from blm_core.evidence import text_measures as tm

STORIES = ["A cat sat.", "A cat ran. Cat, cat!", "A dog ran."]


def test_a_child_knows_words_of_many_stories_not_words_said_often():
    assert tm.child_vocabulary(STORIES, minimum=2) == {"a", "cat", "ran"}
    assert tm.child_vocabulary(STORIES, minimum=3) == {"a"}


def test_known_share_ignores_case_and_curly_apostrophes():
    assert tm.known_share("A CAT didn\u2019t purr", frozenset({"a", "cat", "didn't"})) == 0.75
    assert math.isnan(tm.known_share("...", frozenset()))


@pytest.mark.parametrize(
    ("word", "count"),
    [
        *[(word, 1) for word in ("the", "cat", "played", "named", "makes", "house", "tree", "who", "hmm")],
        *[(word, 2) for word in ("little", "wanted", "happy", "boxes", "story", "apple")],
        *[(word, 3) for word in ("banana", "together", "animal")],
    ],
)
def test_syllables_of_common_words(word, count):
    assert tm.syllables(word) == count


def test_reading_grade_is_that_of_flesch_and_kincaid():
    # Seven words in two sentences, ten syllables.
    assert tm.reading_grade("The cat wanted a banana. It ran.") == pytest.approx(0.39 * 7 / 2 + 11.8 * 10 / 7 - 15.59)
    assert tm.reading_grade("The cat sat on the mat.") == pytest.approx(0.39 * 6 + 11.8 - 15.59)
    assert math.isnan(tm.reading_grade("!"))


def test_dialogue_is_what_stands_between_double_quotes():
    assert tm.dialogue_share('"Come in," said the cat. "Now!"') == pytest.approx(3 / 6)
    assert tm.dialogue_share("\u201cCome in,\u201d said the cat.") == pytest.approx(2 / 5)
    assert tm.dialogue_share("It's the cat's.") == 0


def test_speech_that_is_not_closed_ends_with_its_line():
    assert tm.dialogue_share('"Come in\nThe cat sat.') == pytest.approx(2 / 5)


def test_distinct_n_by_hand():
    text = "the cat and the cat and the dog"
    assert tm.distinct(text, 1) == pytest.approx(4 / 8)
    assert tm.distinct(text, 2) == pytest.approx(4 / 7)
    assert tm.distinct(text, 3) == pytest.approx(4 / 6)
    assert tm.distinct(text, 1, length=4) == pytest.approx(3 / 4)


def test_repeated_4grams_by_hand():
    # Runs of four: the cat and the, cat and the cat, and the cat and, the cat and the, cat and the dog.
    assert tm.repeated_4grams("the cat and the cat and the dog") == pytest.approx(1 / 5)
    assert tm.repeated_4grams("one two three four five") == 0


def test_texts_shorter_than_the_common_length_are_not_compared():
    assert math.isnan(tm.distinct("one two three", 1, length=4))
    assert math.isnan(tm.repeated_4grams("one two three"))


def test_self_bleu_of_equal_texts_is_one_and_of_unlike_ones_nearly_nothing():
    same = "a b c d e"
    assert tm.self_bleu([same, same, same]) == pytest.approx([1, 1, 1])
    unlike = tm.self_bleu(["a b c d e", "f g h i j"])
    # 0.1 of 5, 4, 3 and 2 n-grams match.
    assert unlike == pytest.approx([(0.1**4 / (5 * 4 * 3 * 2)) ** 0.25] * 2)


def test_self_bleu_clips_by_the_best_single_other_text():
    texts = ["a a a b", "a c", "a a d"]
    # One word: a thrice, but no other text has it more than twice; b nowhere: 2 / 4. Two words: aa twice, once
    # elsewhere, ab nowhere: 1 / 3. The closest length is 3, shorter than 4, so there is no penalty.
    assert tm.self_bleu(texts, n=2)[0] == pytest.approx(math.sqrt(2 / 4 * 1 / 3))


def test_self_bleu_penalises_texts_shorter_than_their_closest_neighbour():
    # "a b" against "a b c d": both precisions are 1, exp(1 - 4 / 2) is the penalty.
    assert tm.self_bleu(["a b", "a b c d"], n=2)[0] == pytest.approx(math.exp(-1))


def test_self_bleu_leaves_out_texts_shorter_than_the_common_length():
    values = tm.self_bleu(["a b c d e f", "a b", "a b c d g h"], length=4)
    assert values[[0, 2]] == pytest.approx([1, 1])
    assert math.isnan(values[1])
    assert np.isnan(tm.self_bleu(["a b c d"])).all()


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("It slept.", 1),
        ('"Sleep!"', 1),
        ("It slept.\n", 1),
        ("\u201cSleep?\u201d", 1),
        ("It slept", 0),
        ("It slept,", 0),
        ("", 0),
    ],
)
def test_a_story_ends_with_closing_punctuation(text, closed):
    assert tm.ends(text) == closed


def test_names_stand_capitalised_inside_a_sentence_and_never_in_lower_case():
    text = "Then Mia met Otto. They saw The Bear. Mom, Dad and I met the bear. Birds sang."
    assert tm.names(text) == {"Mia", "Otto", "Dad"}


def test_names_kept_from_the_first_to_the_last_third():
    text = "One day Mia met Otto and Ann. They ran. They sat. They ate. Otto slept. So did Mia."
    assert tm.names_kept(text) == pytest.approx(2 / 3)
    assert math.isnan(tm.names_kept("A cat met a dog. They ran. They sat."))
    assert math.isnan(tm.names_kept("Here is Mia. So is Mia."))


def test_names_of_a_prompt_are_looked_for_at_the_end_of_what_follows():
    prompt = "There was a boy called Otto. Ann was his friend."
    assert tm.names_kept("He ran. Then Ann sat. It rained. They ate. He slept. So Ann left.", prompt) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("word", "form"),
    [
        *(("jump", form) for form in ("jump", "jumps", "jumped", "jumping")),
        *(("carry", form) for form in ("carries", "carried", "carrying")),
        *(("bake", form) for form in ("bakes", "baked", "baking")),
        *(("stop", form) for form in ("stops", "stopped", "stopping")),
        *(("happy", form) for form in ("happier", "happiest", "happily")),
        *(("box", "boxes"), ("play", "played"), ("big", "biggest"), ("quick", "quickly")),
    ],
)
def test_regular_forms_count_as_the_word(word, form):
    assert form in tm.inflections(word)


def test_required_words_used():
    assert tm.required_used("He baked; they were STOPPING.", ["bake", "stop", "run", "he"]) == pytest.approx(3 / 4)
    assert tm.required_used("The rung broke.", ["run"]) == 0
    assert math.isnan(tm.required_used("He ran.", []))


def test_measure_gives_every_measure_for_every_text():
    texts = ["A cat ran. " * 40, "Short.", 'A dog said, "No." ' * 30]
    found = tm.measure(texts, tm.child_vocabulary(STORIES, 2), required=[["cat"], ["cat"], ["cat"]], length=20)
    assert all(values.shape == (3,) for values in found.values())
    assert found["required words"].tolist() == [1, 0, 0]
    assert np.isnan(found["distinct-1"]).tolist() == np.isnan(found["self-BLEU"]).tolist() == [False, True, False]
    assert found["distinct-1"][0] == 3 / 20
    assert found["dialogue"][2] == 1 / 4
    assert "required words" not in tm.measure(texts, frozenset())
    with pytest.raises(ValueError, match="1 beginnings for 3 texts"):
        tm.measure(texts, frozenset(), beginnings=[""])


def test_self_bleu_takes_only_so_many_texts():
    texts = [f"the cat number {i} sat on a mat" for i in range(6)]
    found = tm.measure(texts, frozenset(), length=5, self_bleu_texts=4)["self-BLEU"]
    assert found[:4] == pytest.approx(tm.self_bleu(texts[:4], length=5))
    assert np.isnan(found[4:]).all()


def test_distance_is_in_deviations_of_the_real_stories():
    real = {"a": np.array([1.0, 2.0, 3.0, np.nan]), "b": np.ones(4), "c": np.ones(4)}
    found = tm.distance({"a": np.array([4.0, 6.0, np.nan]), "b": np.zeros(3), "d": np.ones(3)}, real)
    interval, texts = found["a"]
    assert (interval.value, texts) == (pytest.approx((5 - 2) / 1), 2)
    assert (interval.low, interval.high) == (2, 4)
    assert math.isnan(found["b"][0].value)  # real stories do not vary
    assert set(found) == {"a", "b"}
    assert tm.distance({"a": real["a"]}, real)["a"][0].value == 0


def test_summary_says_on_how_many_texts_a_measure_is_defined():
    found = tm.summary({"a": np.array([1.0, 3.0, np.nan]), "b": np.full(3, np.nan)})
    assert (found["a"][0].value, found["a"][1]) == (2, 2)
    assert math.isnan(found["b"][0].value)
    assert found["b"][1] == 0


def test_one_source_is_clearly_nearer_only_where_the_whole_intervals_are_apart():
    def found(*intervals):
        return {f"m{i}": (Interval(*interval), 9) for i, interval in enumerate(intervals)}

    ours = found((0.1, -0.2, 0.4), (-2.0, -2.5, -1.5), (1.0, 0.5, 1.5), (0.0, -0.1, 0.1), (0.3, 0.2, 0.4))
    theirs = found((-1.0, -1.5, -0.5), (0.5, 0.2, 0.9), (-1.2, -1.6, -0.8), (math.nan,) * 3)
    assert tm.set_against(ours, theirs) == {"nearer": 1, "farther": 1, "undecided": 1}
