"""A dress rehearsal: ten minutes of an accelerator that decide the settings of a run of hours, and what it will cost.

Everything runs in one loop that is compiled twice, with the stories of a window isolated and not.
"""

import dataclasses
import math
import statistics

import torch

from blm_core import pipeline
from blm_core.config import ConfigError, Preset
from blm_core.evidence.models import _device
from blm_core.evidence.publish import markdown_table
from blm_core.evidence.speed import Effort, Loop, choose_micro_batch, isolation_ratio, machine, training_row
from blm_core.hardware import precision
from blm_core.model import KeyValueCache, LanguageModel

TRIAL_SHARE = 8  # a trial of a learning rate takes an eighth of the batch, else three of them would take an hour
FACTORS = (0.5, 1.0, 2.0)  # of the preset's learning rate


def rehearse(preset: Preset, device: str = "auto", steps: int = 200, effort: Effort | None = None) -> dict:
    """Checks, micro-batches, speed with MFU and watts, isolation, and three learning rates of `steps` steps each.

    Stories are prepared first where they are missing: random tokens tell nothing of a learning rate.
    """
    where, effort = _device(device), effort or Effort()
    pipeline.tokens(preset)
    checks = correctness(preset, where)
    loop = Loop(preset, where)
    tried = choose_micro_batch(loop)
    if effort.compile and preset.train.compile:
        loop.compile()
    about = machine(where)
    return about | {
        "preset": preset.name,
        "device": f"rehearsal {about['device']}",
        "checks": checks,
        "micro_batches": tried,
        "training": [training_row(loop, effort)],
        "ratios": [isolation_ratio(loop, effort)],
        "trial_steps": steps,
        "learning_rates": _trials(loop, preset.train.learning_rate, steps),
        "tokens": preset.train.steps * preset.tokens_per_step,
    }


@torch.no_grad()
def correctness(preset: Preset, device: torch.device) -> list[dict]:
    """What must hold on `device` before hours are spent on it: name, figure, limit. Raises ConfigError where one fails."""
    config = dataclasses.replace(preset.model, dropout=0.0)
    model = LanguageModel(config, seed=1).to(device).eval()
    on_cpu = LanguageModel(config, seed=1).eval()
    length = min(64, config.seq_len)
    tokens = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    there = tokens.to(device)
    logits = model(there)
    cache = KeyValueCache(config, 2, device)
    by_parts = torch.cat([model(there[:, : length // 2], cache=cache), model(there[:, length // 2 :], cache=cache)], 1)
    stories = (torch.arange(length, device=device) >= length // 2).long().expand(2, -1)
    alone = model(there[:, : length // 2])
    with precision(device, preset.train.dtype):
        rough = model(there[:, :-1], there[:, 1:])
    loss = float(model(there[:, :-1], there[:, 1:]))
    found = [
        ("logits, device against CPU", float((logits.cpu() - on_cpu(tokens)).abs().max()), 1e-3),
        ("logits with a cache against without", float((by_parts - logits).abs().max()), 1e-3),
        ("an isolated story against alone", float((model(there, stories=stories)[:, : length // 2] - alone).abs().max()), 1e-3),
        ("first loss against ln V, relative", abs(loss / math.log(config.vocab_size) - 1), 0.05),
        ("loss in the run's precision, relative", abs(float(rough) / loss - 1), 0.01),
    ]
    for name, figure, limit in found:
        if not figure <= limit:
            raise ConfigError(f"{device} fails the check {name!r}: {figure:.2g}, at most {limit:g} is expected.")
    return [{"check": name, "figure": figure, "limit": limit} for name, figure, limit in found]


def _trials(loop: Loop, learning_rate: float, steps: int) -> list[dict]:
    """The mean loss of the last tenth of `steps` steps at each rate, on an eighth of the batch; nan where it diverged.

    The micro-batch stays, so that nothing is compiled again.
    """
    micro, trials = loop.preset.train.micro_batch_size, []
    batch = max(1, loop.preset.train.batch_size // TRIAL_SHARE // micro) * micro
    for factor in FACTORS:
        rate = factor * learning_rate
        loop.restart(batch_size=batch, steps=steps, warmup_steps=steps // 10, learning_rate=rate)
        seconds = loop.run(steps)
        loss = statistics.mean(loop.losses[-max(1, steps // 10) :])
        trials.append({"learning_rate": rate, "windows": batch, "loss": loss, "seconds": seconds})
    return trials


def plan(result: dict, price_per_hour: float = 2.0) -> str:
    """`result` in Markdown, and the plan: hours, price, energy and the settings to use."""
    (speed,), trials = result["training"], result["learning_rates"]
    best = min(trials, key=lambda trial: trial["loss"] if math.isfinite(trial["loss"]) else math.inf)
    isolation = 1 / result["ratios"][0]["ratio"]["median"] - 1
    hours, watts = result["tokens"] / speed["tokens_per_second"] / 3600, speed["watts"]
    beyond = ", which is the edge of what was tried: the best may lie beyond" if best in (trials[0], trials[-1]) else ""
    lines = [
        f"- {speed['tokens_per_second']:,} tokens/s {speed['mode']}, MFU {speed['mfu']}, {watts or 'not measured'} W",
        f"- {hours:.1f} hours for {result['tokens'] / 1e9:.2f} B tokens, price {hours * price_per_hour:.2f}",
        f"- energy: {hours * watts / 1000:.1f} kWh" if watts else "- energy: not measured",
        f"- isolating stories costs {isolation:.0%} of the time",
        f"- settings: train.micro_batch_size={speed['micro_batch_size']} train.learning_rate={best['learning_rate']:g}{beyond}",
    ]
    checks = [(check["check"], f"{check['figure']:.1e}", f"{check['limit']:g}") for check in result["checks"]]
    sizes = [
        (t["micro_batch_size"], t["tokens_per_second"] or "out of memory", t["memory_gb"]) for t in result["micro_batches"]
    ]
    losses = [(f"{trial['learning_rate']:g}", f"{trial['loss']:.4f}") for trial in trials]
    trial = f"loss after {result['trial_steps']} steps of {best['windows']} windows"
    tables = (
        (("check", "found", "at most"), checks),
        (("micro-batch", "tokens/s", "GB"), sizes),
        (("learning rate", trial), losses),
    )
    return "\n\n".join([*(markdown_table(*table) for table in tables), "\n".join(lines)])
