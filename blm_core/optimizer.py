"""The optimizers, and the learning rate over time.

- Muon (Jordan et al. 2024) for the matrices of the blocks: the momentum is orthogonalised, so that a step moves all
  directions of a matrix alike. Matrices of equal shape are orthogonalised in one batched call.
- AdamW (Loshchilov and Hutter 2019) for embeddings and norms, or for everything
- Muon's step is scaled to the size that AdamW's typically has (Liu et al. 2025), so both share one learning rate and
  one decoupled weight decay.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from blm_core.config import TrainConfig
from blm_core.hardware import fast_bfloat16

RMS_OF_ADAMW = 0.2  # root mean square of a typical AdamW step over its learning rate (Liu et al. 2025)


@torch.no_grad()
def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (N, rows, columns) with singular values moved towards 1 by Newton-Schulz steps.

    Jordan's coefficients bring singular values quickly into about 0.7 to 1.2, rather than to 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.bfloat16 if fast_bfloat16(matrices.device) else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Every parameter is a matrix."""

    def __init__(self, weights: list[Tensor], lr: float, momentum: float, weight_decay: float):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.shape].append(weight)
            for (rows, columns), weights in alike.items():
                gradients = [w.grad for w in weights]
                state = self.state
                momenta = [state[w].setdefault("momentum", torch.zeros_like(w)) for w in weights]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
                updates = orthogonalise(torch.stack(ahead)).unbind()
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                size = group["lr"] * RMS_OF_ADAMW * math.sqrt(max(rows, columns))
                torch._foreach_add_(weights, updates, alpha=-size)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon and AdamW, or AdamW alone; matrices decay, gains and biases of the norms do not."""
    muon = config.optimizer == "muon"
    blocks = [w for name, w in model.named_parameters() if muon and ".layers." in name and w.ndim == 2]
    in_blocks = set(map(id, blocks))
    rest = [w for w in model.parameters() if id(w) not in in_blocks]
    adamw = torch.optim.AdamW(
        [
            {"params": [w for w in rest if w.ndim == 2], "weight_decay": config.weight_decay},
            {"params": [w for w in rest if w.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=rest[0].device.type == "cuda",  # PyTorch 2.1 refuses it on the CPU
    )
    return [Muon(blocks, config.learning_rate, config.momentum, config.weight_decay), adamw] if blocks else [adamw]


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a saved state, but keep this machine's kernel: a CUDA checkpoint asks for a fused one that a CPU may not have."""
    groups = [
        saved | {name: group[name] for name in ("fused", "foreach") if name in group}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of `step` (from 0): linear warm-up, then cosine, or stable and linear decay ("wsd")."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = min(1.0, (config.steps - step) / (config.decay_share * config.steps))
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * left)
