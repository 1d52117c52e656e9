"""Blind ratings: one treatment for all texts, sheets that give nothing away, keys without text."""

import pytest

from blm_core.evidence.blind import (
    ALONE,
    ALONE_ANSWER,
    PAIRS,
    PAIRS_ANSWER,
    RatingsError,
    Text,
    cut,
    in_sheets,
    match_lengths,
    random_pairs,
    treated,
    write_sheets,
)

SENTENCE = "The green kite of Wub went over nine hills again today."  # 11 words


def made(arm: str, n: int, sentences: int) -> list[Text]:
    return [Text(f"{arm}-{i}", arm, " ".join([f"Number {i} is {arm}.", *[SENTENCE] * (sentences + i % 3)])) for i in range(n)]


def test_texts_become_one_line_that_ends_with_a_sentence():
    assert (
        treated("Wub  sang.\n\n\u201cLouder!\u201d said Mr. Ploo.\nThen Mr. Ploo and") == 'Wub sang. "Louder!" said Mr. Ploo.'
    )
    assert treated("no end at all") == "no end at all"


@pytest.mark.parametrize(("limit", "expected"), [(1, "Wub sang."), (5, "Wub sang."), (6, "Wub sang. Ploo slept all day.")])
def test_a_cut_keeps_whole_sentences_within_the_limit_and_at_least_one(limit, expected):
    assert cut("Wub sang. Ploo slept all day. Then it rained.", limit) == expected


def test_no_text_is_longer_than_its_rank_in_the_yardstick():
    long, short = made("ours", 9, 12), made("theirs", 9, 5)
    matched = match_lengths(long, short)
    assert [t.source for t in matched] == [t.source for t in long]
    assert all(a <= b for a, b in zip(sorted(t.n_words for t in matched), sorted(t.n_words for t in short), strict=True))


def test_pairs_have_one_length_and_none_is_short():
    ours, theirs = made("ours", 9, 9), made("theirs", 9, 3)
    pairs = random_pairs(ours, theirs, seed=1)
    assert len(pairs) == 6
    assert min(t.n_words for pair in pairs for t in pair) >= 40
    assert all(abs(a.n_words - b.n_words) <= 11 for a, b in pairs)
    assert len({a.source for a, _ in pairs}) == len(pairs)


def test_repeated_texts_stand_in_two_sheets():
    texts = made("ours", 30, 4)
    sheets = in_sheets(texts, 4, 6, seed=1)
    assert sorted(len(s) for s in sheets)[0] >= 30 // 4
    counts = [sum(t in sheet for sheet in sheets) for t in texts]
    assert counts.count(2) == 6
    assert counts.count(1) == 24


def test_sheets_name_no_arm_and_keys_hold_no_text(tmp_path):
    texts = [Text(f"s{i}", "the hidden arm", f"{SENTENCE} {i}.") for i in range(6)]
    key, tasks = write_sheets(tmp_path, "alone", [texts[:3], texts[3:]], ("r1", "r2"), ALONE, ALONE_ANSWER)
    assert len(tasks) == 4
    assert set(key) == {"alone01", "alone02"}
    sheet = (tmp_path / "alone01-r1.md").read_text()
    assert sheet.count(SENTENCE) == 3
    assert "hidden arm" not in sheet
    assert "s0" not in sheet
    assert str(tmp_path / "answers" / "alone01-r1.jsonl") in sheet
    assert "Wub" not in str(key)
    assert key["alone02"]["alone02-01"]["source"] == "s3"


def test_an_item_twice_in_one_sheet_is_refused(tmp_path):
    text = made("ours", 1, 4)[0]
    with pytest.raises(RatingsError, match="twice"):
        write_sheets(tmp_path, "pairs", [[(text, text), (text, text)]], ("r1",), PAIRS, PAIRS_ANSWER)
