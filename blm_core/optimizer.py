"""AdamW in two groups, and the learning rate over time."""

import math

import torch
from torch import nn

from blm_core.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); matrices decay, gains of the norms do not."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=weights[0].device.type == "cuda",  # PyTorch 2.1 refuses it on the CPU
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of `step` (from 0): linear warm-up, then cosine, or stable and linear decay ("wsd")."""
    floor = config.final_learning_rate
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        share = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = (config.steps - step) / (config.decay_share * config.steps)
        share = floor + (1 - floor) * min(1.0, left)
    return config.learning_rate * share
