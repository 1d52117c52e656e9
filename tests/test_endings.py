import numpy as np
import pytest
from tiny_models import save_blm, save_gpt2

from blm_core.clean import words
from blm_core.data import read_split
from blm_core.evidence.compare import BLM, TransformersModel
from blm_core.evidence.endings import (
    LENGTH_TOLERANCE,
    chosen_rightly,
    ending_items,
    ending_line,
    ending_scores,
    fitted,
    order_line,
    sentences,
    shuffled,
)


@pytest.fixture(scope="session")
def stories(smoke):
    return list(read_split(smoke.folder / "data", "validation"))


@pytest.fixture(scope="session")
def blm(tmp_path_factory, tokenizer):
    return BLM(save_blm(tmp_path_factory.mktemp("models") / "blm", tokenizer), "cpu")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    return TransformersModel(str(save_gpt2(tmp_path_factory.mktemp("models") / "gpt2-tiny", seq_len=256)), "cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The hen ran. The fox sat!", ["The hen ran. ", "The fox sat!"]),
        ('"Look! A hen," said Odo. He ran.', ['"Look! A hen," said Odo. ', "He ran."]),
        ('"Stop!" cried Odo. He ran.', ['"Stop!" cried Odo. ', "He ran."]),
        ('"Stop!" Odo cried. He ran.', ['"Stop!" Odo cried. ', "He ran."]),
        ('"Stop!" Odo ran away.', ['"Stop!" ', "Odo ran away."]),
        ('Odo said, "I am here." He sat.', ['Odo said, "I am here." ', "He sat."]),
        ("\u201cNo. Not now,\u201d she said. Then she slept.", ["\u201cNo. Not now,\u201d she said. ", "Then she slept."]),
        ("Mr. Fox met Mrs. Hen. They sang.", ["Mr. Fox met Mrs. Hen. ", "They sang."]),
        ("He waited... Nothing came?! No.", ["He waited... ", "Nothing came?! ", "No."]),
        ('"It never closes. So\nthe next line does.', ['"It never closes. So\n', "the next line does."]),
        ("One.\n\nTwo without an end", ["One.\n\n", "Two without an end"]),
        ("It cost 3.50 in all.", ["It cost 3.50 in all."]),
        ("", []),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text, expected):
    assert sentences(text) == expected


def test_sentences_joined_are_the_text_again(stories):
    assert all("".join(sentences(story)) == story for story in stories)


def test_the_true_ending_is_the_last_sentence_and_the_wrong_ones_come_from_other_stories(stories):
    items, _ = ending_items(stories)
    assert len(items) > 10
    lasts = [sentences(story)[-1].strip() for story in stories]
    for item in items:
        assert stories[item.story].strip().startswith(item.beginning + item.endings[item.truth])
        wrong = [ending for i, ending in enumerate(item.endings) if i != item.truth]
        assert {ending.strip() for ending in wrong} <= {last for i, last in enumerate(lasts) if i != item.story}
        assert len({" ".join(words(ending)) for ending in item.endings}) == 4


def test_wrong_endings_are_about_as_long_as_the_true_one_and_stand_behind_the_same_space(stories):
    for item in ending_items(stories)[0]:
        true = item.endings[item.truth]
        size = len(true.strip().encode())
        gap = true[: len(true) - len(true.lstrip())]
        for ending in item.endings:
            assert abs(len(ending.strip().encode()) - size) <= LENGTH_TOLERANCE * size
            assert ending.startswith(gap)
            assert not ending[len(gap)].isspace()


def test_the_place_of_the_true_ending_says_nothing_and_a_seed_repeats_the_items(stories):
    items, _ = ending_items(stories)
    assert {item.truth for seed in range(5) for item in ending_items(stories, seed)[0]} == {0, 1, 2, 3}
    assert ending_items(stories)[0] == items
    assert ending_items(stories, seed=1)[0] != items
    assert ending_items(stories, limit=5)[0] == items[:5]


def test_stories_without_a_telling_ending_are_counted_and_the_end_is_left_off():
    base = [f"A goose sat here. Then goose number {word} swam away. The end." for word in ("one", "two", "six", "ten")]
    items, left_out = ending_items([*base, "Only one long sentence stands here.", "A goose sat. It slept."])
    assert [item.story for item in items] == [0, 1, 2, 3]
    assert items[0].endings[items[0].truth] == " Then goose number one swam away."
    assert left_out == {"no ending of four words": 2, "no other endings of that length": 0}
    assert ending_items([*base[:3], base[0].upper()])[1]["no other endings of that length"] == 4


def test_endings_are_scored_per_byte_behind_their_own_story(gpt2, stories):
    items, _ = fitted(ending_items(stories, limit=3)[0], [gpt2])
    scores = ending_scores(gpt2, items)
    assert scores.shape == (3, 4)
    item, ending = items[1], items[1].endings[2]
    assert scores[1, 2] == pytest.approx(gpt2.logprob([item.beginning], [ending])[0] / len(ending.encode()), abs=1e-5)


def test_a_choice_is_right_where_the_truth_is_likeliest_and_shared_where_it_is_tied():
    scores = [[-1, -2, -3, -4], [-1, -2, -3, -4], [-1, -1, -2, -2], [-1, -1, -1, -1]]
    assert chosen_rightly(scores, [0, 1, 1, 2]).tolist() == [1.0, 0.0, 0.5, 0.25]


def test_a_beginning_too_long_for_a_model_loses_whole_sentences_from_its_front(blm, gpt2, stories):
    items, _ = ending_items(stories)
    short, shortened = fitted(items, [blm, gpt2])
    assert shortened > 0
    for before, after in zip(items, short, strict=True):
        assert before.beginning.endswith(after.beginning)
        assert (after.endings, after.truth, after.story) == (before.endings, before.truth, before.story)
        assert all(model.fits(after.beginning + ending) for model in (blm, gpt2) for ending in after.endings)
    assert fitted(short, [blm, gpt2]) == (short, 0)


def test_a_shuffled_story_has_the_same_sentences_in_another_order(stories):
    texts, kept = shuffled(stories)
    assert kept
    for text, i in zip(texts, kept, strict=True):
        assert text != stories[i].strip()
        assert sorted(text) == sorted(stories[i].strip())
    assert shuffled(stories)[0] == texts
    assert shuffled(["One goose sat."]) == ([], [])


def test_models_that_know_nothing_choose_at_chance_and_neither_wins_against_itself(blm, gpt2, stories):
    line = ending_line(stories, blm, gpt2)
    assert line["items"] + sum(line["left_out"].values()) == len(stories)
    assert line["chance"] == 0.25
    assert line["ours"].low <= 0.5
    same = ending_line(stories, blm, blm, limit=8)
    assert same["difference"] == (0, 0, 0)
    assert same["verdict"] == "undecided"
    assert ending_line(stories, blm, limit=8)["verdict"] == "not run"


def test_the_order_line_counts_stories_whose_true_order_needs_fewer_bits(gpt2, stories):
    line = order_line(stories, gpt2, limit=6)
    texts, kept = shuffled(stories)
    straight = gpt2.story_bits([stories[i].strip() for i in kept[:6]])
    mixed = gpt2.story_bits(texts[:6])
    assert line["ours"].value == np.mean(straight < mixed)
    sizes = sum(len(text.encode()) for text in texts[:6])
    assert line["bits"]["ours"].value == pytest.approx((mixed - straight).sum() / sizes, abs=1e-4)
    assert line["items"] == 6
    assert order_line(stories, gpt2, gpt2, limit=6)["verdict"] == "undecided"


def test_stories_that_give_nothing_to_choose_are_refused(gpt2):
    with pytest.raises(ValueError, match="none of 1 stories"):
        ending_line(["One goose sat."], gpt2)
    with pytest.raises(ValueError, match="none of 1 stories"):
        order_line(["One goose sat."], gpt2)
