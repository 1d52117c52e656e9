"""Sample stories: key/value cache, batches of prompts, temperature, top-k and top-p.

Almost all of the time goes into steps of one token. `Decoder` takes them in few calls, and a token is drawn from a shortlist
of the likeliest rather than from the sorted vocabulary, where that holds all that top-p keeps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blm_core.config import ConfigError
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


def next_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token per row of `logits` (B, V); (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    kept, tokens = logits.topk(min(sampling.top_k or SHORTLIST, logits.shape[-1]))  # from the likeliest on
    whole = (kept if sampling.top_k else logits).logsumexp(-1, keepdim=True)
    probabilities = (kept - whole).exp()
    if not sampling.top_k and (probabilities.sum(-1) < sampling.top_p).any():  # the shortlist is too short
        kept, tokens = logits.sort(-1, descending=True)
        probabilities = (kept - whole).exp()
    before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens
    probabilities[before >= sampling.top_p] = 0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)


class Decoder:
    """A Llama-like model with the weights laid out for one new token per sequence, in float32.

    The arithmetic is the model's, in fewer and larger calls: matrices that read the same input stand side by side, the gain
    of a norm is folded into the matrices behind it, and query heads that share a key meet it without copies. Later changes
    of the model's weights are not seen.
    """

    def __init__(self, model: LanguageModel):
        self.config = model.config
        parts = model.model
        self.embedding = parts["embed_tokens"].weight.detach().float()
        self.layers = []
        for block in parts["layers"]:
            attention, mlp = block.self_attn, block.mlp
            self.layers.append(
                (
                    _columns([attention.q_proj, attention.k_proj, attention.v_proj], block.input_layernorm.weight),
                    _columns([attention.o_proj]),
                    _columns([mlp.gate_proj, mlp.up_proj], block.post_attention_layernorm.weight),
                    _columns([mlp.down_proj]),
                )
            )
        self.head = _columns([parts["embed_tokens"]], parts["norm"].weight)
        self.cos = model.cos
        half = model.config.d_head // 2
        self.sin = torch.cat([-model.sin[:, :half], model.sin[:, half:]], dim=-1)

    def __call__(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits (B, V) of what follows `tokens` (B,), which continue what `cache` holds."""
        c, end = self.config, cache.length + 1
        B, H, K, D = len(tokens), c.n_heads, c.n_kv_heads, c.d_head
        cos, sin = self.cos[cache.length], self.sin[cache.length]  # (D,)
        x = F.embedding(tokens, self.embedding)  # (B, C)
        for layer, (read, write, widen, narrow) in enumerate(self.layers):
            heads = (self._scaled(x) @ read).view(B, H + 2 * K, D)
            turned = heads[:, : H + K]
            turned = torch.addcmul(turned * cos, turned.roll(D // 2, -1), sin)
            cache.keys[layer, :, :, cache.length] = turned[:, H:]
            cache.values[layer, :, :, cache.length] = heads[:, H + K :]
            q = turned[:, :H].reshape(B, K, H // K, D)  # the heads that share a key stand as if they were positions
            y = F.scaled_dot_product_attention(q, cache.keys[layer, :, :, :end], cache.values[layer, :, :, :end])
            x = torch.addmm(x, y.reshape(B, H * D), write)
            gate, up = (self._scaled(x) @ widen).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate).mul_(up), narrow)
        cache.length = end
        return self._scaled(x) @ self.head

    def _scaled(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True).add_(self.config.norm_eps))


def _columns(parts: list[torch.nn.Module], gain: Tensor | None = None) -> Tensor:
    """The matrices of `parts` side by side, (inputs, outputs), and the gain of the norm before them multiplied in."""
    matrix = torch.cat([part.weight.detach() for part in parts]).float()
    return (matrix if gain is None else matrix * gain.detach()).t().contiguous()


@torch.inference_mode()
def sample_tokens(model: LanguageModel, prompts: list[list[int]], sampling: Sampling, eot: int) -> Iterator[Tensor]:
    """Yield the sequences' next tokens (B,) one step at a time, until all have ended or the context is full.

    `prompts` begin with the start token and may differ in length: the shortest sets the first step, and a longer prompt
    is read on while others already write. A sequence that has ended goes on yielding `eot`.
    Raises ValueError for a prompt that leaves no room in the context.
    """
    longest, shortest = max(map(len, prompts)), min(map(len, prompts))
    if longest >= model.config.seq_len:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in the model's context of {model.config.seq_len}.")
    device = model.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = KeyValueCache(model.config, len(prompts), device)
    left = torch.tensor([sampling.max_tokens or model.config.seq_len] * len(prompts), device=device)
    given = torch.full((len(prompts), longest), -1, device=device)
    for row, prompt in enumerate(prompts):
        given[row, : len(prompt)] = torch.tensor(prompt, device=device)
    logits = model(given[:, :shortest], cache=cache)[:, -1]
    decode = Decoder(model) if model.config.is_llama else lambda tokens, cache: model(tokens[:, None], cache=cache)[:, -1]
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for position in range(shortest, model.config.seq_len):
        drawn = next_tokens(logits, sampling, generator)
        drawn = torch.where(ended, eot, drawn)
        if position < longest:
            reading = given[:, position] >= 0
            drawn = torch.where(reading, given[:, position], drawn)
        else:
            reading = torch.zeros_like(ended)
        ended |= (drawn == eot) & ~reading
        left -= (~reading).long()
        yield drawn
        ended |= (left <= 0) & ~reading
        if ended.all() or position + 1 == model.config.seq_len:
            return
        logits = decode(drawn, cache)


def complete(model: LanguageModel, tokenizer: Tokenizer, prompts: list[str], sampling: Sampling) -> list[str]:
    """One completion of each prompt, without the prompt and without `<|endoftext|>`."""
    if not prompts:
        return []
    encoded = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in prompts]
    steps = list(sample_tokens(model, encoded, sampling, tokenizer.eot))
    rows = torch.stack(steps, 1).tolist()
    shortest = min(map(len, encoded))
    completions = []
    for prompt, row in zip(encoded, rows, strict=True):
        new = row[len(prompt) - shortest :]
        completions.append(tokenizer.decode(new[: new.index(tokenizer.eot)] if tokenizer.eot in new else new))
    return completions


def stream(model: LanguageModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> Iterator[str]:
    """The completion of `prompt`, piece by piece as it is written."""
    encoded = [tokenizer.eot, *tokenizer.encode(prompt)]
    new, text, shown = [], "", ""
    for step in sample_tokens(model, [encoded], sampling, tokenizer.eot):
        token = int(step)
        if token == tokenizer.eot:
            break
        new.append(token)
        text = tokenizer.decode(new)
        if text != shown and not text.endswith("\ufffd"):  # the rest of a character's bytes may still come
            yield text[len(shown) :]
            shown = text
    if text != shown:  # it did not
        yield text[len(shown) :]
