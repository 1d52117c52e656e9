"""Sampling: the right tokens, the same text by every road, whole characters only."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from blm_core.config import ConfigError, ModelConfig
from blm_core.generate import Sampling, complete, next_tokens, sample_tokens, stream
from blm_core.model import LanguageModel
from blm_core.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)
LEARNED = [
    'Mo saw a slug 🐌. "Hi!" said Mo.',
    "Ana drew a 🦔 and a crêpe.\nShe ate one.",
    "It was late. The owl 🦉🦉 slept.",
]
PROMPTS = ["Mo", "Ana drew a", "It was late. The"]


@pytest.fixture(scope="module")
def wild(tokenizer) -> LanguageModel:
    """Random weights: any token may follow, bytes that are no character among them."""
    config = ModelConfig(len(tokenizer), n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=48, init_std=0.2)
    return LanguageModel(config, seed=3).eval()


@pytest.fixture(scope="module")
def taught(tokenizer) -> LanguageModel:
    """A model that knows the stories in LEARNED by heart, and that they end."""
    config = ModelConfig(len(tokenizer), n_layers=1, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, seq_len=64)
    model = LanguageModel(config, seed=1)
    rows = [torch.tensor([tokenizer.eot, *tokenizer.encode(story), tokenizer.eot]) for story in LEARNED]
    targets = torch.nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
    inputs = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True, padding_value=tokenizer.eot)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def new_tokens(model: LanguageModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> list[int]:
    steps = sample_tokens(model, [[tokenizer.eot, *tokenizer.encode(prompt)]], sampling, tokenizer.eot)
    return [int(step) for step in steps]


SHARES = torch.tensor([0.1, 0.5, 0.15, 0.25])  # likeliest first: 1, 3, 2, 0


def drawn(count: int = 4000, **settings) -> Counter:
    logits = SHARES.log().expand(count, -1)
    tokens = next_tokens(logits, Sampling(**settings), torch.rand(count, generator=torch.Generator().manual_seed(1)))
    return Counter(tokens.tolist())


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {1, 3, 2}),
        ({"top_k": 4}, {0, 1, 2, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.45}, {1}),
        ({"top_p": 0.7}, {1, 3}),
        ({"top_p": 0.8}, {1, 3, 2}),
        ({"top_p": 0.95}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.8}, {1, 3}),  # of what top_k keeps, tokens 1 and 3 are five sixths
        ({"top_p": 0.7, "temperature": 0.5}, {1}),  # squared and rescaled, token 1 alone has 0.72
        ({"temperature": 0}, {1}),
    ],
    ids=str,
)
def test_top_k_top_p_and_temperature_leave_the_right_tokens(settings, kept):
    assert set(drawn(**({"temperature": 1.0, "top_p": 1.0} | settings))) == kept


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_p": 1.0}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_k": 2, "top_p": 1.0}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"temperature": 0.5, "top_p": 1.0}, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(settings, expected):
    counts = drawn(20_000, **({"temperature": 1.0} | settings))
    assert [counts[token] / 20_000 for token in range(4)] == pytest.approx(expected, abs=0.015)


def test_each_row_is_drawn_from_its_own_logits():
    logits = F.one_hot(torch.tensor([2, 0, 1]), 4) * 100.0
    assert next_tokens(logits, Sampling(), torch.rand(3)).tolist() == [2, 0, 1]


@pytest.mark.parametrize("prompt", ["", "Mo", "The owl sat on the"])
@torch.no_grad()
def test_greedy_tokens_are_the_argmax_of_computing_everything_again(wild, tokenizer, prompt):
    found = new_tokens(wild, tokenizer, prompt, GREEDY)
    tokens = [tokenizer.eot, *tokenizer.encode(prompt)]
    for token in found:
        assert token == int(wild(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) == wild.config.seq_len or tokens[-1] == tokenizer.eot
    assert len(set(found)) > 3


def test_keeping_one_token_is_greedy_at_any_temperature(wild, tokenizer):
    greedy = complete(wild, tokenizer, PROMPTS, GREEDY)
    assert complete(wild, tokenizer, PROMPTS, Sampling(temperature=3.0, top_k=1)) == greedy


def test_the_same_seed_gives_the_same_texts_and_another_seed_others(wild, tokenizer):
    first, again, other = (complete(wild, tokenizer, PROMPTS, Sampling(1.0, seed=seed)) for seed in (5, 5, 6))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_sampling_neither_reads_nor_moves_the_global_random_state(wild, tokenizer):
    torch.manual_seed(1)
    first, state = complete(wild, tokenizer, ["Mo"], Sampling(1.0)), torch.get_rng_state()
    torch.manual_seed(2)
    assert complete(wild, tokenizer, ["Mo"], Sampling(1.0)) == first
    torch.manual_seed(1)
    assert torch.get_rng_state().equal(state)


def test_completions_of_one_prompt_in_a_batch_differ(wild, tokenizer):
    assert len(set(complete(wild, tokenizer, ["Mo"] * 5, Sampling(1.0)))) == 5


def test_a_text_depends_on_seed_number_and_prompt_and_not_on_the_batch(wild, taught, tokenizer):
    sampling = Sampling(1.2, top_p=0.98)
    for model in (wild, taught):
        ten = complete(model, tokenizer, ["Mo"] * 10, sampling)
        assert complete(model, tokenizer, ["Mo"] * 8, sampling) == ten[:8]
        assert complete(model, tokenizer, ["Mo"], sampling) == ten[:1]
        assert complete(model, tokenizer, ["Ana drew a", "Mo", "It was late. The", "Mo"], sampling)[1::2] == ten[:2]


@pytest.mark.parametrize("max_tokens", [0, 1, 7])
def test_prompts_of_different_lengths_are_completed_in_a_batch_as_alone(wild, taught, tokenizer, max_tokens):
    sampling = Sampling(temperature=0, max_tokens=max_tokens)
    for model in (wild, taught):
        alone = [complete(model, tokenizer, [prompt], sampling)[0] for prompt in PROMPTS]
        assert complete(model, tokenizer, PROMPTS, sampling) == alone
        assert complete(model, tokenizer, PROMPTS[::-1], sampling) == alone[::-1]


def test_no_prompt_has_no_completion(wild, tokenizer):
    assert complete(wild, tokenizer, [], GREEDY) == []


def test_a_story_known_by_heart_is_written_to_its_end_and_not_beyond(taught, tokenizer):
    whole = [story.removeprefix(prompt) for story, prompt in zip(LEARNED, PROMPTS, strict=True)]
    assert complete(taught, tokenizer, PROMPTS, GREEDY) == whole
    assert ["".join(stream(taught, tokenizer, prompt, GREEDY)) for prompt in PROMPTS] == whole
    for prompt in PROMPTS:
        tokens = new_tokens(taught, tokenizer, prompt, GREEDY)
        assert tokens.count(tokenizer.eot) == 1
        assert tokens[-1] == tokenizer.eot


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_max_tokens_is_the_number_of_new_tokens(wild, tokenizer, temperature):
    everything = new_tokens(wild, tokenizer, "Mo", Sampling(temperature))
    assert tokenizer.eot not in everything[:20]
    for max_tokens in (1, 2, 20):
        assert new_tokens(wild, tokenizer, "Mo", Sampling(temperature, max_tokens=max_tokens)) == everything[:max_tokens]
    assert new_tokens(wild, tokenizer, "Mo", Sampling(temperature, max_tokens=10_000)) == everything


@pytest.mark.parametrize("temperature", [0, 0.8, 1.5])
def test_a_stream_is_exactly_the_completion_of_the_same_seed(wild, taught, tokenizer, temperature):
    for model in (wild, taught):
        for seed in range(3):
            for max_tokens in (0, 5):
                sampling = Sampling(temperature, top_p=1.0, max_tokens=max_tokens, seed=seed)
                parts = list(stream(model, tokenizer, "Mo", sampling))
                assert ["".join(parts)] == complete(model, tokenizer, ["Mo"], sampling)
                assert all(parts)


def test_characters_of_many_bytes_are_never_torn(taught, tokenizer):
    for prompt, animal in zip(PROMPTS, ("🐌", "🦔", "🦉"), strict=True):
        assert len(tokenizer.encode(animal)) > 1
        parts = list(stream(taught, tokenizer, prompt, GREEDY))
        assert any(animal in part for part in parts)
        assert not any("\ufffd" in part for part in parts)
        assert len(parts) > 5


def test_what_is_left_of_a_torn_character_is_shown_at_the_end(taught, tokenizer):
    before = len(tokenizer.encode(" saw a slug ")) + 2  # two of the four bytes of a snail
    sampling = Sampling(temperature=0, max_tokens=before)
    (whole,) = complete(taught, tokenizer, ["Mo"], sampling)
    assert whole.startswith(" saw a slug \ufffd")
    assert "".join(stream(taught, tokenizer, "Mo", sampling)) == whole


def test_a_prompt_that_leaves_no_room_in_the_context_is_refused(wild, tokenizer):
    tokens, prompt = wild.config.seq_len, ""
    while len(tokenizer.encode(prompt)) < tokens - 2:
        prompt += "7"
    assert len(new_tokens(wild, tokenizer, prompt, GREEDY)) == 1
    for write in (lambda p: complete(wild, tokenizer, ["Mo", p], GREEDY), lambda p: list(stream(wild, tokenizer, p, GREEDY))):
        with pytest.raises(ValueError, match=r"prompt of 48 tokens .* context of 48"):
            write(prompt + "7")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"max_tokens": -1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_by_name(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Sampling(**settings)
