"""Bits of stories: every token counted once, by the same rule whatever stands beside it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_core.config import ModelConfig
from blm_core.evaluate import score, story_bits, windows
from blm_core.model import LanguageModel

CPU = torch.device("cpu")
TEXTS = [
    "Pip the hare ran home.",
    'Grandma baked a plum tart.\n"Is it warm?" asked Ivo.',
    "🐌 été",
    "A fox, a box, and a clock. " * 9,
]


@settings(max_examples=300)
@given(length=st.integers(0, 400), seq_len=st.integers(1, 64))
def test_windows_predict_every_token_once_from_at_least_half_a_context(length, seq_len):
    found = windows(length, seq_len)
    scored = [token for _, end, first in found for token in range(first, end)]
    assert scored == list(range(1, length))
    for start, end, first in found:
        assert 0 <= start < first < end
        assert end - start <= seq_len + 1
        assert start == 0 or first - start > seq_len // 2


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = ModelConfig(vocab_size=300, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=16, init_std=0.3)
    return LanguageModel(config, seed=1).eval()


@pytest.fixture(scope="module")
def stories() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 300, size=n).astype(np.uint16) for n in (9, 1, 17, 2, 16, 18, 5, 33, 45)]


@torch.no_grad()
def directly(model: LanguageModel, story: np.ndarray) -> float:
    """Bits of a story token by token, each from the longest context that the rule of the windows gives it."""
    size, bits, start = model.config.seq_len, 0.0, 0
    for position in range(1, len(story)):
        if position - start > size:
            start = position - size // 2 - 1
        context = torch.from_numpy(story[start:position].astype(np.int64))[None]
        bits -= float(model(context)[0, -1].double().log_softmax(-1)[int(story[position])]) / math.log(2)
    return bits


@pytest.mark.parametrize("batch_tokens", [1, 68, 500, 100_000])
def test_bits_do_not_depend_on_batches_which_stay_within_the_tokens_allowed(model, stories, batch_tokens):
    shapes = []

    def logits_of(tokens):
        shapes.append(tokens.shape)
        return model(tokens)

    bits = story_bits(logits_of, stories, 16, CPU, batch_tokens)
    assert bits == pytest.approx([directly(model, story) for story in stories], rel=1e-5)
    assert bits[1] == 0  # nothing behind the first token
    assert story_bits(model, stories[::-1], 16, CPU, batch_tokens)[::-1] == pytest.approx(bits, rel=1e-5)
    assert all(rows * (columns + 1) <= max(batch_tokens, 17) and columns <= 16 for rows, columns in shapes)
    assert story_bits(model, [], 16, CPU).shape == (0,)


@pytest.fixture(scope="module")
def reader(tokenizer) -> LanguageModel:
    config = ModelConfig(len(tokenizer), n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, d_ff=48, seq_len=32, init_std=0.2)
    return LanguageModel(config, seed=1).eval()


def test_a_score_counts_bytes_and_tokens_and_a_guess_costs_the_logarithm_of_the_vocabulary(reader, tokenizer):
    found, bits, sizes = score(reader, tokenizer, TEXTS)
    assert found.stories == 4
    assert sizes.tolist() == [len(text.encode()) for text in TEXTS]
    assert sizes[2] == 4 + 1 + 5  # a snail, a space, three letters of which two have accents
    assert found.bytes == sizes.sum()
    assert found.tokens == sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(bits.sum() / sizes.sum())
    assert found.low < found.bits_per_byte < found.high
    guessing = LanguageModel(reader.config, seed=1)
    torch.nn.init.zeros_(guessing.model["embed_tokens"].weight)
    found, bits, _ = score(guessing, tokenizer, TEXTS)
    assert bits == pytest.approx([math.log2(len(tokenizer)) * len(tokenizer.encode(text)) for text in TEXTS])
    assert found.bits_per_byte == pytest.approx(math.log2(len(tokenizer)) * found.tokens / found.bytes)


def test_each_story_is_scored_from_a_start_token_alone_in_any_number_and_order(reader, tokenizer):
    texts = [f"{text} It was day {day}." for day in range(40) for text in TEXTS[:3]]
    _, bits, _ = score(reader, tokenizer, texts)
    assert bits[[0, 99, 100, 119]] == pytest.approx([score(reader, tokenizer, [texts[i]])[1][0] for i in (0, 99, 100, 119)])
    assert score(reader, tokenizer, texts[::-1])[1][::-1] == pytest.approx(bits)
    assert bits[1] == pytest.approx(directly(reader, np.array([tokenizer.eot, *tokenizer.encode(texts[1])])), rel=1e-5)


def test_a_score_is_close_in_bfloat16_and_not_disturbed_by_dropout(reader, tokenizer):
    exact, rounded = (score(reader, tokenizer, TEXTS, dtype)[0].bits_per_byte for dtype in ("float32", "bfloat16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)
    dropping = LanguageModel(replace(reader.config, dropout=0.3), seed=1)
    assert score(dropping.eval(), tokenizer, TEXTS)[0].bits_per_byte == exact


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_text_without_a_story_is_refused(reader, tokenizer, texts):
    with pytest.raises(ValueError, match="no story to score"):
        score(reader, tokenizer, texts)
