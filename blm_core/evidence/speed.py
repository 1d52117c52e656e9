"""How fast: training, sampling and encoding, what generation costs beside GPT2-XL, and a rehearsal for an accelerator.

- Two things are compared by turns, A B A B, so that a machine that slows down slows both; the ratio is that of each turn
- Training is timed on the real step of a preset, on its own tokens where they are made, else on random ones
- Speed and memory do not depend on the values of the weights: where GPT2-XL cannot be loaded, its architecture with random
  weights stands in, and the result says so. Each model runs in a process of its own, so that memory does not mix
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from blm_core import config as configuration
from blm_core import data, pipeline
from blm_core import tokens as shards
from blm_core.checkpoint import load_model
from blm_core.config import ROOT, ConfigError, Preset
from blm_core.evidence.models import BLM, GPT2_XL, PUBLISHED, TransformersModel, UnavailableError, random_gpt2, versions
from blm_core.evidence.publish import markdown_table
from blm_core.files import read_json, write_json
from blm_core.generate import Sampling, sample_tokens
from blm_core.hardware import PowerSampler, device_name, memory, mfu, reset_memory, resolve_dtype
from blm_core.model import KeyValueCache, LanguageModel, flops_per_token, parameter_counts
from blm_core.optimizer import learning_rate, make_optimizers
from blm_core.tokens import Batches, TokenStories
from blm_core.train import Processes, _compiled, _step

BENCHMARKS = ROOT / "runs" / "bench"
MOST_FLOPS_ON_CPU = 5e12  # of one step: above, it takes minutes
FIRST_MICRO_BATCH = 8  # smaller ones leave any GPU idle


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 5.0  # of steps for each figure of training
    repeats: int = 3  # of each side of a ratio
    megabytes: float = 8.0  # of text to encode
    tokens: int = 64  # to sample per text
    compile: bool = True  # also compiled, where the preset asks for compilation


QUICK = Effort(seconds=0.2, repeats=2, megabytes=0.2, tokens=8, compile=False)


def by_turns(question: str, unit: str, a: tuple, b: tuple, repeats: int, **known) -> dict:
    """Measure A and B by turns; `a` and `b` are (name, function that gives a rate)."""
    rates = {"a": [], "b": []}
    for _ in range(repeats):
        rates["a"].append(a[1]())
        rates["b"].append(b[1]())
    turns = [x / y for x, y in zip(rates["a"], rates["b"], strict=True)]
    sides = {side: {"name": name, **spread(rates[side])} for side, name in (("a", a[0]), ("b", b[0]))}
    return {"question": question, "unit": unit, **sides, "ratio": spread(turns), **known}


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "values": values}


# ---- Training


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


class Loop:
    """The training loop of a preset, to be run for a few steps at a time. A context manager."""

    def __init__(self, preset: Preset, device: torch.device, compile: bool = False, torch_dropout: float = 0.0):
        self.preset, self.device, self.compiled, self.why_eager = preset, device, False, "not asked for"
        self.stories, self.tokens = training_stories(preset)
        self.model = LanguageModel(preset.model, preset.train.seed).to(device).train()
        if torch_dropout:  # a random number for each element, as nn.Dropout draws them, in the same places
            for block in self.model.model["layers"]:
                for part in (block.self_attn, block.mlp):
                    part.register_forward_hook(lambda module, inputs, y: F.dropout(y, torch_dropout))
            self.model.model["embed_tokens"].register_forward_hook(lambda module, inputs, y: F.dropout(y, torch_dropout))
        self.optimizers = make_optimizers(self.model, preset.train)
        self.loss_of = self.model
        if compile:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                self.loss_of = _compiled(self.model, preset, device)
            self.compiled = self.loss_of is not self.model
            self.why_eager = str(said[-1].message)[:200] if said and not self.compiled else ""
        batches = Batches(self.stories, preset.model.seq_len, preset.train.batch_size, preset.train.seed)
        self._batches = batches.prefetched(range(2**31))
        self.step, self.losses = 0, []

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._batches.close()

    def run(self, steps: int) -> float:
        """Seconds that `steps` steps take; their losses are kept in `losses`."""
        config, losses = self.preset.train, []
        began = now(self.device)
        for _ in range(steps):
            lr = learning_rate(min(self.step, config.steps - 1), config)
            here = Processes(0, 1, self.device)
            losses.append(_step(self.loss_of, self.model, self.optimizers, next(self._batches), lr, config, here)[0])
            self.step += 1
        seconds = now(self.device) - began
        self.losses += [float(loss) for loss in losses]
        return seconds

    def rate(self, steps: int) -> float:
        """Tokens per second over `steps` steps."""
        return steps * self.preset.tokens_per_step / self.run(steps)


class PlainLoop:
    """A float32 loop as a first attempt has it: eager, `.item()` in every step, batches sliced from a Python list."""

    def __init__(self, preset: Preset):
        self.preset, self.step, self.losses = preset, 0, []
        stories, _ = training_stories(preset)
        self.tokens = [int(token) for i in range(min(len(stories), 5000)) for token in stories[i]]
        self.model = LanguageModel(dataclasses.replace(preset.model, dropout=0.0), preset.train.seed).train()
        c = preset.train
        options = {"betas": (c.beta1, c.beta2), "weight_decay": c.weight_decay, "foreach": False, "fused": False}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), c.learning_rate, **options)

    def rate(self, steps: int) -> float:
        """Tokens per second over `steps` steps."""
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
            self.losses.append(loss.item())
            self.step += 1
        return steps * self.preset.tokens_per_step / (time.perf_counter() - began)


def now(device: torch.device) -> float:
    """Seconds, when `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def changed(preset: Preset, **train) -> Preset:
    return dataclasses.replace(preset, train=dataclasses.replace(preset.train, **train))


def fastest_micro_batch(batch_size: int, measure, first: int = FIRST_MICRO_BATCH) -> tuple[int, list[dict]]:
    """Double the micro-batch until memory runs out or the batch is whole; the fastest size, and what each gave.

    `measure` gives tokens per second and GB for a size, or raises torch.cuda.OutOfMemoryError. Sizes that do not divide the
    batch are not tried. Raises that error where not even the first size fits.
    """
    tried, size = [], min(first, batch_size)
    while size <= batch_size and batch_size % size == 0:
        try:
            rate, gigabytes = measure(size)
        except torch.cuda.OutOfMemoryError:
            if not tried:
                raise
            tried.append({"micro_batch_size": size, "tokens_per_second": None, "memory_gb": None})  # out of memory
            break
        tried.append({"micro_batch_size": size, "tokens_per_second": round(rate), "memory_gb": gigabytes})
        size *= 2
    return max(tried, key=lambda found: found["tokens_per_second"] or 0)["micro_batch_size"], tried


def micro_batches(preset: Preset, device: torch.device, compile: bool = False) -> tuple[int, list[dict]]:
    """`fastest_micro_batch` on real steps of `preset`."""

    def measure(size: int) -> tuple[float, float | None]:
        try:
            reset_memory(device)
            with Loop(changed(preset, micro_batch_size=size), device, compile) as loop:
                loop.run(1)
                return loop.rate(1), memory(device)
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # else the next size finds the memory in pieces

    return fastest_micro_batch(preset.train.batch_size, measure)


def training_rows(preset: Preset, device: torch.device, effort: Effort, tried: list[dict] | None = None) -> list[dict]:
    """A row of `preset` eager, and one compiled where it asks for that; on CUDA with the fastest micro-batch.

    With `tried`, what `micro_batches` found before, `preset` has the fastest already.
    """
    row = {"preset": preset.name, "parameters": parameter_counts(preset.model)["total"]}
    row["command"] = f"python -m blm_core.evidence bench --presets {preset.name}"
    if device.type == "cpu" and flops_per_token(preset.model) * preset.tokens_per_step > MOST_FLOPS_ON_CPU:
        return [row | {"not_measured": "its steps are too large for a CPU"}]
    if device.type == "cuda" and tried is None:
        size, tried = micro_batches(preset, device)
        preset = changed(preset, micro_batch_size=size)
    return [
        row | _training_row(preset, device, effort, compile) | {"micro_batches": tried}
        for compile in ((False, True) if effort.compile and preset.train.compile else (False,))
    ]


def _training_row(preset: Preset, device: torch.device, effort: Effort, compile: bool) -> dict:
    reset_memory(device)
    with Loop(preset, device, compile) as loop:
        if compile and not loop.compiled:
            return {"mode": "compiled", "not_measured": loop.why_eager}
        loop.run(1)
        steps = max(1, round(effort.seconds / loop.run(1)))
        power = PowerSampler(device)
        rate = loop.rate(steps)
        watts = power.watts()
        power.close()
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
        "memory_gb": memory(device),
        "watts": watts,
    }


def training_ratios(preset: Preset, device: torch.device, effort: Effort) -> list[dict]:
    """By turns, in tokens per second: against a plain loop, isolation on and off, cheap dropout against torch's."""
    compile = effort.compile and preset.train.compile
    with contextlib.ExitStack() as stack:

        def loop(part: Preset, **options) -> Loop:
            made = stack.enter_context(Loop(part, device, compile, **options))
            made.run(1)
            return made

        ours = loop(preset)
        steps = max(1, round(effort.seconds / 2 / ours.run(1)))
        name = f"{resolve_dtype(device, preset.train.dtype)}, {'compiled' if ours.compiled else 'eager'}"
        what = f"shape of {preset.name}"
        rows, mine = [], lambda: ours.rate(steps)
        if device.type == "cpu":
            plain = PlainLoop(preset)
            plain.rate(1)
            other = ("plain float32 loop", lambda: plain.rate(steps))
            rows.append(by_turns(f"training, {what}", "tokens/s", (f"this project ({name})", mine), other, effort.repeats))
        turned = loop(changed(preset, isolate_stories=not preset.train.isolate_stories))
        sides = [("isolated", mine), ("shared", lambda: turned.rate(steps))]
        if not preset.train.isolate_stories:
            sides = [("isolated", sides[1][1]), ("shared", mine)]
        rows.append(by_turns(f"stories of a window isolated, {what}", "tokens/s", *sides, effort.repeats))
        if rate := preset.model.dropout:
            without = dataclasses.replace(preset, model=dataclasses.replace(preset.model, dropout=0.0))
            old, none = loop(without, torch_dropout=rate), loop(without)
            eight = (f"eight to a random number, {rate:g}", mine)
            question = f"dropout, {what}"
            rows.append(by_turns(question, "tokens/s", eight, ("nn.Dropout", lambda: old.rate(steps)), effort.repeats))
            rows.append(by_turns(question, "tokens/s", eight, ("none", lambda: none.rate(steps)), effort.repeats))
    return rows


# ---- Encoding and sampling


def encoding_ratio(effort: Effort) -> dict:
    """Encoding in two processes against one, in MB of text per second, start of the processes included."""
    preset = configuration.load("smoke")
    pipeline.stories(preset)
    own = list(data.read_split(preset.folder / "data", "train"))
    tokenizer, size = pipeline.tokenizer(preset), sum(len(story.encode()) for story in own)
    copies = max(2, round(effort.megabytes * 1e6 / size))
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            (Path(folder) / str(count) / "stories").mkdir(parents=True)
            for shard in range(count):
                lines = [json.dumps({"story": story}) + "\n" for story in own] * (copies // count)
                (Path(folder) / str(count) / "stories" / f"train-data{shard:02}.jsonl").write_text("".join(lines))
        fresh = itertools.count()

        def encode(count: int) -> float:
            began = time.perf_counter()
            made = shards.encode_splits(Path(folder) / str(count), tokenizer, Path(folder) / f"tokens{next(fresh)}", 0.0)
            return made["bytes"]["train"] / 1e6 / (time.perf_counter() - began)

        sides = ("two processes", lambda: encode(2)), ("one process", lambda: encode(1))
        return by_turns("encoding, vocabulary of smoke", "MB/s", *sides, effort.repeats)


@torch.inference_mode()
def sampling_ratio(folder: Path, effort: Effort, batch_size: int) -> dict:
    """Our sampling against `generate` of transformers: the model in `folder`, float32, CPU, tokens per second."""
    from transformers import AutoModelForCausalLM

    ours, tokenizer = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokens = min(effort.tokens, ours.config.seq_len - 8)
    sampling = Sampling(max_tokens=tokens)
    prompt = [tokenizer.eot, *tokenizer.encode("Once")][:4]
    inputs = torch.tensor([prompt] * batch_size)
    options = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}
    options |= {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": tokenizer.eot}

    def write_ours() -> float:
        began = time.perf_counter()
        steps = sum(1 for _ in sample_tokens(ours, [prompt] * batch_size, sampling, eot=-1))  # nothing ends early
        return steps * batch_size / (time.perf_counter() - began)

    def write_theirs() -> float:
        began = time.perf_counter()
        written = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        return (written.shape[1] - inputs.shape[1]) * batch_size / (time.perf_counter() - began)

    write_ours(), write_theirs()
    sides = ("this project", write_ours), ("transformers", write_theirs)
    return by_turns(f"sampling, batch {batch_size}, {Path(folder).name}", "tokens/s", *sides, effort.repeats)


# ---- The benchmark: all of it, in one file for each machine


def bench(names: list[str] | None = None, device: str = "auto", effort: Effort | None = None) -> dict:
    """Everything, for the presets called `names` (default: all), as plain values for JSON. Raises ConfigError."""
    effort = effort or Effort()
    presets = [configuration.load(name) for name in names or configuration.PRESETS]
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    rows = [row for preset in presets for row in training_rows(preset, where, effort)]
    small = [p for p in presets if where.type == "cuda" or flops_per_token(p.model) * p.tokens_per_step <= MOST_FLOPS_ON_CPU]
    ratios = []
    if small:
        ratios += training_ratios(max(small, key=lambda preset: flops_per_token(preset.model)), where, effort)
    ratios.append(encoding_ratio(effort))
    if (ROOT / "release" / "model.safetensors").is_file():
        ratios += [sampling_ratio(ROOT / "release", effort, size) for size in (1, 16)]
    cpu = torch.device("cpu")
    return {
        "device": device_name(where),
        "device_type": where.type,
        "cpu": device_name(cpu),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "effort": dataclasses.asdict(effort),
        "training": rows,
        "ratios": ratios,
    }


def save(result: dict, path: Path | None = None) -> Path:
    """Write `result` to `path` (default: named by the device); where it lies."""
    name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    path = Path(path or BENCHMARKS / f"{name}.json")
    write_json(path, result)
    return path


def read(path: Path) -> dict:
    """What `save` wrote. Raises ConfigError where `path` holds anything else."""
    result = read_json(path)
    if not isinstance(result, dict) or not {"device", "device_type", "training", "ratios"} <= set(result):
        raise ConfigError(f"{path} holds no benchmark. Make one with `python -m blm_core.evidence bench --out {path}`.")
    return result


def training_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of training: one row per preset and mode."""
    rows = []
    for row in result["training"]:
        first = (row["preset"], f"{row['parameters'] / 1e6:.2f} M")
        if "not_measured" in row:
            rows.append((*first, row.get("mode", ""), *["not measured"] * 4))
            continue
        mode = f"{row['mode']}, {row['dtype']}, {row['micro_batch_size']} x {row['seq_len']}"
        figures = (_number(row[key]) for key in ("mfu", "memory_gb", "watts"))
        rows.append((*first, mode, f"{row['tokens_per_second']:,}", *figures))
    return ("preset", "parameters", "mode", "tokens/s", "MFU", "memory, GB", "W"), rows


def ratio_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of what was measured by turns: median, and in brackets the lowest and the highest."""
    rows = []
    for row in (row for row in result["ratios"] if "ratio" in row):
        a, b = (f"{row[side]['name']}: {_number(row[side]['median'])}" for side in ("a", "b"))
        rows.append((row["question"], row["unit"], a, b, _spread(row["ratio"])))
    return ("what", "unit", "A", "B", "A / B"), rows


def tables(result: dict) -> str:
    """`result` in Markdown: the machine, a table of training and one of ratios, then what is missing and how to get it."""
    software = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    missing = [f"- {r['preset']}: {r['not_measured']}; `{r['command']}`" for r in result["training"] if "not_measured" in r]
    parts = [f"{result['device']}; {software}; {result['date']}", markdown_table(*training_table(result))]
    return "\n\n".join([*parts, "\n".join(missing), markdown_table(*ratio_table(result))])


def _spread(found: dict) -> str:
    return f"{_number(found['median'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _number(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---- What generation costs beside GPT2-XL


class CostError(RuntimeError):
    """A measurement that did not come to its end."""


@dataclass(frozen=True)
class CostSettings:
    """One turn reads `prefill` tokens at once and then writes `generated` tokens one by one, one text at a time."""

    prefill: int = 96
    generated: int = 32
    repeats: int = 3
    device: str = "cpu"
    dtype: str = "float32"  # of the opponent's weights; the BLM runs in float32
    threads: int = 0  # 0: as many as torch takes


def measure_cost(
    folder: Path, opponent: str | dict = "gpt2-xl", settings: CostSettings | None = None, random: bool = False
) -> dict:
    """`machine`, `settings`, `time` and `models`, the BLM in `folder` first, then the opponent, timed by turns.

    `opponent` is a folder or hub name for transformers, or an architecture of GPT-2 (dict) with random weights; `random`
    fills GPT2-XL's without trying to load it. Raises CostError where a measurement fails.
    """
    settings = settings or CostSettings()
    theirs = {"name": "gpt2", "architecture": opponent, "source": None}
    if not isinstance(opponent, dict):
        name = Path(opponent).name
        theirs = {"name": name, "source": None if random else opponent, "architecture": GPT2_XL if name == "gpt2-xl" else None}
        if random and name != "gpt2-xl":
            raise CostError(f"the architecture of {name!r} is not known here; only gpt2-xl can be random.")
    specs = [{"name": "BLM", "folder": str(Path(folder).resolve())}, theirs]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker(spec, settings)) for spec in specs]
        for _ in range(settings.repeats + 1):  # the first turn sets up kernels and memory
            for worker in workers:
                worker.turn()
        models = [worker.result(settings) for worker in workers]
    result = {"device": device_name(torch.device(settings.device)), "settings": dataclasses.asdict(settings)}
    return result | {"time": datetime.now(UTC).isoformat(timespec="seconds"), "models": models}


class _Worker:
    """A process of its own that holds one model and does one turn when it is told to. A context manager."""

    def __init__(self, spec: dict, settings: CostSettings):
        self.name, self.times = spec["name"], []
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        task = json.dumps({"spec": spec, "settings": dataclasses.asdict(settings)})
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        command = [sys.executable, "-m", "blm_core.evidence.speed", task]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "text": True}
        self._process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()

    def _ask(self, what: str) -> dict:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()[-1:] or ["no message"]
            killed = " (killed; most likely there was not enough memory)" if status in (-9, 137) else ""
            raise CostError(f"measuring {self.name} ended with status {status}{killed}: {said[0]}")
        return json.loads(line)

    def turn(self) -> None:
        self.times.append(self._ask("turn"))

    def result(self, settings: CostSettings) -> dict:
        found = self._ask("facts")
        for name, count in (("prefill", settings.prefill), ("generation", settings.generated)):
            speed = spread([count / times[name] for times in self.times[1:]])
            found[f"{name}_tokens_per_second"] = speed
            found[f"{name}_bytes_per_second"] = spread([value * found["bytes_per_token"] for value in speed["values"]])
        return found


def _work(spec: dict, settings: CostSettings) -> None:
    """The other side of `_Worker`: answer each line of standard input with a line of JSON."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model, found = None, {}
    for line in sys.stdin:
        if model is None:
            model, found = _loaded(spec, settings)
            device = torch.device(settings.device)
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(found["vocabulary"], (1, settings.prefill), generator=generator).to(device)
        if line.strip() == "turn":
            answer = _turn(model, tokens, settings.generated, device)
        else:
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            count = sum(weight.numel() for weight in model.parameters())
            answer = found | {"parameters": count, "dtype": dtype, "peak_memory_gb": memory(device), "versions": versions()}
        print(json.dumps(answer), flush=True)


@torch.inference_mode()
def _turn(model: torch.nn.Module, tokens: torch.Tensor, generated: int, device: torch.device) -> dict:
    """Seconds to read `tokens` and to write `generated` more behind a cache."""
    theirs = hasattr(model, "generate")  # transformers
    cache = None if theirs else KeyValueCache(model.config, 1, device)

    def read(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal cache
        if not theirs:
            return model(tokens, cache=cache)[:, -1]
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        return out.logits[:, -1]

    start = now(device)
    logits = read(tokens)
    middle = now(device)
    for _ in range(generated):
        logits = read(logits.argmax(-1, keepdim=True))
    return {"prefill": middle - start, "generation": now(device) - middle}


def _loaded(spec: dict, settings: CostSettings) -> tuple[torch.nn.Module, dict]:
    """The model of `spec` and what is known of its weights: trained or random, bytes on disk and of text in a token."""
    if "folder" in spec:
        blm = BLM(spec["folder"], settings.device)
        size = sum(path.stat().st_size for path in Path(spec["folder"]).iterdir() if path.is_file())
        found = {"weights": "trained", "revision": blm.revision, "disk_bytes": size, "vocabulary": len(blm.tokenizer)}
        return blm.model, {"name": spec["name"], **found, "bytes_per_token": _bytes_per_token(blm.tokenizer.encode)}
    dtype = getattr(torch, settings.dtype)
    why = "random weights were asked for"
    if spec["source"]:
        try:
            theirs = TransformersModel(spec["source"], settings.device, dtype)
        except UnavailableError as error:
            if not spec["architecture"]:
                raise
            why = str(error)
        else:
            found = {"weights": "trained", "revision": theirs.revision, "disk_bytes": _bytes(theirs.model)}
            held = _bytes_per_token(lambda text: theirs.encode(text)[1:])
            return theirs.model, {"name": spec["name"], **found, "vocabulary": len(theirs.tokenizer), "bytes_per_token": held}
    model = random_gpt2(spec["architecture"], dtype, settings.device)
    found = {"weights": "random", "weights_why": why, "revision": None, "disk_bytes": _bytes(model)}
    published = PUBLISHED["characters"] / PUBLISHED["tokens"]  # of TinyStories text in GPT-2's vocabulary
    return model, {"name": spec["name"], **found, "vocabulary": model.config.vocab_size, "bytes_per_token": published}


def _bytes_per_token(encode) -> float:
    """Bytes of story text in a token, on the embedded sample."""
    records = [record for path in sorted((ROOT / "blm_core" / "sample").glob("*.json")) for record in read_json(path)]
    stories = [record["story"] for record in records if record.get("story")]
    return sum(len(story.encode()) for story in stories) / sum(len(encode(story)) for story in stories)


def _bytes(model: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def read_cost(path: Path) -> dict:
    """What `measure_cost` found and the command `cost` wrote. Raises UnavailableError."""
    result = read_json(path)
    if not isinstance(result, dict) or not all("peak_memory_gb" in model for model in result.get("models", [{}])):
        raise UnavailableError(
            f"{path} holds no measured costs. Make them with `python -m blm_core.evidence cost --out {path}`."
        )
    return result


def cost_line(result: dict) -> dict:
    """For each figure `ratio`, ours over theirs, and `verdict`.

    A speed wins if it is higher in every turn, and loses if lower in every one; counted figures (parameters, bytes, memory)
    have no spread.
    """
    ours, theirs = result["models"]
    line = {}
    for name in ("parameters", "disk_bytes", "peak_memory_gb"):
        a, b = ours[name], theirs[name]
        line[name] = {"ratio": a / b, "verdict": "wins" if a < b else "loses" if a > b else "undecided"}
    for name in ("prefill_bytes_per_second", "generation_bytes_per_second"):
        turns = spread([a / b for a, b in zip(ours[name]["values"], theirs[name]["values"], strict=True)])
        outcome = "wins" if turns["low"] > 1 else "loses" if turns["high"] < 1 else "undecided"
        line[name] = {"ratio": turns["median"], "low": turns["low"], "high": turns["high"], "verdict": outcome}
    return line


def cost_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of a table: one row per figure, one column per model, and the ratio; random weights are named."""
    ours, theirs = result["models"]
    line = cost_line(result)
    rows = [
        ("parameters", f"{ours['parameters']:,}", f"{theirs['parameters']:,}", _number(1 / line["parameters"]["ratio"])),
        ("MB on disk", *(f"{m['disk_bytes'] / 1e6:,.0f}" for m in (ours, theirs)), _number(1 / line["disk_bytes"]["ratio"])),
        ("peak memory, GB", *(_number(m["peak_memory_gb"]) for m in (ours, theirs)), ""),
    ]
    for label, kind in (("read", "prefill"), ("written", "generation")):
        tokens = (_number(m[f"{kind}_tokens_per_second"]["median"]) for m in (ours, theirs))
        rows.append((f"tokens {label} per second", *tokens, ""))
        text, turns = f"{kind}_bytes_per_second", line[f"{kind}_bytes_per_second"]
        ratio = _spread(turns | {"median": turns["ratio"]})
        rows.append((f"bytes of text {label} per second", *(_number(m[text]["median"]) for m in (ours, theirs)), ratio))
    return ("", "BLM", f"{theirs['name']} ({theirs['weights']} weights)", "times"), rows


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    _work(task["spec"], CostSettings(**task["settings"]))
