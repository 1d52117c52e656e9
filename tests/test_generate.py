"""Sampling: the right tokens, the same text by every road, whole characters only."""

from collections import Counter
from itertools import product

import pytest
import torch

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


SHARES = [0.1, 0.5, 0.15, 0.25]  # likeliest first: 1, 3, 2, 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, SHARES),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 99}, SHARES),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        ({"top_p": 0.7}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"top_p": 0.95}, SHARES),
        ({"top_k": 3, "top_p": 0.8}, [0, 2 / 3, 0, 1 / 3]),  # of what top_k keeps, tokens 1 and 3 are five sixths
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),  # squared and rescaled, token 1 alone has 0.72
        ({"temperature": 0}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_tokens_that_are_kept_are_drawn_as_often_as_their_probabilities_say(settings, expected):
    logits = torch.tensor(SHARES).log().expand(20_000, -1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    counts = Counter(next_tokens(logits, Sampling(**({"temperature": 1.0, "top_p": 1.0} | settings)), uniform).tolist())
    for token, share in enumerate(expected):
        assert counts[token] / 20_000 == pytest.approx(share, abs=0.015 if share else 0)


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


def test_the_same_seed_gives_the_same_texts_whatever_the_global_random_state_which_stays_as_it_is(wild, tokenizer):
    torch.manual_seed(1)
    first, state = complete(wild, tokenizer, PROMPTS, Sampling(1.0, seed=5)), torch.get_rng_state()
    torch.manual_seed(2)
    assert complete(wild, tokenizer, PROMPTS, Sampling(1.0, seed=5)) == first
    torch.manual_seed(1)
    assert torch.get_rng_state().equal(state)
    other = complete(wild, tokenizer, PROMPTS, Sampling(1.0, seed=6))
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert complete(wild, tokenizer, [], GREEDY) == []


def test_a_text_depends_on_seed_number_and_prompt_and_not_on_the_batch(wild, taught, tokenizer):
    sampling = Sampling(1.2, top_p=0.98)
    for model in (wild, taught):
        ten = complete(model, tokenizer, ["Mo"] * 10, sampling)
        assert model is taught or len(set(ten)) == 10
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
    for model, seed, max_tokens in product((wild, taught), range(3), (0, 5)):
        sampling = Sampling(temperature, top_p=1.0, max_tokens=max_tokens, seed=seed)
        parts = list(stream(model, tokenizer, "Mo", sampling))
        assert ["".join(parts)] == complete(model, tokenizer, ["Mo"], sampling)
        assert all(parts)


def test_characters_of_many_bytes_are_torn_only_where_the_text_ends_within_one(taught, tokenizer):
    for prompt, animal in zip(PROMPTS, ("🐌", "🦔", "🦉"), strict=True):
        parts = list(stream(taught, tokenizer, prompt, GREEDY))
        assert len(tokenizer.encode(animal)) > 1
        assert any(animal in part for part in parts)
        assert not any("\ufffd" in part for part in parts)
    sampling = Sampling(temperature=0, max_tokens=len(tokenizer.encode(" saw a slug ")) + 2)  # two of a snail's four bytes
    (whole,) = complete(taught, tokenizer, ["Mo"], sampling)
    assert whole.startswith(" saw a slug \ufffd")
    assert "".join(stream(taught, tokenizer, "Mo", sampling)) == whole


def test_a_prompt_that_leaves_no_room_in_the_context_is_refused(wild, tokenizer):
    prompt = "7" * 48
    while len(tokenizer.encode(prompt)) > wild.config.seq_len - 2:
        prompt = prompt[1:]
    assert len(new_tokens(wild, tokenizer, prompt, GREEDY)) == 1
    for write in (lambda p: complete(wild, tokenizer, ["Mo", p], GREEDY), lambda p: list(stream(wild, tokenizer, p, GREEDY))):
        with pytest.raises(ValueError, match=r"prompt of 48 tokens .* context of 48"):
            write(prompt + "7")


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    [("temperature", (-0.1, NAN, INFINITE)), ("top_p", (0, 1.1, NAN)), ("top_k", (-1,)), ("max_tokens", (-1,))],
)
def test_settings_that_make_no_sense_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=name):
            Sampling(**{name: value})
