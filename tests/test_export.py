"""The model's folder in transformers: the same ids, the same text."""

import itertools

import pytest

from blm_core import END_OF_TEXT, data
from blm_core.checkpoint import save_model
from blm_core.config import ModelConfig
from blm_core.model import LanguageModel
from blm_core.tokenizer import train

TEXTS = [
    "  Two spaces,\n\na blank line \u2026 and a tab\t.",
    "\U0001f43b \x00 \u65e5\u672c\u8a9e e\u0301 \u202e",
    "121212 kites and 3 boats",
    "<unk> <0x41> <|endoftext",
    "\n",
    " ",
    "",
]


@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(vocab_size=len(tokenizer), n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, seq_len=64)
    save_model(folder, LanguageModel(config, seed=1), tokenizer)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_has_the_ids_that_our_vocabulary_gives(loaded, tokenizer, text):
    assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert loaded.decode(tokenizer.encode(text)) == text


def test_real_stories_have_the_same_ids_behind_the_start_token(smoke, loaded, tokenizer):
    for story in itertools.islice(data.read_split(smoke.folder / "data", "train"), 50):
        assert loaded(story)["input_ids"] == [tokenizer.eot, *tokenizer.encode(story)]


def test_the_end_of_text_is_known_as_start_and_end(loaded, tokenizer):
    assert loaded.bos_token_id == loaded.eos_token_id == tokenizer.eot
    assert loaded(END_OF_TEXT, add_special_tokens=False)["input_ids"] == [tokenizer.eot]


def test_a_unigram_vocabulary_is_told_from_a_bpe(smoke, tokenizer, tmp_path):
    stories = data.read_split(smoke.folder / "data", "train")
    assert tokenizer.is_bpe
    assert not train(stories, tmp_path / "unigram.model", 512, "unigram").is_bpe
