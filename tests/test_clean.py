"""Cleaning: what is repaired, what is dropped and why, and by what a story is known."""

# ruff: noqa: RUF001 (characters that are easily confused are the matter here)

import hashlib
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blm_core import clean

STORY = "A mole dug a tunnel under the road. It came up in a garden full of carrots, and there it stayed until the snow fell."
TYPOGRAPHIC = "‘’‚“”„–—…éèñüçïÀÅ"


def misread(text: str) -> str:
    """UTF-8 taken for Windows-1252, by a reader that passes the five bytes without a meaning through."""
    return "".join(bytes([b]).decode("cp1252") if b not in b"\x81\x8d\x8f\x90\x9d" else chr(b) for b in text.encode())


@settings(deadline=None)
@given(st.text(alphabet=TYPOGRAPHIC + "ab .,!\n", max_size=40))
@example(TYPOGRAPHIC)
def test_a_misread_text_ends_as_the_text_itself_would(text):
    wanted = clean.tidy_white_space(clean.fold(text)).replace(" \n", "\n")
    assert wanted.isascii()
    assert clean.normalise(misread(text)) == wanted


def test_repairs_are_named_and_what_the_official_files_hold_is_left_as_it_is():
    assert clean.repair("â€œCome in!â€ said the owl.") == ('"Come in!" said the owl.', ["mojibake repaired"])
    assert clean.repair("Donâ€™t  go, naïve one.") == ("Don't go, naive one.", list(clean.REPAIRS))
    text = "“Don’t go—now,” she said. \nIt was 5 – 6 o’clock. ‘Why?’"
    assert clean.repair(text) == (text, [])
    assert clean.story_key(text) == clean.story_key(clean.normalise(text))
    assert clean.reason_to_drop(text, 10) is None


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("‘It’s’ ‚low‛ ′ ´ `", "'It's' 'low' ' ' '"),
        ("“Hi” „low‟ «far» ″", '"Hi" "low" "far" "'),
        ("well‐known ‑ ‒ −", "well-known - - -"),
        ("far—away – and ― on", "far - away - and - on"),
        ("so … in\u200bvis\u00adible\ufeff", "so ... invisible"),
        ("ﬁne Ａ ½ `é", "fine A 1/2 'e"),
        ("a small﹘dash", "a small - dash"),  # decomposes into a dash
        ("日本 naïve", "日本 naive"),
        (
            " one \t two\u00a0three\x0bfour\u2028five\r\nsix\rseven\n\n \n\neight\n",
            "one two three four five\nsix\nseven\neight",
        ),
        (" \n\t\n ", ""),
    ],
)
def test_typography_and_white_space_are_folded_and_other_scripts_are_left_alone(found, wanted):
    assert clean.normalise(found) == wanted


@settings(deadline=None)
@given(
    st.text(alphabet=st.sampled_from(TYPOGRAPHIC + "`´ \t\n\r\u00a0\u200b﹘½â€œ™ÃÂ©.ab")) | st.text(), st.sampled_from(".!?")
)
def test_what_is_kept_is_printable_and_no_second_cleaning_changes_it(text, end):
    story, _ = clean.repair(text + end)
    if clean.reason_to_drop(story, 1) is None:
        assert re.fullmatch(rf"[\x21-\x7e{clean.KEPT}]+( ?[ \n][\x21-\x7e{clean.KEPT}]+)*", story)
        assert clean.repair(story) == (story, [])
        assert re.fullmatch(r"[\x21-\x7e]+([ \n][\x21-\x7e]+)*", clean.normalise(story))


@pytest.mark.parametrize(
    ("story", "reason"),
    [
        *(("x" * 99 + end, None) for end in (".", "!", "?", '."', "!'", '?")', ".”", "...")),
        *(("x" * 100 + end, "cut off") for end in ("", ",", '"', ". And", ';"')),
        ("\u200b \n\u00a0", "empty"),
        ("x" * 98 + ".", "too short"),
        *((STORY + end, "foreign characters") for end in ("\x00", "крот.", "🥕.", "\ud83e.")),
    ],
)
def test_a_story_is_dropped_for_the_reason_that_fits(story, reason):
    assert clean.reason_to_drop(clean.repair(story)[0], 100) == reason


WORDS = st.lists(st.from_regex(r"[a-z0-9]{1,6}('[a-z]{1,2})?", fullmatch=True), min_size=1, max_size=12)
GAP = st.text(alphabet=' \n\t.,!?;:-"()', min_size=1, max_size=4)


@settings(deadline=None)
@given(WORDS, GAP)
def test_a_story_is_known_by_its_words_whatever_its_case_punctuation_and_white_space(words, gap):
    told = gap + gap.join(word.upper() if i % 2 else word for i, word in enumerate(words)) + gap
    assert clean.words(told) == words
    assert clean.story_key(told) != clean.story_key(" ".join([*words, "a"]))
    assert f"{clean.story_key(told):016x}" == hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]  # on every machine


def test_the_share_asked_for_is_held_out_and_a_larger_share_only_adds_to_it():
    keys = [clean.story_key(f"story {i}") for i in range(20_000)]
    small, large = ({key for key in keys if clean.is_held_out(key, share)} for share in (0.01, 0.1))
    assert (len(small), len(large)) == (pytest.approx(200, abs=60), pytest.approx(2000, abs=180))  # four standard deviations
    assert small < large
