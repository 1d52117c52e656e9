"""Bits of stories: every token counted once, by the same rule whatever stands beside it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_core.config import ModelConfig
from blm_core.evaluate import score, story_bits, windows
from blm_core.model import LanguageModel

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
    assert [token for _, end, first in found for token in range(first, end)] == list(range(1, length))
    for start, end, first in found:
        assert 0 <= start < first < end <= start + seq_len + 1
        assert start == 0 or first - start > seq_len // 2


@pytest.fixture(scope="module")
def model(tokenizer) -> LanguageModel:
    config = ModelConfig(len(tokenizer), n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=16, init_std=0.3)
    return LanguageModel(config, seed=1).eval()


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
def test_bits_do_not_depend_on_batches_which_stay_within_the_tokens_allowed(model, batch_tokens):
    rng, shapes = np.random.default_rng(1), []
    stories = [rng.integers(0, 300, size=n).astype(np.uint16) for n in (9, 1, 17, 2, 16, 18, 5, 33, 45)]

    def logits_of(tokens):
        shapes.append(tokens.shape)
        return model(tokens)

    bits = story_bits(logits_of, stories, 16, model.device, batch_tokens)
    assert bits == pytest.approx([directly(model, story) for story in stories], rel=1e-5)
    assert bits[1] == 0  # nothing behind the first token
    assert story_bits(model, stories[::-1], 16, model.device, batch_tokens)[::-1] == pytest.approx(bits, rel=1e-5)
    assert all(rows * (columns + 1) <= max(batch_tokens, 17) and columns <= 16 for rows, columns in shapes)


def test_a_score_counts_bytes_and_tokens_and_a_guess_costs_the_logarithm_of_the_vocabulary(model, tokenizer):
    found, bits, sizes = score(model, tokenizer, TEXTS)
    assert sizes.tolist() == [len(text.encode()) for text in TEXTS]
    assert sizes[2] == 4 + 1 + 5  # a snail, a space, three letters of which two have accents
    assert found[:3] == (4, sizes.sum(), sum(len(tokenizer.encode(text)) for text in TEXTS))
    assert found.bits_per_byte == pytest.approx(bits.sum() / sizes.sum())
    assert found.low < found.bits_per_byte < found.high
    guessing = LanguageModel(model.config, seed=1)
    torch.nn.init.zeros_(guessing.model["embed_tokens"].weight)
    _, bits, _ = score(guessing, tokenizer, TEXTS)
    assert bits == pytest.approx([math.log2(len(tokenizer)) * len(tokenizer.encode(text)) for text in TEXTS])


def test_each_story_is_scored_from_a_start_token_alone_in_any_number_and_order(model, tokenizer):
    texts = [f"{text} It was day {day}." for day in range(40) for text in TEXTS[:3]]
    bits = score(model, tokenizer, texts)[1]
    assert score(model, tokenizer, texts[::-1])[1][::-1] == pytest.approx(bits)
    for i in (0, 99, 100, 119):
        assert bits[i] == pytest.approx(directly(model, np.array([tokenizer.eot, *tokenizer.encode(texts[i])])), rel=1e-5)
    with pytest.raises(ValueError, match="no story to score"):
        score(model, tokenizer, ["", ""])
