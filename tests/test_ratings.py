"""What is concluded from ratings, on cases computed by hand or printed in textbooks."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from blm_core.evidence import ratings
from blm_core.evidence.ratings import ELO, Rating, RatingsError, bradley_terry, cohens_kappa, krippendorff_alpha

MARKS = {"grammar": 5, "creativity": 5, "consistency": 5, "plot": 5, "age": "6-7"}
# Four observers and twelve units, some gaps (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, part C).
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
UNITS = [[value for value in unit if value is not None] for unit in zip(*OBSERVERS, strict=True)]


def rating(prompt, preferred, first="blm", second="rival", rater="reader", number=0, ours=5, theirs=5):
    """`ours` and `theirs` are the plot marks of the models named first and second."""
    return Rating(
        id=f"{prompt}-{first}-{second}-{number}",
        pair=f"{prompt}-{'-'.join(sorted((first, second)))}-{number}",
        prompt=prompt,
        rater=rater,
        first=first,
        second=second,
        first_marks=MARKS | {"plot": ours},
        second_marks=MARKS | {"plot": theirs},
        preferred=preferred,
    )


def test_ratings_survive_writing_and_reading(tmp_path):
    given = [rating("p", "first"), rating("p", "tie", "rival", "blm")]
    ratings.write_ratings(tmp_path / "r.jsonl", given)
    assert ratings.read_ratings(tmp_path / "r.jsonl") == given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preferred": "blm"}, "record 2: preferred is 'blm'"),
        ({"first_marks": MARKS | {"plot": 12}}, "record 2: a.plot is 12"),
        ({"mood": "good"}, "record 2: not a rating with the fields id, pair, prompt"),
    ],
)
def test_a_record_that_is_no_rating_is_named(tmp_path, change, message):
    records = [asdict(rating("p", "first")), asdict(rating("q", "first")) | change]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(RatingsError, match=message):
        ratings.read_ratings(tmp_path / "r.jsonl")


def test_a_file_given_twice_is_noticed(tmp_path):
    ratings.write_ratings(tmp_path / "r.jsonl", [rating("p", "first")])
    with pytest.raises(RatingsError, match="rated twice by the same rater: p-blm-rival-0"):
        ratings.read_ratings(tmp_path / "r.jsonl", tmp_path / "r.jsonl")


def test_win_rate_counts_a_tie_half_and_weighs_prompts_alike():
    given = [
        *(rating("often", "first", number=i) for i in range(8)),  # eight wins on one prompt
        rating("other", "first", "rival", "blm"),  # a loss: the rival stood first
        rating("third", "tie"),
    ]
    found = ratings.win_rate(given, "blm", "rival")
    assert [found[name] for name in ("wins", "ties", "losses", "prompts")] == [8, 1, 1, 3]
    assert found["rate"].value == pytest.approx((1 + 0 + 0.5) / 3)
    assert (found["rate"].low, found["rate"].high) == (0, 1)
    assert ratings.win_rate(given, "rival", "blm")["rate"].value == pytest.approx(0.5)


def test_both_orders_of_a_prompt_are_drawn_together():
    """Twice the ratings of the same prompts are no more evidence: the interval stays as wide."""
    once = [rating(f"p{i}", "first" if i % 3 else "second") for i in range(30)]
    twice = once + [rating(f"p{i}", "second" if i % 3 else "first", "rival", "blm") for i in range(30)]
    assert ratings.win_rate(once, "blm", "rival")["rate"] == ratings.win_rate(twice, "blm", "rival")["rate"]


def test_models_that_were_not_compared_are_named():
    with pytest.raises(RatingsError, match="no rating compares blm and other; the models rated are blm, rival"):
        ratings.win_rate([rating("p", "first")], "blm", "other")


def test_marks_are_paired_whichever_text_came_first():
    given = [rating("p", "first", ours=8, theirs=5), rating("q", "second", "rival", "blm", ours=4, theirs=5)]
    found = ratings.mark_differences(given, "blm", "rival")
    assert found["plot"].value == pytest.approx((3 + 1) / 2)
    assert found["grammar"] == (0, 0, 0)
    assert ratings.mark_differences(given, "rival", "blm")["plot"].value == pytest.approx(-2)
    means = ratings.mean_marks(given)
    assert (means["blm"]["plot"].value, means["rival"]["plot"].value) == (6.5, 4.5)


def test_ages_are_counted_by_model():
    found = ratings.ages([rating("p", "first"), rating("q", "first", "rival", "blm")])
    assert found["blm"]["6-7"] == found["rival"]["6-7"] == 2
    assert sum(found["blm"].values()) == 2


def test_bradley_terry_finds_strengths_that_the_results_follow_exactly():
    """Strengths 4, 2, 1: 4 of 6 games, 4 of 5 and 2 of 3 are won, as the model expects, so it is the best fit."""
    wins = np.array([[[0, 4, 4], [2, 0, 2], [1, 1, 0]]], dtype=float)
    found = bradley_terry(wins)[0]
    assert found - found[2] == pytest.approx([math.log(4), math.log(2), 0], abs=1e-6)
    assert found.mean() == pytest.approx(0)


def test_two_models_differ_by_the_odds_on_the_elo_scale():
    strengths = bradley_terry(np.array([[[0.0, 10.0], [1.0, 0.0]]]))[0]
    assert ELO * (strengths[0] - strengths[1]) == pytest.approx(400, abs=1e-3)
    given = [rating(f"w{i}", "first") for i in range(10)] + [rating("l", "second")]
    found = ratings.elo(given, "rival", prior=0.5)
    assert found["blm"].value == pytest.approx(ELO * math.log(10.5 / 1.5), abs=1e-3)
    assert found["blm"].low < found["blm"].value < found["blm"].high
    assert found["rival"] == (0, 0, 0)


def test_elo_joins_models_through_a_third_and_counts_ties_as_half():
    given = [rating(f"a{i}", "first") for i in range(3)] + [rating("b", "second")]  # blm 3 : 1 rival
    given += [rating(f"c{i}", "tie", "rival", "peer") for i in range(4)]  # rival 2 : 2 peer
    found = ratings.elo(given, "peer", prior=0.5, resamples=50)
    assert found["rival"].value == pytest.approx(0, abs=1e-3)
    assert found["blm"].value == pytest.approx(ELO * math.log(3.5 / 1.5), abs=1e-3)


def test_a_model_that_never_lost_has_a_finite_strength_only_with_a_prior():
    given = [rating(f"p{i}", "first") for i in range(20)]
    found = ratings.elo(given, "rival", resamples=100)["blm"]
    assert found.value == pytest.approx(ELO * math.log(20.5 / 0.5), abs=1e-3)
    with pytest.raises(RatingsError, match="needs a prior"):
        bradley_terry(np.array([[[0.0, 5.0], [0.0, 0.0]]]))


def test_models_without_a_common_scale_and_unknown_ones_are_refused():
    given = [rating("p", "first"), rating("q", "first", "peer", "other")]
    with pytest.raises(RatingsError, match="no pair connects"):
        ratings.elo(given, "blm")
    with pytest.raises(RatingsError, match="nobody was not rated"):
        ratings.elo(given, "nobody")


def test_a_rater_who_always_takes_the_first_is_found_out():
    given = [r for i in range(12) for r in (rating(f"p{i}", "first"), rating(f"p{i}", "first", "rival", "blm"))]
    assert ratings.position_bias(given) == (1, 1, 1)
    assert ratings.order_agreement(given)["share"] == (0, 0, 0)
    assert ratings.win_rate(given, "blm", "rival")["rate"].value == 0.5


def test_order_agreement_by_hand():
    """Four pairs in both orders: blm-blm, rival-rival, tie-tie, blm-rival; one pair in one order says nothing."""
    given = [
        *(rating("a", "first"), rating("a", "second", "rival", "blm")),
        *(rating("b", "second"), rating("b", "first", "rival", "blm")),
        *(rating("c", "tie"), rating("c", "tie", "rival", "blm")),
        *(rating("d", "first"), rating("d", "first", "rival", "blm")),
        rating("e", "first"),
    ]
    found = ratings.order_agreement(given)
    assert (found["share"].value, found["pairs"]) == (0.75, 4)
    # One order: blm, rival, tie, blm; the other: blm, rival, tie, rival. Chance: (2 * 1 + 1 * 2 + 1 * 1) / 16.
    assert found["kappa"] == pytest.approx((3 / 4 - 5 / 16) / (1 - 5 / 16))
    with pytest.raises(RatingsError, match="both orders"):
        ratings.order_agreement([rating("e", "first"), rating("e", "first", "rival", "blm", rater="another")])


def test_cohens_kappa_on_the_textbooks_table():
    """20 times both yes, 15 both no, 5 and 10 mixed: observed 0.7, chance 0.5, kappa 0.4."""
    table = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    assert cohens_kappa(*zip(*table, strict=True)) == pytest.approx(0.4)
    assert math.isnan(cohens_kappa(["a", "a"], ["a", "a"]))
    with pytest.raises(RatingsError, match="the same items"):
        cohens_kappa(["a"], ["a", "b"])


def test_krippendorffs_alpha_on_its_authors_example():
    assert krippendorff_alpha(UNITS) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(UNITS, "interval") == pytest.approx(0.849, abs=5e-4)


def test_krippendorffs_alpha_by_hand():
    """Units aa, ab, bb: 4 of 6 pairable values agree; alpha = 1 - 5 * (1 + 1) / (2 * 3 * 3)."""
    assert krippendorff_alpha(["aa", "ab", "bb", "a"]) == pytest.approx(1 - 5 * 2 / 18)
    assert math.isnan(krippendorff_alpha(["aa", "aa"]))
    with pytest.raises(RatingsError, match="no unit has two values"):
        krippendorff_alpha(["a", "b"])
    with pytest.raises(ValueError, match="nominal"):
        krippendorff_alpha(["aa"], "ordinal")


def test_rater_agreement_gathers_all_raters():
    outcomes = ["first", "first", "second", "tie", "second", "first"]
    one = [rating(f"p{i}", outcome, ours=i, rater="one") for i, outcome in enumerate(outcomes)]
    same = [rating(f"p{i}", outcome, ours=i, rater="two") for i, outcome in enumerate(outcomes)]
    found = ratings.rater_agreement(one + same)
    assert found["preferred"].value == found["plot"].value == 1
    assert math.isnan(found["grammar"].value)  # all marks are equal
    other = [rating(f"p{i}", outcome, ours=i, rater="two") for i, outcome in enumerate(outcomes[::-1])]
    found = ratings.rater_agreement(one + other)
    winner = {"first": "blm", "second": "rival", "tie": "tie"}
    units = [[winner[a], winner[b]] for a, b in zip(outcomes, outcomes[::-1], strict=True)]
    assert found["preferred"].value == pytest.approx(krippendorff_alpha(units))
    assert found["preferred"].low < found["preferred"].value < found["preferred"].high
    with pytest.raises(RatingsError, match="two raters"):
        ratings.rater_agreement(one)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        given = [rating(f"p{i}", "first" if win else "second") for i, win in enumerate(rng.random(40) < 0.7)]
        low, high = ratings.elo(given, "rival", prior=1e-9, resamples=300, seed=trial)["blm"][1:]
        hits += low <= ELO * math.log(0.7 / 0.3) <= high
    assert 180 <= hits <= 199
