"""How fast this machine trains, encodes and samples, measured in one sitting.

- Training runs the real step on the real batches. Tokens per second come from steps that nothing interrupts; the shares of
  data, forward, backward and optimizer from separate steps that wait for the device at each boundary.
- What is set against each other is measured by turns, A B A B, so that a machine that slows down slows both.
- A figure that this machine cannot give has `not_measured`, why, and `command`, which fills it elsewhere.
"""

import dataclasses
import itertools
import json
import re
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blm_core import config as configuration
from blm_core import data, pipeline, shards
from blm_core.batches import Batches
from blm_core.checkpoint import load_model, save_model
from blm_core.config import ROOT, ConfigError, Preset
from blm_core.files import read_json, write_json
from blm_core.generate import Decoder, Sampling, sample_tokens
from blm_core.hardware import (
    PEAK_FLOPS,
    EnergyMeter,
    device_name,
    fast_bfloat16,
    memory,
    mfu,
    reset_memory,
    resolve_dtype,
)
from blm_core.model import LanguageModel, flops_per_token, parameter_counts
from blm_core.optimizer import learning_rate, make_optimizers
from blm_core.publish import markdown_table
from blm_core.recording import versions
from blm_core.shards import TokenStories
from blm_core.train import Processes, _compiled, _step

BENCHMARKS = ROOT / "runs" / "bench"
PARTS = ("data", "forward", "backward", "optimizer")
MOST_FLOPS_ON_CPU = 2e12  # of one step: above, it takes minutes
FIRST_MICRO_BATCH = 8  # smaller ones leave any GPU idle
MFU_FORMULA = "tokens per second x (6 N + 12 L H D T) / peak FLOP/s (PaLM, appendix B; N counts the matrices)"
NOT_MEASURED = "not measured"


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
        "command": f"python -m blm_core bench --presets {preset.name}",
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
        meter = EnergyMeter(str(device))
        meter.start()
        seconds = loop.run(steps)
        joules = meter.stop()["gpu" if device.type == "cuda" else "cpu"]
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
        "watts": None if joules is None else round(joules / seconds, 1),
        "joules_per_token": None if joules is None else joules / (steps * preset.tokens_per_step),
        "energy_unread": meter.why.get("gpu" if device.type == "cuda" else "cpu"),
    }


class PlainLoop:
    """A float32 loop as a first attempt has it: eager, `.item()` in every step, batches sliced from a Python list."""

    def __init__(self, preset: Preset):
        self.preset, self.step, self.loss = preset, 0, float("nan")
        stories, _ = training_stories(preset)
        count = min(len(stories), 5000)
        self.tokens = [int(token) for i in range(count) for token in stories[i]]
        self.model = LanguageModel(preset.model, preset.train.seed).train()
        c = preset.train
        betas = (c.beta1, c.beta2)
        decay = c.weight_decay
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), c.learning_rate, betas, weight_decay=decay, foreach=False, fused=False
        )

    def run(self, steps: int) -> float:
        """Seconds that `steps` steps take; the loss of the last one is kept in `loss`."""
        T, began = self.preset.model.seq_len, time.perf_counter()
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(min(self.step, self.preset.train.steps - 1), self.preset.train)
            rows = []
            for row in range(self.preset.train.batch_size):
                start = (self.step * self.preset.train.batch_size + row) * T % (len(self.tokens) - T - 1)
                rows.append(self.tokens[start : start + T + 1])
            batch = torch.tensor(rows)
            loss = self.model(batch[:, :-1], batch[:, 1:])
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.preset.train.max_grad_norm, foreach=False)
            self.optimizer.step()
            self.loss = loss.item()
            self.step += 1
        return time.perf_counter() - began


def ratio(question: str, unit: str, a: tuple, b: tuple, repeats: int, **known) -> dict:
    """Measure A and B by turns; `a` and `b` are (name, function that gives a rate). The ratio is that of each turn."""
    rates = {"a": [], "b": []}
    for _ in range(repeats):
        rates["a"].append(a[1]())
        rates["b"].append(b[1]())
    turns = [x / y for x, y in zip(rates["a"], rates["b"], strict=True)]
    sides = {side: {"name": name, **_spread(rates[side])} for side, name in (("a", a[0]), ("b", b[0]))}
    return {"question": question, "unit": unit, **sides, "ratio": _spread(turns), **known}


def _spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "values": values}


def bench_loops(preset: Preset, effort: Effort) -> dict:
    """Our training loop against a plain one of the same shape, on the CPU, in tokens per second."""
    device = torch.device("cpu")
    plain = PlainLoop(preset)
    with Loop(preset, device, compile=effort.compile and preset.train.compile) as ours:
        dtype = resolve_dtype(device, preset.train.dtype)
        name = f"{dtype}, {'compiled' if ours.compiled else 'eager'}, micro-batches of {preset.train.micro_batch_size}"
        ours.run(1)
        steps = max(1, round(effort.seconds / 2 / plain.run(1)))
        found = ratio(
            f"training, shape of `{preset.name}`, CPU",
            "tokens/s",
            (f"this project ({name})", lambda: steps * preset.tokens_per_step / ours.run(steps)),
            ("plain float32 loop", lambda: steps * preset.tokens_per_step / plain.run(steps)),
            effort.repeats,
            target="1.5 with bfloat16",
        )
        note = f"{ours.tokens} tokens; loss after {ours.step * preset.tokens_per_step:,} tokens: "
    return found | {"note": note + f"{ours.loss:.3f} against {plain.loss:.3f}"}


def bench_encoding(effort: Effort) -> dict:
    """Encoding in a pool of two processes against one, in MB of text per second, start of the processes included."""
    preset = configuration.load("smoke")
    pipeline.stories(preset)
    own = list(data.read_split(preset.folder / "data", "train"))
    tokenizer, name = pipeline.tokenizer(preset), "smoke"
    size = sum(len(story.encode()) for story in own)
    copies = max(2, round(effort.megabytes * 1e6 / size))
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            (Path(folder) / str(count) / "stories").mkdir(parents=True)
            for shard in range(count):
                lines = [json.dumps({"story": story}) + "\n" for story in own] * (copies // count)
                (Path(folder) / str(count) / "stories" / f"train-data{shard:02}.jsonl").write_text("".join(lines))
        fresh = itertools.count()

        def encode(count: int) -> float:
            target = Path(folder) / f"tokens{next(fresh)}"
            began = time.perf_counter()
            manifest = shards.encode_splits(Path(folder) / str(count), tokenizer, target, 0.0)
            return manifest["bytes"]["train"] / 1e6 / (time.perf_counter() - began)

        found = ratio(
            "encoding",
            "MB/s",
            ("two processes", lambda: encode(2)),
            ("one process", lambda: encode(1)),
            effort.repeats,
            target="10 MB/s with two cores",
        )
    return found | {"note": f"{copies * size / 1e6:.1f} MB: the embedded sample over and over, vocabulary of `{name}`"}


def sampled_model(preset: Preset, folder: Path) -> tuple[Path, str]:
    """A folder with a model to sample from, and what it is: the released one, the preset's run, or random weights."""
    for path, name in (
        (ROOT / "release", "the released model"),
        (preset.folder / "run" / "model", f"the run of {preset.name}"),
    ):
        if (path / "model.safetensors").is_file():
            return path, name
    tokenizer = pipeline.tokenizer(configuration.load("smoke"))
    model = LanguageModel(preset.model, seed=1)
    with torch.no_grad():  # as peaked as a trained model, which decides how long a token is searched for
        model.model["norm"].weight.mul_(25)
    save_model(folder, model, tokenizer)
    return folder, f"random weights in the shape of {preset.name}"


@torch.inference_mode()
def bench_sampling(preset: Preset, effort: Effort, batch_sizes: tuple[int, ...] = (1, 16)) -> list[dict]:
    """Our sampling against `generate` of transformers, same weights, float32, CPU, in tokens per second.

    A third figure, `products`, is the rate at which the model's matrix products alone would yield tokens: no
    float32 implementation that computes them can be faster.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        why = "transformers is not installed"
        command = "pip install transformers; python -m blm_core bench"
        return [{"question": f"sampling, batch {size}", "not_measured": why, "command": command} for size in batch_sizes]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, name = sampled_model(preset, Path(temporary))
        ours, tokenizer = load_model(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        tokens = min(effort.tokens, ours.config.seq_len - 8)
        sampling = Sampling(max_tokens=tokens)
        prompt = [tokenizer.eot, *tokenizer.encode("Once")][:4]
        for size in batch_sizes:
            inputs = torch.tensor([prompt] * size)

            def write_ours(size=size) -> float:
                began = time.perf_counter()
                steps = sum(1 for _ in sample_tokens(ours, [prompt] * size, sampling, eot=-1))  # nothing ends early
                return steps * size / (time.perf_counter() - began)

            def write_theirs(size=size, inputs=inputs) -> float:
                began = time.perf_counter()
                written = theirs.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    do_sample=True,
                    temperature=sampling.temperature,
                    top_k=0,
                    top_p=sampling.top_p,
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                    pad_token_id=tokenizer.eot,
                )
                return (written.shape[1] - inputs.shape[1]) * size / (time.perf_counter() - began)

            write_ours(), write_theirs()
            found = ratio(
                f"sampling, batch {size}, CPU",
                "tokens/s",
                ("this project", write_ours),
                ("transformers", write_theirs),
                effort.repeats,
                target="5",
            )
            limit = _products_per_second(Decoder(ours), size, tokens)
            rows.append(
                found
                | {
                    "products": limit,
                    "note": f"{name}, {tokens} tokens; the matrix products alone would give {limit:,.0f} tokens/s, "
                    f"{limit / found['b']['median']:.1f} times transformers",
                }
            )
    return rows


def _products_per_second(decoder: Decoder, batch_size: int, tokens: int) -> float:
    """Tokens per second if a step were nothing but the products of the activations with the weights."""
    matrices = [matrix for layer in decoder.layers for matrix in layer] + [decoder.head]
    inputs = [torch.randn(batch_size, matrix.shape[0]) for matrix in matrices]
    began = time.perf_counter()
    for _ in range(tokens):
        for x, matrix in zip(inputs, matrices, strict=True):
            torch.mm(x, matrix)
    return tokens * batch_size / (time.perf_counter() - began)


def bench(names: list[str] | None = None, device: str = "auto", effort: Effort | None = None) -> dict:
    """Everything, for the presets called `names` (default: all), as plain values for JSON. Under four minutes on two cores.

    Raises ConfigError for an unknown preset.
    """
    effort = effort or Effort()
    presets = [configuration.load(name) for name in names or configuration.PRESETS]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where, cpu = torch.device(device), torch.device("cpu")
    training = [row for preset in presets for row in bench_preset(preset, where, effort)]
    if where.type == "cpu" and all(preset.name != "a100" for preset in presets):
        training += bench_preset(configuration.PRESETS["a100"], where, effort)
    small = [preset for preset in presets if flops_per_token(preset.model) * preset.tokens_per_step <= MOST_FLOPS_ON_CPU]
    ratios = []
    if small:
        shape = max(small, key=lambda preset: flops_per_token(preset.model))
        ratios += [bench_loops(shape, effort), bench_encoding(effort), *bench_sampling(shape, effort)]
    if not fast_bfloat16(cpu):
        ratios.append(
            {
                "question": "training in bfloat16, CPU",
                "target": "1.5",
                "not_measured": "this CPU has no bfloat16 instructions",
                "command": "python -m blm_core bench --presets cpu",
            }
        )
    return {
        "device": device_name(where),
        "device_type": where.type,
        "cpu": device_name(cpu),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "effort": dataclasses.asdict(effort),
        "mfu_formula": MFU_FORMULA,
        "training": training,
        "ratios": ratios,
    }


def default_path(result: dict) -> Path:
    """Where the benchmarks are kept, one for each device."""
    name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    return BENCHMARKS / f"{name}.json"


def save(result: dict, path: Path | None = None) -> Path:
    """Write `result` to `path` (default: named by the device); where it lies."""
    path = Path(path or default_path(result))
    write_json(path, result)
    return path


def read(path: Path) -> dict:
    """What `save` wrote. Raises ConfigError where `path` holds anything else."""
    result = read_json(path)
    if not isinstance(result, dict) or not {"device", "device_type", "training", "ratios"} <= set(result):
        raise ConfigError(f"{path} holds no benchmark. Make one with `python -m blm_core bench --out {path}`.")
    return result


def tables(result: dict) -> str:
    """`result` in Markdown: the machine, a table of training and one of ratios, then what is missing and how to get it."""
    software = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    parts = [
        f"{result['device']}" + (f"; CPU: {result['cpu']}" if result["cpu"] != result["device"] else ""),
        f"{software}; {result['date']}",
        markdown_table(*training_table(result)),
        f"MFU = {result['mfu_formula']}.",
        markdown_table(*ratio_table(result)),
        "By turns; median, and in brackets the lowest and the highest.",
    ]
    parts += [f"- {row['question']}: {row['note']}" for row in result["ratios"] if "note" in row]
    missing = [
        f"- {row.get('question') or row['preset']}: {NOT_MEASURED}, {row['not_measured']}; `{row['command']}`"
        for row in result["training"] + result["ratios"]
        if "not_measured" in row
    ]
    unread = {row["energy_unread"] for row in result["training"] if row.get("energy_unread")}
    parts += missing + [f"- energy: {NOT_MEASURED}, {why}" for why in sorted(unread)]
    micro = [row for row in result["training"] if row.get("micro_batches")]
    for row in micro:
        sizes = (
            f"{found['micro_batch_size']}: {_number(found['tokens_per_second'], 'out of memory')}"
            for found in row["micro_batches"]
        )
        parts.append(f"- {row['preset']}, tokens/s by micro-batch: {', '.join(sizes)}")
    return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", "\n\n".join(parts))


def training_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of training: one row per preset and mode."""
    shares = tuple(f"{part}, %" for part in PARTS)
    header = ("preset", "parameters", "mode", "tokens/s", "TFLOP/s", "MFU", *shares, "memory, GB", "W", "mJ/token")
    rows = []
    for row in result["training"]:
        first = (f"`{row['preset']}`", f"{row['parameters'] / 1e6:.2f} M")
        if "not_measured" in row:
            rows.append((*first, row.get("mode", ""), *[NOT_MEASURED] * (len(header) - 3)))
            continue
        mode = f"{row['mode']}, {row['dtype']}, {row['micro_batch_size']} x {row['seq_len']}"
        energy = row["joules_per_token"]
        rows.append(
            (
                *first,
                mode + (", random tokens" if row["tokens"] == "random" else ""),
                f"{row['tokens_per_second']:,}",
                f"{row['tflops']:.3g}",
                _number(row["mfu"]),
                *(f"{100 * row['shares'][part]:.1f}" for part in PARTS),
                _number(row["memory_gb"]),
                _number(row["watts"]),
                _number(energy and 1000 * energy),
            )
        )
    return header, rows


def ratio_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of the ratios: what was measured by turns, both sides, and the target."""
    rows = []
    for row in result["ratios"]:
        if "not_measured" in row:
            rows.append((row["question"], *[NOT_MEASURED] * 4, row.get("target", "")))
            continue
        a, b = (f"{row[side]['name']}: {_interval(row[side])}" for side in ("a", "b"))
        rows.append((row["question"], row["unit"], a, b, _interval(row["ratio"]), row["target"]))
    return ("what", "unit", "A", "B", "A / B", "target"), rows


def _interval(spread: dict) -> str:
    return f"{_number(spread['median'])} [{_number(spread['low'])}, {_number(spread['high'])}]"


def _number(value: float | None, absent: str = NOT_MEASURED) -> str:
    if value is None:
        return absent
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
