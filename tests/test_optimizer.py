"""Muon against a reference of one matrix at a time, what decays, and the learning rate over time."""

import copy
import math

import pytest
import torch

from blm_core.config import ModelConfig, TrainConfig
from blm_core.model import LanguageModel
from blm_core.optimizer import RMS_OF_ADAMW, Muon, learning_rate, make_optimizers, orthogonalise

SHAPES = {"tall": (3, 64, 16), "wide": (3, 16, 64), "one": (1, 24, 40)}
TINY = {"vocab_size": 300, "n_layers": 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 40, "seq_len": 16}
ABLATION = {"norm": "layer", "position": "learned", "feed_forward": "gelu"}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalised_matrices_have_singular_values_near_one(shape, scale):
    made = orthogonalise(scale * gaussian(*shape))
    assert made.shape == shape
    assert made.dtype == torch.float32
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_orthogonalising_keeps_the_directions_of_a_matrix(shape):
    matrices = gaussian(*shape)
    for matrix, made in zip(matrices, orthogonalise(matrices), strict=True):
        assert cosine(made, nearest_orthogonal(matrix)) > 0.98


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matrices_in_a_batch_are_orthogonalised_as_alone(shape):
    matrices = gaussian(*shape)
    alone = torch.cat([orthogonalise(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), alone, atol=2e-2, rtol=0)  # bfloat16 where the machine has it


def test_a_matrix_of_zeros_stays_zero():
    assert not orthogonalise(torch.zeros(2, 4, 8)).any()


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


def test_a_weight_without_a_gradient_is_left_alone():
    used, unused = (torch.nn.Parameter(gaussian(8, 4)) for _ in range(2))
    before = unused.detach().clone()
    used.grad = gaussian(8, 4, seed=1)
    Muon([used, unused], lr=0.1, momentum=0.95, weight_decay=0.1).step()
    assert unused.equal(before)
    assert not used.equal(before)


def named_parts(model: LanguageModel, optimizers) -> dict[str, tuple[str, float]]:
    """Optimizer and weight decay of every parameter, by name."""
    found = {}
    names = {id(weight): name for name, weight in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                assert names[id(weight)] not in found
                found[names[id(weight)]] = (type(optimizer).__name__, group["weight_decay"])
    return found


@pytest.mark.parametrize("shape", [{}, ABLATION], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(name, shape):
    model = LanguageModel(ModelConfig(**TINY, **shape), seed=1)
    optimizers = make_optimizers(model, TrainConfig(optimizer=name, weight_decay=0.3))
    assert [type(optimizer).__name__ for optimizer in optimizers] == (["Muon", "AdamW"] if name == "muon" else ["AdamW"])
    parts = named_parts(model, optimizers)
    assert parts.keys() == dict(model.named_parameters()).keys()
    for parameter, weight in model.named_parameters():
        in_block = ".layers." in parameter and weight.ndim == 2
        assert parts[parameter] == ("Muon" if name == "muon" and in_block else "AdamW", 0.3 if weight.ndim == 2 else 0.0)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_weight_decay_shrinks_matrices_and_no_gain(name):
    model = LanguageModel(ModelConfig(**TINY), seed=1)
    before = {parameter: weight.detach().clone() for parameter, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    for optimizer in make_optimizers(model, TrainConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5)):
        optimizer.step()
    for parameter, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), before[parameter] * (0.95 if weight.ndim == 2 else 1.0))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_an_optimizer_that_is_saved_and_loaded_goes_on_as_if_nothing_had_happened(name):
    config = TrainConfig(optimizer=name, learning_rate=0.01)
    batch = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))

    def step(model, optimizers):
        model(batch, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    model = LanguageModel(ModelConfig(**TINY), seed=1)
    optimizers = make_optimizers(model, config)
    step(model, optimizers)
    other = LanguageModel(ModelConfig(**TINY), seed=2)
    other.load_state_dict(model.state_dict())
    others = make_optimizers(other, config)
    for optimizer, kept in zip(others, optimizers, strict=True):
        optimizer.load_state_dict(copy.deepcopy(kept.state_dict()))
    step(model, optimizers)
    step(other, others)
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


COSINE = TrainConfig(steps=110, warmup_steps=10, learning_rate=0.2, final_learning_rate=0.1)
WSD = TrainConfig(steps=100, warmup_steps=10, learning_rate=0.2, final_learning_rate=0.1, schedule="wsd", decay_share=0.2)


@pytest.mark.parametrize(
    ("config", "step", "expected"),
    [
        *(
            (config, step, expected)
            for config in (COSINE, WSD)
            for step, expected in [(0, 0.02), (4, 0.1), (9, 0.2), (10, 0.2)]
        ),
        (COSINE, 60, 0.11),  # half way down from 0.2 to 0.02
        (COSINE, 110, 0.02),
        (WSD, 79, 0.2),
        (WSD, 80, 0.2),
        (WSD, 90, 0.11),
        (WSD, 100, 0.02),
    ],
)
def test_the_learning_rate_at_the_corners_of_its_schedule(config, step, expected):
    assert learning_rate(step, config) == pytest.approx(expected)


@pytest.mark.parametrize("config", [COSINE, WSD], ids=["cosine", "wsd"])
def test_the_learning_rate_rises_until_the_warm_up_ends_and_never_again(config):
    rates = [learning_rate(step, config) for step in range(config.steps)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert min(rates[10:]) > 0.02


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate(0, TrainConfig(steps=10, warmup_steps=0, learning_rate=0.3)) == 0.3
