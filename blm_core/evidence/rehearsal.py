"""A dress rehearsal: ten minutes of an accelerator that decide the settings of a run of hours, and what it will cost.

Everything runs in one loop that is compiled twice, with the stories of a window isolated and not.
"""

import dataclasses
import math
import statistics

import torch

from blm_core import pipeline
from blm_core.config import ConfigError, Preset
from blm_core.evidence.publish import markdown_table
from blm_core.evidence.speed import REPEATS, SECONDS, Loop, choose_micro_batch, isolation_ratio, machine, training_row
from blm_core.hardware import find_device, precision
from blm_core.model import KeyValueCache, LanguageModel

TRIAL_SHARE = 8  # a trial of a learning rate takes an eighth of the batch, else three of them would take an hour
FACTORS = (0.5, 1.0, 2.0)  # of the preset's learning rate


def rehearse(preset: Preset, device: str = "auto", steps: int = 200, seconds: float = SECONDS, repeats: int = REPEATS) -> dict:
    """Checks, micro-batches, speed with MFU and watts, isolation, and three learning rates of `steps` steps each.

    Stories are prepared first where they are missing: random tokens tell nothing of a learning rate.
    """
    where = find_device(device)
    pipeline.tokens(preset)
    checks = correctness(preset, where)
    loop = Loop(preset, where)
    tried = choose_micro_batch(loop)
    if preset.train.compile:
        loop.compile()
    about = machine(where)
    return about | {
        "preset": preset.name,
        "device": f"rehearsal {about['device']}",
        "checks": checks,
        "micro_batches": tried,
        "training": [training_row(loop, seconds)],
        "ratios": [isolation_ratio(loop, seconds, repeats)],
        "trial_steps": steps,
        "learning_rates": _trials(loop, preset.train.learning_rate, steps),
        "tokens": preset.train.steps * preset.tokens_per_step,
    }


@torch.no_grad()
def correctness(preset: Preset, device: torch.device) -> list[dict]:
    """What must hold on `device` before hours are spent on it: name, figure, limit. Raises ConfigError where one fails."""
    config = dataclasses.replace(preset.model, dropout=0.0)
    model, on_cpu = (LanguageModel(config, seed=1).to(where).eval() for where in (device, "cpu"))
    half = min(32, config.seq_len // 2)
    tokens = torch.randint(config.vocab_size, (2, 2 * half), generator=torch.Generator().manual_seed(1)).to(device)
    logits, cache = model(tokens), KeyValueCache(config, 2, device)
    by_parts = torch.cat([model(part, cache=cache) for part in tokens.split(half, 1)], 1)
    stories = torch.arange(2).repeat_interleave(half).expand(2, -1).to(device)
    behind_another = torch.cat([tokens[:, :half].flip(1), tokens[:, half:]], 1)
    with precision(device, preset.train.dtype):
        rough = float(model(tokens[:, :-1], tokens[:, 1:]))
    loss = float(model(tokens[:, :-1], tokens[:, 1:]))

    def gap(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.cpu() - b.cpu()).abs().max())

    isolated = gap(*(model(seen, stories=stories)[:, half:] for seen in (tokens, behind_another)))
    found = [
        ("logits, device against CPU", gap(logits, on_cpu(tokens.cpu())), 1e-3),
        ("logits with a cache against without", gap(by_parts, logits), 1e-3),
        ("an isolated story behind two others", isolated, 1e-3),
        ("first loss against ln V, relative", abs(loss / math.log(config.vocab_size) - 1), 0.05),
        ("loss in the run's precision, relative", abs(rough / loss - 1), 0.01),
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
    windows = max(1, loop.preset.train.batch_size // TRIAL_SHARE // micro) * micro
    for factor in FACTORS:
        rate = factor * learning_rate
        loop.restart(batch_size=windows, steps=steps, warmup_steps=steps // 10, learning_rate=rate)
        loop.run(steps)
        trials.append({"learning_rate": rate, "windows": windows, "loss": statistics.mean(loop.losses[-max(1, steps // 10) :])})
    return trials


def plan(result: dict, price_per_hour: float = 2.0) -> str:
    """`result` in Markdown, and the plan: hours, price, energy and the settings to use."""
    (speed,), trials = result["training"], result["learning_rates"]
    best = min(trials, key=lambda trial: trial["loss"] if math.isfinite(trial["loss"]) else math.inf)
    beyond = ", which is the edge of what was tried: the best may lie beyond" if best in (trials[0], trials[-1]) else ""
    hours, watts = result["tokens"] / speed["tokens_per_second"] / 3600, speed["watts"]
    power = f"{watts:.0f} W, {hours * watts / 1000:.1f} kWh" if watts else "power not measured"
    lines = [
        f"- {speed['tokens_per_second']:,} tokens/s {speed['mode']}, MFU {speed['mfu'] or 'not known'}, {power}",
        f"- {hours:.1f} hours for {result['tokens'] / 1e9:.2f} B tokens, price {hours * price_per_hour:.2f}",
        f"- isolating stories costs {1 / result['ratios'][0]['ratio']['median'] - 1:.0%} of the time",
        f"- settings: train.micro_batch_size={speed['micro_batch_size']} train.learning_rate={best['learning_rate']:g}{beyond}",
    ]
    trial = f"loss after {result['trial_steps']} steps of {best['windows']} windows"
    tables = (
        (("check", "found", "at most"), [(c["check"], f"{c['figure']:.1e}", f"{c['limit']:g}") for c in result["checks"]]),
        (("micro-batch", "tokens/s", "GB"), [tuple(sizes.values()) for sizes in result["micro_batches"]]),
        (("learning rate", trial), [(f"{t['learning_rate']:g}", f"{t['loss']:.4f}") for t in trials]),
    )
    return "\n\n".join([*(markdown_table(*table) for table in tables), "\n".join(lines)])
