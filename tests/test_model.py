"""The model does what its formulas say: causal, relative in position, the same with and without a cache."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blm_core.config import PRESETS, ModelConfig
from blm_core.model import Distilled, KeyValueCache, LanguageModel, flops_per_token, parameter_counts, rotary_angles, rotate

GPT2_STYLE = {"norm": "layer", "position": "learned", "feed_forward": "gelu"}
SHAPES = {
    "grouped heads": ModelConfig(vocab_size=300, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=32),
    "one key head": ModelConfig(vocab_size=301, n_layers=3, d_model=24, n_heads=6, n_kv_heads=1, d_ff=40, seq_len=17),
    "as GPT-2": ModelConfig(
        vocab_size=320, n_layers=2, d_model=32, n_heads=4, n_kv_heads=4, d_ff=128, seq_len=24, **GPT2_STYLE
    ),
}
every_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def build(config: ModelConfig) -> LanguageModel:
    """A model with weights large enough that all its parts show in the logits."""
    return LanguageModel(replace(config, init_std=0.2), seed=1).eval()


def random_tokens(config: ModelConfig, batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@every_shape
@torch.no_grad()
def test_a_token_changes_its_own_logits_and_later_ones_but_none_before_and_none_of_another_text(config):
    model, tokens = build(config), random_tokens(config, 2, config.seq_len)
    before = model(tokens)
    for position in (0, 1, config.seq_len // 2, config.seq_len - 1):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % config.vocab_size
        moved, other = (model(changed) - before).abs().amax(-1)  # (T,) each
        assert moved[:position].eq(0).all()
        assert moved[position:].gt(1e-4).all()
        assert other.eq(0).all()


@pytest.mark.parametrize(("d_head", "base"), [(8, 10_000.0), (16, 100.0)])
def test_rotated_queries_and_keys_depend_on_relative_position_only(d_head, base):
    q, k = torch.randn(2, 1, 1, 1, d_head, generator=torch.Generator().manual_seed(1)).expand(2, 1, 1, 64, d_head)
    cos, sin = rotary_angles(64, d_head, base)
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2))[0, 0]  # query position, key position
    for distance in (-63, -17, -1, 0, 1, 5, 40):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-3, atol=1e-3)
    assert scores[0].std() > 0.1


@torch.no_grad()
def test_a_story_gets_the_same_logits_wherever_it_stands_in_a_window_of_isolated_stories(tiny):
    model, tokens = build(tiny), random_tokens(tiny, 2, 30)
    stories = torch.tensor([0] * 11 + [1] * 5 + [2] * 14).expand(2, -1)
    packed = model(tokens, stories=stories)
    for part in (slice(0, 11), slice(11, 16), slice(16, 30)):
        torch.testing.assert_close(packed[:, part], model(tokens[:, part]), rtol=1e-4, atol=1e-4)
    assert (packed - model(tokens))[:, 11:].abs().max() > 0.01


@pytest.mark.parametrize("chunks", [[1] * 16, [7, 9], [1, 5, 1, 1, 8]], ids=str)
@every_shape
@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_sequence_however_it_is_cut(config, chunks):
    model, tokens = build(config), random_tokens(config, 3, 16)
    cache = KeyValueCache(config, batch_size=3)
    logits = torch.cat([model(chunk, cache=cache) for chunk in tokens.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=rf"{config.seq_len + 1} tokens .* context of {config.seq_len}"):
        model(random_tokens(config, 3, config.seq_len - 15), cache=cache)


@torch.no_grad()
def test_the_loss_is_the_mean_cross_entropy_of_the_targets_that_count(tiny):
    model, tokens, targets = build(tiny), random_tokens(tiny, 2, 20), random_tokens(tiny, 2, 20, seed=1)
    nats = -model(tokens).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(model(tokens, targets), nats.mean())
    counted = torch.arange(20).expand(2, -1) % 3 > 0
    torch.testing.assert_close(model(tokens, targets.where(counted, torch.tensor(-100))), nats[counted].mean())


@every_shape
def test_the_first_loss_is_that_of_guessing_and_every_parameter_gets_a_gradient(config):
    model, tokens = LanguageModel(config, seed=1), random_tokens(config, 16, config.seq_len)
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.1)
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("config", [*SHAPES.values(), *(p.model for p in PRESETS.values())], ids=[*SHAPES, *PRESETS])
def test_parameters_by_formula_are_those_of_the_built_modules(config):
    with torch.device("meta"):
        built = {name: weight.numel() for name, weight in LanguageModel(config).named_parameters()}
    counts, names = (
        parameter_counts(config),
        {"embedding (tied)": "embed_tokens", "attention": "self_attn", "feed-forward": "mlp"},
    )
    for part, name in (*names.items(), ("norms", "norm"), ("total", "")):
        assert counts[part] == sum(count for parameter, count in built.items() if name in parameter), part


@pytest.fixture
def slow_kernel():
    """Attention as plain matrix products, which PyTorch's counter sees on every device."""
    cuda = torch.backends.cuda
    before = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    cuda.enable_flash_sdp(False)
    cuda.enable_mem_efficient_sdp(False)
    yield
    cuda.enable_flash_sdp(before[0])
    cuda.enable_mem_efficient_sdp(before[1])


@every_shape
def test_flops_by_formula_are_those_that_pytorch_counts_in_a_training_step(config, slow_kernel):
    model, tokens = LanguageModel(config, seed=1), random_tokens(config, 2, config.seq_len)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens.roll(-1, 1)).backward()
    assert counter.get_total_flops() == flops_per_token(config) * tokens.numel()


def test_initial_weights_follow_from_the_seed_and_start_smaller_with_depth_where_they_feed_the_residual_stream():
    config = ModelConfig(vocab_size=300, n_layers=8, d_model=64, n_heads=4, n_kv_heads=2, d_ff=128, seq_len=16, init_std=0.04)
    first, again, other = (LanguageModel(config, seed).state_dict() for seed in (7, 7, 8))
    for name, weight in first.items():
        assert weight.equal(again[name])
        assert weight.equal(other[name]) == (weight.ndim < 2)
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        if weight.ndim == 2:
            assert float(weight.std()) == pytest.approx(0.01 if into_residual else 0.04, rel=0.05)
        else:
            assert weight.eq(1).all()


@torch.no_grad()
def test_dropout_acts_in_training_only_and_follows_from_the_seed(tiny):
    tokens = random_tokens(tiny, 2, 16)
    plain, dropping = LanguageModel(tiny, seed=1), LanguageModel(replace(tiny, dropout=0.5), seed=1)
    assert dropping.eval()(tokens).equal(plain.train()(tokens))
    torch.manual_seed(1)
    first, second = dropping.train()(tokens), dropping(tokens)
    torch.manual_seed(1)
    assert not first.equal(second)
    assert dropping(tokens).equal(first)


@torch.no_grad()
def test_the_norm_scales_every_vector_to_unit_root_mean_square_and_squares_in_float32(tiny):
    norm = LanguageModel(tiny, seed=1).model["norm"]
    x = torch.randn(5, tiny.d_model, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 4, 5)[:, None]
    torch.testing.assert_close(norm(x), x / x.pow(2).mean(-1, keepdim=True).sqrt(), rtol=5e-3, atol=1e-3)
    half = x.half()  # the squares of its largest numbers are beyond float16
    torch.testing.assert_close(norm(half).float(), norm(half.float()), rtol=2e-3, atol=1e-3)


def test_the_loss_of_a_taught_model_is_that_of_the_text_and_of_its_teachers_mean_prediction(tiny):
    student, *teachers = (LanguageModel(tiny, seed).eval() for seed in (1, 2, 3))
    tokens = random_tokens(tiny, 2, 9)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 5:] = -100  # padding
    mean = (teachers[0](inputs).softmax(-1) + teachers[1](inputs).softmax(-1)) / 2
    towards = -(mean * student(inputs).log_softmax(-1)).sum(-1)[targets >= 0].mean()
    taught = Distilled(student, teachers, 0.75)(inputs, targets)
    torch.testing.assert_close(taught, 0.25 * student(inputs, targets) + 0.75 * towards)
    taught.backward()
    assert all(w.grad is not None for w in student.parameters())
    assert all(w.grad is None for teacher in teachers for w in teacher.parameters())
