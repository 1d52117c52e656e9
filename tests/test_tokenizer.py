"""The vocabulary: any text comes back unchanged, and none can produce the end of a text."""

import re
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blm_core import END_OF_TEXT, config
from blm_core.tokenizer import Tokenizer, TokenizerError, sweep, train

STORIES = [
    f'{name} found a {colour} {thing} by the lake.\n"Look," said {name}, "this {thing} is {colour} and 12 years old!"'
    for name, colour, thing in product(
        ("Mina", "Tobi", "Oskar", "Ruth"), ("red", "blue", "green", "yellow"), ("kite", "boat", "drum", "shell", "lamp")
    )
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def learned(request, tmp_path_factory) -> Tokenizer:
    return train(STORIES, tmp_path_factory.mktemp("vocabulary") / "tokenizer.model", 300, request.param)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["\u2581", END_OF_TEXT, " ", "\n", "\0", "\r", "\t", "🐢", "e\u0301", "<unk>", "<0x41>", "kite", "\ufffd"])
).map("".join)


@settings(max_examples=300)
@given(text=ANY_TEXT)
@example(text="")
@example(text="  two before, two after  ")
@example(text=f"\n\n{END_OF_TEXT}\n")
@example(text="\u2581\u2581 \u2581")
@example(text="\0\x01\x1b\x7f\x85\u2028\ufeff")
@example(text="👩‍👩‍👧 \U0010ffff")
def test_any_text_survives_encoding_and_decoding_and_never_yields_the_end_of_text(learned, text):
    tokens = learned.encode(text)
    assert learned.decode(tokens) == text
    assert set(tokens) <= set(range(len(learned))) - {learned.eot}


def test_newline_end_of_text_and_torn_characters_have_tokens_of_their_own(learned):
    (newline,) = learned.encode("\n")
    assert learned.encode("kite\n\nboat").count(newline) == 2
    assert learned.piece(learned.eot) == END_OF_TEXT
    assert learned.decode([learned.eot, *learned.encode("a kite"), learned.eot]) == "a kite"
    assert set(learned.decode(learned.encode("🐢")[:2])) == {"\ufffd"}


@pytest.mark.parametrize(("text", "position"), [("\ud800", 0), ("a boat \udfff there", 7)])
def test_half_a_surrogate_pair_is_refused_with_its_position(learned, text, position):
    with pytest.raises(TokenizerError, match=f"position {position}"):
        learned.encode(text)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_learning_twice_from_the_same_stories_writes_the_same_file(tmp_path, model_type):
    first, second = (train(iter(STORIES), tmp_path / name, 300, model_type) for name in ("a.model", "b.model"))
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.hash == second.hash != train(STORIES, tmp_path / "c.model", 299, model_type).hash


@pytest.mark.parametrize(
    ("stories", "vocab_size"), [(STORIES, 5000), (STORIES, 260), ([], 300)], ids=["too many", "too few", "no story"]
)
def test_a_vocabulary_that_the_stories_do_not_yield_is_refused_and_writes_nothing(tmp_path, stories, vocab_size):
    with pytest.raises(TokenizerError, match=f"{vocab_size} pieces"):
        train(stories, tmp_path / "tokenizer.model", vocab_size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_sweep_leaves_out_what_few_stories_cannot_yield_and_says_why(tmp_path, model_type):
    learned, left_out = sweep(STORIES, (280, 295, 300, *config.PRESETS["a100"].tokenizer.sweep), tmp_path, model_type)
    assert [len(vocabulary) for vocabulary in learned] == [295, 300]
    assert list(left_out) == [280, *config.PRESETS["a100"].tokenizer.sweep]
    assert left_out[280] == "at least 291 pieces"
    most = int(re.fullmatch("at most (\\d+) pieces", left_out[32_768])[1])
    assert len(train(STORIES, tmp_path / "most.model", most, model_type)) == most
    with pytest.raises(TokenizerError, match="300 pieces"):
        sweep([], (300,), tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"this is no model", b"\x0a\xff\xff\xff"])
def test_a_file_that_is_no_vocabulary_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"broken\.model"):
        Tokenizer(path)


def test_a_sentencepiece_vocabulary_of_another_make_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORIES), model_prefix=str(tmp_path / "other"), vocab_size=40, minloglevel=2
    )
    with pytest.raises(TokenizerError, match=r"other\.model has no control symbol"):
        Tokenizer(tmp_path / "other.model")
