"""The training step of a preset under the clock: tokens per second, the share of each part, memory and energy.

The real step on the real batches. Tokens per second come from steps that nothing interrupts; the shares of data, forward,
backward and optimizer from separate steps that wait for the device at each boundary.
"""

import contextlib
import dataclasses
import itertools
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blm_core.config import Preset
from blm_core.files import read_json
from blm_core.hardware import PEAK_FLOPS, PowerSampler, memory, mfu, reset_memory, resolve_dtype
from blm_core.model import LanguageModel, flops_per_token, parameter_counts
from blm_core.optimizer import learning_rate, make_optimizers
from blm_core.tokens import Batches, TokenStories
from blm_core.train import Processes, _compiled, _step

PARTS = ("data", "forward", "backward", "optimizer")
MOST_FLOPS_ON_CPU = 2e12  # of one step: above, it takes minutes
FIRST_MICRO_BATCH = 8  # smaller ones leave any GPU idle


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 5.0  # of steps for each figure of training
    repeats: int = 3  # of each side of a ratio
    megabytes: float = 24.0  # of text to encode
    tokens: int = 64  # to sample per text
    compile: bool = True  # compare eager with compiled, where the preset asks for compilation


QUICK = Effort(seconds=0.2, repeats=2, megabytes=0.2, tokens=8, compile=False)


class _RandomStories:
    """Tokens without meaning in stories as long as those of the data set."""

    def __init__(self, vocab_size: int, count: int = 2000):
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(80, 350, count)
        self._ends = np.cumsum(self.lengths)
        self._tokens = rng.integers(2, vocab_size, self._ends[-1]).astype(np.uint16)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        return self._tokens[self._ends[i] - self.lengths[i] : self._ends[i]]


def training_stories(preset: Preset) -> tuple[TokenStories | _RandomStories, str]:
    """The encoded training stories of `preset`, or random ones where there are none; and which: "own" or "random"."""
    folder = preset.folder / "tokens"
    if read_json(folder / "manifest.json"):
        return TokenStories(folder, "train"), "own"
    return _RandomStories(preset.model.vocab_size), "random"


class _Laps:
    """Seconds between boundaries, by the name of what lies before each; waits for the device at every one."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)
        self._last = now(device)

    def lap(self, name: str) -> None:
        at = now(self.device)
        self.seconds[name] += at - self._last
        self._last = at

    def timed(self, loss_of):
        """`loss_of`, with boundaries before and after. What precedes a step's first forward pass is transfer of data."""
        calls = itertools.count()

        def forward(*inputs, **named) -> Tensor:
            self.lap("backward" if next(calls) else "data")
            loss = loss_of(*inputs, **named)
            self.lap("forward")
            return loss

        return forward


class _Parameters:
    """Stands for the model in a step, which asks it for nothing but its parameters, when the backward pass is over."""

    def __init__(self, model: LanguageModel, laps: _Laps):
        self._model, self._laps = model, laps

    def parameters(self):
        self._laps.lap("backward")
        return self._model.parameters()


def now(device: torch.device) -> float:
    """Seconds, when `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Loop:
    """The training loop of a preset, to be run for a few steps at a time."""

    def __init__(self, preset: Preset, device: torch.device, compile: bool = False):
        self.preset, self.device, self.compiled = preset, device, False
        self.stories, self.tokens = training_stories(preset)
        self.model = LanguageModel(preset.model, preset.train.seed).to(device).train()
        self.optimizers = make_optimizers(self.model, preset.train)
        self.loss_of, self.why_eager = self.model, "not asked for"
        if compile:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                self.loss_of = _compiled(self.model, preset, device)
            self.compiled = self.loss_of is not self.model
            self.why_eager = str(said[-1].message)[:200] if said and not self.compiled else ""
        batches = Batches(self.stories, preset.model.seq_len, preset.train.batch_size, preset.train.seed)
        self._batches = batches.prefetched(range(2**31))
        self.step, self.loss = 0, float("nan")

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._batches.close()

    def _one(self, loss_of, model, batch: Tensor) -> Tensor:
        config = self.preset.train
        lr = learning_rate(min(self.step, config.steps - 1), config)
        loss, _ = _step(loss_of, model, self.optimizers, batch, lr, config, Processes(0, 1, self.device))
        self.step += 1
        return loss

    def run(self, steps: int) -> float:
        """Seconds that `steps` steps take; the loss of the last one is kept in `loss`."""
        began = now(self.device)
        for _ in range(steps):
            loss = self._one(self.loss_of, self.model, next(self._batches))
        seconds = now(self.device) - began
        self.loss = float(loss)
        return seconds

    def shares(self, steps: int) -> dict[str, float]:
        """Which share of the time of `steps` steps each of PARTS takes."""
        laps = _Laps(self.device)
        for _ in range(steps):
            batch = next(self._batches)
            laps.lap("data")
            self._one(laps.timed(self.loss_of), _Parameters(self.model, laps), batch)
            laps.lap("optimizer")
        total = sum(laps.seconds.values())
        return {part: round(laps.seconds[part] / total, 4) for part in PARTS}


def fastest_micro_batch(batch_size: int, measure, first: int = FIRST_MICRO_BATCH) -> tuple[int, list[dict]]:
    """Double the micro-batch until memory runs out or the batch is whole; the fastest size, and what each gave.

    `measure` gives tokens per second for a size, or raises torch.cuda.OutOfMemoryError. Sizes that do not divide the batch
    are not tried. Raises that error where not even the first size fits.
    """
    tried, size = [], min(first, batch_size)
    while size <= batch_size and batch_size % size == 0:
        try:
            tried.append({"micro_batch_size": size, "tokens_per_second": round(measure(size))})
        except torch.cuda.OutOfMemoryError:
            if not tried:
                raise
            tried.append({"micro_batch_size": size, "tokens_per_second": None})  # out of memory
            break
        size *= 2
    return max(tried, key=lambda found: found["tokens_per_second"] or 0)["micro_batch_size"], tried


def bench_preset(preset: Preset, device: torch.device, effort: Effort) -> list[dict]:
    """Rows of one preset: eager, and compiled where the preset asks for that."""
    row = {
        "preset": preset.name,
        "parameters": parameter_counts(preset.model)["total"],
        "command": f"python -m blm_core.evidence bench --presets {preset.name}",
    }
    if device.type == "cpu" and flops_per_token(preset.model) * preset.tokens_per_step > MOST_FLOPS_ON_CPU:
        return [row | {"not_measured": f"its steps are too large for a CPU; it is meant for one of {', '.join(PEAK_FLOPS)}"}]
    tried = None
    if device.type == "cuda":

        def measure(size: int) -> float:
            try:
                with Loop(_with_micro_batch(preset, size), device) as loop:
                    loop.run(1)
                    return preset.tokens_per_step / loop.run(1)
            finally:
                torch.cuda.empty_cache()  # else the next size finds the memory in pieces

        size, tried = fastest_micro_batch(preset.train.batch_size, measure)
        preset = _with_micro_batch(preset, size)
    rows = [row | _bench_training(preset, device, effort, compile=False) | {"micro_batches": tried}]
    if effort.compile and preset.train.compile:
        rows.append(row | _bench_training(preset, device, effort, compile=True))
    return rows


def _with_micro_batch(preset: Preset, size: int) -> Preset:
    return dataclasses.replace(preset, train=dataclasses.replace(preset.train, micro_batch_size=size))


def _bench_training(preset: Preset, device: torch.device, effort: Effort, compile: bool) -> dict:
    reset_memory(device)
    with Loop(preset, device, compile) as loop:
        if compile and not loop.compiled:
            return {"mode": "compiled", "not_measured": loop.why_eager}
        loop.run(1)
        steps = max(1, round(effort.seconds / loop.run(1)))
        with contextlib.closing(PowerSampler(device)) as sampler:
            seconds = loop.run(steps)
            watts = sampler.watts()
        shares = loop.shares(max(1, steps // 2))
    rate = steps * preset.tokens_per_step / seconds
    flops = rate * flops_per_token(preset.model)
    return {
        "mode": "compiled" if compile else "eager",
        "tokens": loop.tokens,
        "dtype": resolve_dtype(device, preset.train.dtype),
        "micro_batch_size": preset.train.micro_batch_size,
        "seq_len": preset.model.seq_len,
        "tokens_per_step": preset.tokens_per_step,
        "steps": steps,
        "tokens_per_second": round(rate),
        "tflops": round(flops / 1e12, 4),
        "mfu": mfu(flops, device),
        "shares": shares,
        "memory_gb": memory(device),
        "watts": watts and round(watts, 1),
        "joules_per_token": watts and watts * seconds / (steps * preset.tokens_per_step),
        "energy_unread": None if watts else sampler.why,
    }
