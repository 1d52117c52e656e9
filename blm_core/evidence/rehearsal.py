"""A dress rehearsal: ten minutes of an accelerator that decide the settings of a run of hours, and what it will cost."""

import dataclasses
import math
import statistics
from datetime import UTC, datetime

import torch

from blm_core.config import ConfigError, Preset
from blm_core.evidence.models import versions
from blm_core.evidence.publish import markdown_table
from blm_core.evidence.speed import Effort, Loop, by_turns, changed, micro_batches, training_rows
from blm_core.hardware import device_name, precision
from blm_core.model import KeyValueCache, LanguageModel

TRIAL_SHARE = 8  # a trial of a learning rate takes an eighth of the batch, else three of them would take an hour
FACTORS = (0.5, 1.0, 2.0)  # of the preset's learning rate


def rehearse(preset: Preset, device: str = "auto", steps: int = 200, effort: Effort | None = None) -> dict:
    """Checks, micro-batches, isolation, three learning rates of `steps` steps each, and speed with MFU and watts.

    Raises ConfigError where the preset's stories are not encoded yet: random tokens tell nothing of a learning rate.
    """
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    effort = effort or Effort()
    checks = correctness(preset, where)
    size, tried = micro_batches(preset, where)
    preset = changed(preset, micro_batch_size=size)
    compile = effort.compile and preset.train.compile
    isolation = _isolation(preset, where, effort, compile)
    rates = [_trial(preset, where, factor * preset.train.learning_rate, steps, compile) for factor in FACTORS]
    return {
        "preset": preset.name,
        "device": f"rehearsal {device_name(where)}",
        "device_type": where.type,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "checks": checks,
        "micro_batches": tried,
        "training": training_rows(preset, where, effort, tried),
        "ratios": [isolation],
        "trial_steps": steps,
        "learning_rates": rates,
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
            raise ConfigError(f"{device_name(device)} fails the check {name!r}: {figure:.2g}, at most {limit:g} is expected.")
    return [{"check": name, "figure": figure, "limit": limit} for name, figure, limit in found]


def _isolation(preset: Preset, device: torch.device, effort: Effort, compile: bool) -> dict:
    with (
        Loop(changed(preset, isolate_stories=True), device, compile) as isolated,
        Loop(changed(preset, isolate_stories=False), device, compile) as shared,
    ):
        isolated.run(1), shared.run(1)
        steps = max(1, round(effort.seconds / isolated.run(1)))
        sides = ("isolated", lambda: isolated.rate(steps)), ("shared", lambda: shared.rate(steps))
        return by_turns("stories of a window", "tokens/s", *sides, effort.repeats)


def _trial(preset: Preset, device: torch.device, rate: float, steps: int, compile: bool) -> dict:
    """The mean loss of the last tenth of `steps` steps at `rate`, on an eighth of the batch; nan where it diverged."""
    batch = max(1, preset.train.batch_size // TRIAL_SHARE)
    micro = math.gcd(batch, preset.train.micro_batch_size)
    warmup = {"steps": steps, "warmup_steps": steps // 10, "learning_rate": rate}
    with Loop(changed(preset, batch_size=batch, micro_batch_size=micro, **warmup), device, compile) as loop:
        if loop.tokens != "own":
            raise ConfigError(
                f"{preset.folder / 'tokens'} holds no encoded stories, and a learning rate cannot be tried on random ones. "
                f"Run 01_data and 02_tokenizer with BLM_PRESET={preset.name} first."
            )
        seconds = loop.run(steps)
    return {"learning_rate": rate, "loss": statistics.mean(loop.losses[-max(1, steps // 10) :]), "seconds": seconds}


def plan(result: dict, price_per_hour: float = 2.0) -> str:
    """`result` in Markdown, and the plan: hours, price, energy and the settings to use."""
    fastest = max((row for row in result["training"] if "tokens_per_second" in row), key=lambda row: row["tokens_per_second"])
    best = min(result["learning_rates"], key=lambda trial: trial["loss"] if math.isfinite(trial["loss"]) else math.inf)
    cost = 1 / result["ratios"][0]["ratio"]["median"] - 1
    hours = result["tokens"] / fastest["tokens_per_second"] / 3600
    watts = fastest["watts"]
    checks = [(c["check"], f"{c['figure']:.1e}", f"{c['limit']:g}") for c in result["checks"]]
    tried = [
        (t["micro_batch_size"], t["tokens_per_second"] or "out of memory", t["memory_gb"]) for t in result["micro_batches"]
    ]
    rates = [(f"{trial['learning_rate']:g}", f"{trial['loss']:.4f}") for trial in result["learning_rates"]]
    edge = best["learning_rate"] in (
        result["learning_rates"][0]["learning_rate"],
        result["learning_rates"][-1]["learning_rate"],
    )
    lines = [
        f"- {fastest['tokens_per_second']:,} tokens/s {fastest['mode']}, MFU {fastest['mfu']}, {watts or 'not measured'} W",
        f"- {hours:.1f} hours for {result['tokens'] / 1e9:.2f} B tokens, price {hours * price_per_hour:.2f}",
        f"- energy: {hours * watts / 1000:.1f} kWh" if watts else "- energy: not measured",
        f"- isolating stories costs {cost:.0%} of the time",
        f"- settings: train.micro_batch_size={fastest['micro_batch_size']} train.learning_rate={best['learning_rate']:g}"
        + (", which is the edge of what was tried: the best may lie beyond" if edge else ""),
    ]
    parts = [
        markdown_table(("check", "found", "at most"), checks),
        markdown_table(("micro-batch", "tokens/s", "GB"), tried),
        markdown_table(("learning rate", f"loss after {result['trial_steps']} steps of an eighth of the batch"), rates),
        "\n".join(lines),
    ]
    return "\n\n".join(parts)
