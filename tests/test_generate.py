"""Sampling: the right tokens, the same text by every road, whole characters only."""

from collections import Counter
from itertools import product

import pytest
import torch

from blm_core.config import ConfigError, ModelConfig
from blm_core.generate import Sampling, complete, next_tokens, sample_tokens, stream
from blm_core.model import LanguageModel

GREEDY = Sampling(temperature=0)
STORY = 'Mo saw a slug 🐌. "Hi!" said Mo.\nThe owls 🦉🦉 ate a crêpe.'
PROMPTS = ["Mo", "Mo saw a", 'Mo saw a slug 🐌. "Hi!"']
SHARES = [0.1, 0.5, 0.15, 0.25]  # likeliest first: 1, 3, 2, 0


@pytest.fixture(scope="module")
def wild(tokenizer) -> LanguageModel:
    """Random weights: any token may follow, bytes that are no character among them."""
    config = ModelConfig(len(tokenizer), n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=48, init_std=0.2)
    return LanguageModel(config, seed=3).eval()


@pytest.fixture(scope="module")
def taught(tokenizer) -> LanguageModel:
    """A model that knows STORY by heart, and that it ends."""
    config = ModelConfig(len(tokenizer), n_layers=1, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, seq_len=80)
    model = LanguageModel(config, seed=1)
    tokens = torch.tensor([[tokenizer.eot, *tokenizer.encode(STORY), tokenizer.eot]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    return model.eval()


def new_tokens(model, tokenizer, prompt: str, sampling: Sampling) -> list[int]:
    steps = sample_tokens(model, [[tokenizer.eot, *tokenizer.encode(prompt)]], sampling, tokenizer.eot)
    return [int(step) for step in steps]


def test_tokens_that_are_kept_are_drawn_as_often_as_their_probabilities_say():
    logits = torch.tensor(SHARES).log().expand(20_000, -1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    for (temperature, top_k, top_p), expected in {
        (1.0, 0, 1.0): SHARES,
        (1.0, 99, 1.0): SHARES,
        (1.0, 2, 1.0): (0, 2 / 3, 0, 1 / 3),
        (1.0, 0, 0.01): (0, 1, 0, 0),
        (1.0, 0, 0.7): (0, 2 / 3, 0, 1 / 3),
        (1.0, 0, 0.8): (0, 5 / 9, 1.5 / 9, 2.5 / 9),
        (1.0, 3, 0.8): (0, 2 / 3, 0, 1 / 3),  # of what top_k keeps, tokens 1 and 3 are five sixths
        (0.5, 0, 1.0): (0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345),
        (0.5, 0, 0.7): (0, 1, 0, 0),  # squared and rescaled, token 1 alone has 0.72
        (0.0, 0, 1.0): (0, 1, 0, 0),
    }.items():
        counts = Counter(next_tokens(logits, Sampling(temperature, top_k, top_p), uniform).tolist())
        for token, share in enumerate(expected):
            assert counts[token] / 20_000 == pytest.approx(share, abs=0.015 if share else 0)


@torch.no_grad()
def test_greedy_tokens_behind_the_cache_are_the_argmax_of_computing_everything_again(wild, tokenizer):
    for prompt in ("", "The owl sat on the"):
        found = new_tokens(wild, tokenizer, prompt, GREEDY)
        tokens = [tokenizer.eot, *tokenizer.encode(prompt)]
        for token in found:
            assert token == int(wild(torch.tensor([tokens]))[0, -1].argmax())
            tokens.append(token)
        assert len(tokens) == wild.config.seq_len or tokens[-1] == tokenizer.eot
        assert len(set(found)) > 3


def test_a_text_depends_on_seed_number_and_prompt_and_not_on_batch_or_global_random_state(wild, taught, tokenizer):
    sampling = Sampling(1.2, top_p=0.98)
    for model in (wild, taught):
        ten = complete(model, tokenizer, ["Mo"] * 10, sampling)
        torch.manual_seed(2)
        assert complete(model, tokenizer, ["Mo"], sampling) == ten[:1]
        assert complete(model, tokenizer, ["Mo"], sampling, numbers=[7]) == ten[7:8]
        assert complete(model, tokenizer, ["The owl", "Mo", "It was late. The", "Mo"], sampling)[1::2] == ten[:2]
        assert torch.initial_seed() == 2
    texts = [*complete(wild, tokenizer, ["Mo"] * 10, sampling), *complete(wild, tokenizer, ["Mo"] * 10, Sampling(1.2, seed=5))]
    assert len(set(texts)) == 20


def test_prompts_of_different_lengths_are_completed_as_alone_and_a_story_known_by_heart_to_its_end(wild, taught, tokenizer):
    for model, max_tokens in product((wild, taught), (0, 1, 7)):
        sampling = Sampling(temperature=0, max_tokens=max_tokens)
        alone = [complete(model, tokenizer, [prompt], sampling)[0] for prompt in PROMPTS]
        assert complete(model, tokenizer, PROMPTS[::-1], sampling) == alone[::-1]
    assert complete(taught, tokenizer, PROMPTS, GREEDY) == [STORY.removeprefix(prompt) for prompt in PROMPTS]
    assert new_tokens(taught, tokenizer, "Mo", GREEDY).count(tokenizer.eot) == 1
    assert "\ufffd" not in "|".join(stream(taught, tokenizer, "Mo", GREEDY))  # no character of many bytes is torn


def test_a_stream_is_the_completion_of_the_same_seed_and_as_long_as_max_tokens_says(wild, taught, tokenizer):
    for model, temperature, seed in product((wild, taught), (0, 0.8, 1.5), range(2)):
        everything = new_tokens(model, tokenizer, "Mo", Sampling(temperature, top_p=1.0, seed=seed))
        for max_tokens in (0, 5, 10_000):
            sampling = Sampling(temperature, top_p=1.0, max_tokens=max_tokens, seed=seed)
            assert new_tokens(model, tokenizer, "Mo", sampling) == everything[: max_tokens or None]
            assert ["".join(stream(model, tokenizer, "Mo", sampling))] == complete(model, tokenizer, ["Mo"], sampling)


def test_a_prompt_that_leaves_no_room_and_settings_that_make_no_sense_are_refused(wild, tokenizer):
    prompt = "7" * 48
    while len(tokenizer.encode(prompt)) > wild.config.seq_len - 2:
        prompt = prompt[1:]
    assert len(new_tokens(wild, tokenizer, prompt, GREEDY)) == 1
    with pytest.raises(ValueError, match=r"prompt of 48 tokens .* context of 48"):
        complete(wild, tokenizer, ["Mo", prompt + "7"], GREEDY)
    for name, values in {"temperature": (-0.1, float("nan")), "top_p": (0, 1.1), "top_k": (-1,), "max_tokens": (-1,)}.items():
        for value in values:
            with pytest.raises(ConfigError, match=name):
                Sampling(**{name: value})
