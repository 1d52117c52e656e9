"""The model: a decoder of the Llama family.

- Pre-norm residual blocks with RMSNorm, no biases
- Rotary position embeddings, rotating the two halves of each head against each other
- Grouped-query attention through `scaled_dot_product_attention`
- SwiGLU feed-forward; input and output embeddings are one matrix
- Initial values in one place, scaled by depth
- Module names are those of the Llama checkpoints, so that a state dict can be loaded elsewhere as it is
- For ablations, norm, positions and feed-forward can each be those of GPT-2

Shapes: B batch, T tokens, C d_model, H query heads, K key/value heads, D head size, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blm_core.config import ModelConfig


class RMSNorm(nn.Module):
    """Scale to unit root mean square, in float32, then by a learned gain (Zhang and Sennrich 2019); in the type of `x`."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)


NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm}


def rotary_angles(seq_len: int, d_head: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation at every position, each (T, D) (Su et al. 2021)."""
    frequencies = base ** (-torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)  # (D/2)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)  # (T, D/2)
    angles = torch.cat([angles, angles], dim=-1)  # (T, D)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) by the angles of its positions, (T, D) each."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class KeyValueCache:
    """Keys and values of the tokens seen so far, for every layer: (L, B, K, seq_len, D) each."""

    def __init__(self, config: ModelConfig, batch_size: int, device=None, dtype=torch.float32):
        shape = (config.n_layers, batch_size, config.n_kv_heads, config.seq_len, config.d_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # tokens stored; the model moves it on when all layers have written

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, D) behind those before; all of them so far."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention in which several query heads share a key/value head (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.d_head, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.d_head).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.d_head).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.d_head).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = (kept.to(q.dtype) for kept in cache.update(self.layer, k, v))
            if past and T > 1:  # the kernel's causal mask starts at the first key
                mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        group = self.n_heads // self.n_kv_heads
        if group > 1:
            k = k.repeat_interleave(group, dim=1)  # (B, H, past + T, D)
            v = v.repeat_interleave(group, dim=1)
        # No dropout on attention weights: it would force the kernel that stores all T x T of them.
        causal = mask is None and not past and T > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: a linear unit gated by SiLU (Shazeer 2020); for ablations GPT-2's GELU, which has no gate."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated = config.feed_forward == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * up if self.gated else F.gelu(up, approximate="tanh"))


@torch.compiler.disable
def dropout_bytes(config: ModelConfig, tokens: Tensor) -> Tensor:
    """Random bytes for every dropout of one forward pass over `tokens` (B, T): (2 L + 1, B, T, C), uint8.

    One 64-bit number serves eight elements: PyTorch's own dropout, compiled, makes training on a CPU a fifth slower.
    """
    shape = (2 * config.n_layers + 1, *tokens.shape, config.d_model)
    words = torch.empty(-(-math.prod(shape) // 8), dtype=torch.int64, device=tokens.device)
    return words.random_(-(2**63), None).view(torch.uint8)[: math.prod(shape)].view(shape)


def dropped(x: Tensor, noise: Tensor | None, i: int, rate: float) -> Tensor:
    """Dropout of x (B, T, C) where its random bytes are small (Srivastava et al. 2014); rates are multiples of 1/256."""
    limit = round(256 * rate)
    return x if noise is None else x * (noise[i] >= limit) * (256 / (256 - limit))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        norm = NORMS[config.norm]
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = norm(config.d_model, config.norm_eps)
        self.post_attention_layernorm = norm(config.d_model, config.norm_eps)
        self.layer, self.dropout = layer, config.dropout

    def forward(self, x: Tensor, cos, sin, mask, cache: KeyValueCache | None, noise: Tensor | None) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        # Under autocast y is bfloat16, and so is the residual stream from here on: half the memory traffic at the same loss.
        x = x.to(y.dtype) + dropped(y, noise, 2 * self.layer, self.dropout)
        return x + dropped(self.mlp(self.post_attention_layernorm(x)), noise, 2 * self.layer + 1, self.dropout)


class LanguageModel(nn.Module):
    """Tokens in, logits of the next token out."""

    def __init__(self, config: ModelConfig, seed: int | None = None):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.d_model)
        self.model["layers"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.model["norm"] = NORMS[config.norm](config.d_model, config.norm_eps)
        if config.position == "learned":
            self.model["embed_positions"] = nn.Embedding(config.seq_len, config.d_model)
        cos, sin = rotary_angles(config.seq_len, config.d_head, config.rope_base)
        if config.position == "learned":
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)  # no rotation
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if self.cos.device.type != "meta":
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int | None = None) -> None:
        """Normal with `init_std`; what writes into the residual stream is smaller by sqrt(2 L) (GPT-2)."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        into_residual = self.config.init_std / math.sqrt(2 * self.config.n_layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = into_residual if name.endswith(("o_proj.weight", "down_proj.weight")) else self.config.init_std
                weight.normal_(0, std, generator=generator)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KeyValueCache | None = None, stories: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) in float32 for `tokens` (B, T); with `targets` (B, T), the mean cross-entropy in nats.

        Targets of -100 are passed over. With a cache, `tokens` continue what it holds. With `stories` (B, T), numbers of
        the story that a token belongs to, no token sees another story. Raises ValueError beyond `seq_len`.
        """
        past, T = cache.length if cache is not None else 0, tokens.shape[1]
        if past + T > self.config.seq_len:
            raise ValueError(f"{past + T} tokens do not fit into the model's context of {self.config.seq_len}.")
        noise = dropout_bytes(self.config, tokens) if self.training and self.config.dropout else None
        x = self.model["embed_tokens"](tokens)  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.model["embed_positions"].weight[past : past + T]
        mask = None
        if stories is not None:
            # Made once, read by all layers. On a GPU the flash kernel takes no mask; the memory-efficient one does (since
            # PyTorch 2.1), and the heads share it by a stride of 0; where T is no multiple of 8 it is copied. In eager
            # mode each layer writes it anew as numbers in the type of the queries, 2 B T^2 bytes in bfloat16.
            same = stories[:, :, None] == stories[:, None, :]
            mask = (same & torch.ones(T, T, dtype=torch.bool, device=x.device).tril())[:, None]  # (B, 1, T, T)
        x = dropped(x, noise, -1, self.config.dropout)
        for block in self.model["layers"]:
            x = block(x, self.cos[past : past + T], self.sin[past : past + T], mask, cache, noise)
        if cache is not None:
            cache.length += T
        logits = F.linear(self.model["norm"](x), self.model["embed_tokens"].weight).float()  # (B, T, V)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @property
    def device(self) -> torch.device:
        return self.cos.device


class Distilled(nn.Module):
    """The loss of a model that learns from its teachers' mean prediction beside the text itself (Hinton et al. 2015)."""

    def __init__(self, student: LanguageModel, teachers: list[LanguageModel], weight: float):
        super().__init__()
        self.student, self.teachers, self.weight = student, nn.ModuleList(teachers).requires_grad_(False), weight

    def forward(self, tokens: Tensor, targets: Tensor, stories: Tensor | None = None) -> Tensor:
        """The cross-entropy in nats: 1 - weight of that with `targets`, weight of that with the teachers' mean."""
        logits = self.student(tokens, stories=stories)
        with torch.no_grad():
            taught = sum(teacher(tokens, stories=stories).softmax(-1) for teacher in self.teachers) / len(self.teachers)
        scored = (targets >= 0).float()
        from_teachers = -((taught * logits.log_softmax(-1)).sum(-1) * scored).sum() / scored.sum()
        from_text = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return (1 - self.weight) * from_text + self.weight * from_teachers


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, by formula; `total` counts the tied embedding once."""
    c, d = config, config.d_head
    attention = c.d_model * d * (2 * c.n_heads + 2 * c.n_kv_heads)
    counts = {
        "embedding (tied)": c.vocab_size * c.d_model,
        "attention": c.n_layers * attention,
        "feed-forward": c.n_layers * (3 if c.feed_forward == "swiglu" else 2) * c.d_model * c.d_ff,
        "norms": (2 * c.n_layers + 1) * c.d_model * (1 if c.norm == "rms" else 2),
    }
    if c.position == "learned":
        counts["positions"] = c.seq_len * c.d_model
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: ModelConfig) -> int:
    """FLOPs to train on one token: 6 N + 12 L H D T (PaLM, appendix B), every matrix product counted."""
    counts = parameter_counts(config)
    matrices = counts["embedding (tied)"] + counts["attention"] + counts["feed-forward"]  # tied: also the output layer
    return 6 * matrices + 12 * config.n_layers * config.n_heads * config.d_head * config.seq_len
