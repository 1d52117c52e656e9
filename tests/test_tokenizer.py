"""The vocabulary: any text comes back unchanged, and none can produce the end of a text."""

from itertools import product

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blm_core import END_OF_TEXT
from blm_core.tokenizer import Tokenizer, TokenizerError, train

STORIES = [
    f'{name} found a {colour} {thing} by the lake.\n"Look," said {name}, "this {thing} is {colour} and 12 years old!"'
    for name, colour, thing in product(
        ("Mina", "Tobi", "Oskar", "Ruth"), ("red", "blue", "green", "yellow"), ("kite", "boat", "drum", "shell", "lamp")
    )
]


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Tokenizer:
    return train(STORIES, tmp_path_factory.mktemp("vocabulary") / "tokenizer.model", 300)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["\u2581", END_OF_TEXT, " ", "\n", "\0", "\r", "\t", "🐢", "e\u0301", "<unk>", "<0x41>", "kite", "\ufffd"])
).map("".join)


@settings(max_examples=300)
@given(text=ANY_TEXT)
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
    with pytest.raises(UnicodeEncodeError, match="position 7"):
        learned.encode("a boat \udfff there")


def test_learning_twice_from_the_same_stories_writes_the_same_file(learned, tmp_path):
    assert train(iter(STORIES), tmp_path / "again.model", 300).hash == learned.hash
    assert train(STORIES, tmp_path / "other.model", 299).hash != learned.hash


def test_a_vocabulary_that_the_stories_do_not_yield_is_refused_with_the_bound(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(TokenizerError, match="280 pieces cannot be learned from these stories: at least 291"):
        train(STORIES, path, 280)
    with pytest.raises(TokenizerError, match=r"4096 pieces cannot be learned from these stories: at most \d+$") as refused:
        train(STORIES, path, 4096)
    assert not path.exists()
    most = int(str(refused.value).split()[-1])
    assert len(train(STORIES, path, most)) == most


def test_a_file_that_is_no_vocabulary_or_of_another_make_is_refused_by_name(tmp_path):
    for content in (b"", b"this is no model"):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(TokenizerError, match=r"broken\.model is not a sentencepiece model"):
            Tokenizer(tmp_path / "broken.model")
    stories, other = iter(STORIES), str(tmp_path / "other")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=stories, model_prefix=other, vocab_size=40, minloglevel=2)
    with pytest.raises(TokenizerError, match=r"other\.model has no control symbol"):
        Tokenizer(tmp_path / "other.model")
