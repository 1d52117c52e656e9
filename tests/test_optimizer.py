"""Muon against a reference of one matrix at a time, what decays, and the learning rate over time."""

import math

import pytest
import torch

from blm_core.config import ModelConfig, TrainConfig
from blm_core.model import LanguageModel
from blm_core.optimizer import RMS_OF_ADAMW, Muon, learning_rate, make_optimizers, orthogonalise

TINY = {"vocab_size": 300, "n_layers": 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 40, "seq_len": 16}
ABLATION = {"norm": "layer", "position": "learned", "feed_forward": "gelu"}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(3, 64, 16), (3, 16, 64), (1, 24, 40)], ids=["tall", "wide", "one"])
def test_orthogonalising_keeps_the_directions_and_brings_singular_values_near_one(shape, scale):
    matrices = scale * gaussian(*shape)
    together = orthogonalise(matrices)
    assert (together.shape, together.dtype) == (shape, torch.float32)
    for matrix, made in zip(matrices, together, strict=True):
        values = torch.linalg.svdvals(made)
        assert 0.6 < values.min() <= values.max() < 1.3
        assert cosine(made, nearest_orthogonal(matrix)) > 0.98
        torch.testing.assert_close(orthogonalise(matrix[None])[0], made, atol=2e-2, rtol=0)  # bfloat16 where the machine has it


def test_muon_moves_each_matrix_along_its_own_orthogonalised_momentum():
    lr, momentum, decay = 0.1, 0.9, 0.5
    shapes = [(32, 8), (8, 32), (32, 8), (12, 40)]
    weights = [torch.nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(shapes)]
    memories = [torch.zeros(shape) for shape in shapes]
    muon = Muon(weights, lr, momentum, decay)
    for step in range(3):
        before = [weight.detach().clone() for weight in weights]
        for i, weight in enumerate(weights):
            weight.grad = gaussian(*shapes[i], seed=100 + 10 * step + i)
        muon.step()
        for i, weight in enumerate(weights):
            memories[i] = momentum * memories[i] + (1 - momentum) * weight.grad
            ahead = (1 - momentum) * weight.grad + momentum * memories[i]
            moved = (1 - lr * decay) * before[i] - weight.detach()
            wanted = lr * RMS_OF_ADAMW * math.sqrt(max(shapes[i])) * nearest_orthogonal(ahead)
            assert cosine(moved, wanted) > 0.96
            assert float(moved.norm() / wanted.norm()) == pytest.approx(1, abs=0.25)


def test_a_step_of_muon_is_about_as_large_as_one_of_adamw():
    for shape in [(64, 16), (16, 64), (48, 48)]:
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = gaussian(*shape)
        Muon([weight], lr=1.0, momentum=0.95, weight_decay=0.0).step()
        assert float(weight.detach().square().mean().sqrt()) == pytest.approx(RMS_OF_ADAMW, rel=0.25)


@pytest.mark.parametrize("shape", [{}, ABLATION], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(name, shape):
    model = LanguageModel(ModelConfig(**TINY, **shape), seed=1)
    optimizers = make_optimizers(model, TrainConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5))
    owner = {id(w): type(o).__name__ for o in optimizers for group in o.param_groups for w in group["params"]}
    assert sum(len(group["params"]) for o in optimizers for group in o.param_groups) == len(owner)
    before = {parameter: weight.detach().clone() for parameter, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    for optimizer in optimizers:
        optimizer.step()
    for parameter, weight in model.named_parameters():
        in_block = ".layers." in parameter and weight.ndim == 2
        assert owner[id(weight)] == ("Muon" if name == "muon" and in_block else "AdamW")
        torch.testing.assert_close(weight.detach(), before[parameter] * (0.95 if weight.ndim == 2 else 1.0))


COSINE = TrainConfig(steps=110, warmup_steps=10, learning_rate=0.2, final_learning_rate=0.1)
WSD = TrainConfig(steps=100, warmup_steps=10, learning_rate=0.2, final_learning_rate=0.1, schedule="wsd", decay_share=0.2)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (COSINE, {0: 0.02, 4: 0.1, 9: 0.2, 10: 0.2, 60: 0.11, 110: 0.02}),  # step 60 is half way down
        (WSD, {0: 0.02, 4: 0.1, 9: 0.2, 10: 0.2, 79: 0.2, 80: 0.2, 90: 0.11, 100: 0.02}),
        (TrainConfig(steps=10, warmup_steps=0, learning_rate=0.3), {0: 0.3}),
    ],
)
def test_the_learning_rate_at_the_corners_of_its_schedule(config, expected):
    assert {step: learning_rate(step, config) for step in expected} == pytest.approx(expected)
    rates = [learning_rate(step, config) for step in range(config.warmup_steps, config.steps)]
    assert rates == sorted(rates, reverse=True)
