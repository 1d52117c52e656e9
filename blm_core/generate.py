"""Sample stories: key/value cache, batches of prompts, temperature, top-k and top-p.

- A text depends on the seed, its number among the samples of one prompt, and the prompt; not on the rest of the batch.
- A token is drawn from a shortlist of the likeliest where that holds all that top-p keeps: sorting the vocabulary would take
  longer than the model does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from blm_core.config import ConfigError
from blm_core.files import text_sha256
from blm_core.model import KeyValueCache, LanguageModel
from blm_core.tokenizer import Tokenizer

SHORTLIST = 128  # tokens; a trained model seldom needs more to reach top-p


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    max_tokens: int = 0  # new tokens; 0 fills the model's context
    seed: int = 1

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature = {self.temperature} must be a number that is not negative.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} must be above 0 and at most 1.")
        if self.top_k < 0 or self.max_tokens < 0:
            raise ConfigError(f"top_k = {self.top_k} and max_tokens = {self.max_tokens} must not be negative.")


def sample_numbers(prompts: list) -> list[int]:
    """The number of each sample: how many equal prompts stand before it."""
    return [prompts[:i].count(prompt) for i, prompt in enumerate(prompts)]


def uniforms(prompts: list[list[int]], numbers: list[int], seed: int, length: int) -> Tensor:
    """Random numbers in [0, 1) that decide the tokens at all positions, (B, length).

    Each row has a generator of its own, seeded with `seed`, the sample's number and its prompt, whatever the batch and device.
    """
    rows = []
    for prompt, number in zip(prompts, numbers, strict=True):
        own = int(text_sha256(f"{seed} {number} {prompt}")[:14], 16)  # a generator takes seeds of 64 bits
        rows.append(torch.rand(length, generator=torch.Generator().manual_seed(own)))
    return torch.stack(rows)


def next_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Draw one token per row of `logits` (B, V) with the random numbers `uniform` (B,); (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    size = min(sampling.top_k or SHORTLIST, logits.shape[-1])
    kept, tokens = logits.topk(size)  # from the likeliest on
    whole = (kept if sampling.top_k else logits).logsumexp(-1, keepdim=True)
    probabilities = (kept - whole).exp()
    if not sampling.top_k and (probabilities.sum(-1) < sampling.top_p).any():  # too short a list
        kept, tokens = logits.sort(-1, descending=True)
        probabilities = (kept - whole).exp()
    before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens
    probabilities[before >= sampling.top_p] = 0
    ends = probabilities.double().cumsum(-1)
    at = torch.searchsorted(ends, uniform[:, None].double() * ends[:, -1:], right=True)
    return tokens.gather(-1, at).squeeze(-1)


@torch.inference_mode()
def sample_tokens(
    model: LanguageModel, prompts: list[list[int]], sampling: Sampling, eot: int, numbers: list[int] | None = None
) -> Iterator[Tensor]:
    """Yield the sequences' next tokens (B,) one step at a time, until all have ended or the context is full.

    `prompts` begin with the start token and may differ in length: the shortest sets the first step, and a longer prompt
    is read on while others already write. A sequence that has ended goes on yielding `eot`. `numbers` are those of the
    samples, where they are not counted from 0 for each prompt.
    Raises ValueError for a prompt that leaves no room in the context.
    """
    device, seq_len, lengths = model.device, model.config.seq_len, [len(prompt) for prompt in prompts]
    if max(lengths) >= seq_len:
        raise ValueError(f"a prompt of {max(lengths)} tokens leaves no room in the model's context of {seq_len}.")
    uniform = uniforms(prompts, numbers or sample_numbers(prompts), sampling.seed, seq_len).to(device)
    cache = KeyValueCache(model.config, len(prompts), device)
    given = torch.tensor([[*prompt, *[eot] * (seq_len - len(prompt))] for prompt in prompts]).to(device)
    starts = torch.tensor(lengths).to(device)  # where each sequence begins to write
    ends = starts + (sampling.max_tokens or seq_len)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    logits = model(given[:, : min(lengths)], cache=cache)[:, -1]
    for position in range(min(lengths), seq_len):
        drawn = torch.where(ended, eot, next_tokens(logits, sampling, uniform[:, position]))
        reading = position < starts
        drawn = torch.where(reading, given[:, position], drawn)
        ended |= ~reading & ((drawn == eot) | (position + 1 >= ends))
        yield drawn
        if ended.all() or position + 1 == seq_len:
            return
        logits = model(drawn[:, None], cache=cache)[:, -1]


def complete(
    model: LanguageModel, tokenizer: Tokenizer, prompts: list[str], sampling: Sampling, numbers: list[int] | None = None
) -> list[str]:
    """One completion of each prompt, without the prompt and without `<|endoftext|>`; `numbers` as in `sample_tokens`."""
    encoded = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in prompts]
    rows = torch.stack(list(sample_tokens(model, encoded, sampling, tokenizer.eot, numbers)), 1).tolist()
    shortest = min(map(len, encoded))
    new = [[*row[len(prompt) - shortest :], tokenizer.eot] for prompt, row in zip(encoded, rows, strict=True)]
    return [tokenizer.decode(tokens[: tokens.index(tokenizer.eot)]) for tokens in new]


def stream(model: LanguageModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> Iterator[str]:
    """The completion of `prompt`, piece by piece as it is written."""
    new, text, shown = [], "", 0
    for step in sample_tokens(model, [[tokenizer.eot, *tokenizer.encode(prompt)]], sampling, tokenizer.eot):
        if int(step) == tokenizer.eot:
            break
        new.append(int(step))
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # the rest of a character's bytes may still come
            yield text[shown:]
            shown = len(text)
    yield text[shown:]
