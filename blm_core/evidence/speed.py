"""How fast: training, sampling and encoding, and what a model costs beside GPT2-XL.

- Two things are compared by turns, A B A B, so that a machine that slows down slows both; the ratio is that of each turn
- Training is timed on the real step of a preset, on its own stories where they are encoded, else on those of the sample
- Speed does not depend on the values of the weights: where GPT2-XL is not at hand, its architecture with random weights
  stands in, and the result says so
"""

import contextlib
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch

from blm_core import config as configuration
from blm_core import data, pipeline
from blm_core import tokens as shards
from blm_core.checkpoint import load_model
from blm_core.config import ROOT, ConfigError, Preset
from blm_core.evidence.models import GPT2_XL, PUBLISHED, load, random_gpt2, versions
from blm_core.files import read_json, write_json
from blm_core.generate import Sampling, sample_tokens
from blm_core.hardware import PowerSampler, device_name, find_device, memory, mfu, resolve_dtype
from blm_core.model import KeyValueCache, LanguageModel, flops_per_token, parameter_counts
from blm_core.optimizer import learning_rate, make_optimizers
from blm_core.tokens import Batches, TokenStories
from blm_core.train import Processes, _compiled, _step

BENCHMARKS = ROOT / "runs" / "bench"
SECONDS, REPEATS = 5.0, 3  # of training steps for a figure; of the turns of a ratio
READ, WRITTEN = 96, 32  # tokens in a turn beside GPT2-XL
FIRST_MICRO_BATCH = 8  # smaller ones leave any GPU idle
NEARLY = 0.97  # as fast as the fastest: the rest is noise


def by_turns(question: str, unit: str, a: tuple, b: tuple, repeats: int) -> dict:
    """Measure A and B by turns; `a` and `b` are (name, function that gives a rate).

    A first turn sets up kernels and memory, and does not count.
    """
    turns = [(a[1](), b[1]()) for _ in range(repeats + 1)][1:]
    sides = {"a": {"name": a[0], **spread([x for x, _ in turns])}, "b": {"name": b[0], **spread([y for _, y in turns])}}
    return {"question": question, "unit": unit, **sides, "ratio": spread([x / y for x, y in turns])}


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "values": values}


def rate_of(amount: float, work: Callable) -> float:
    """`amount` over the seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return amount / (time.perf_counter() - began)


def machine(device: torch.device) -> dict:
    """What every file of figures says of where and when it was made."""
    return {"device": device_name(device), "versions": versions(), "date": datetime.now(UTC).isoformat(timespec="seconds")}


# ---- Training


def training_stories(preset: Preset) -> TokenStories:
    """The encoded training stories of `preset`, or where there are none those of the sample: its tokens fit every model."""
    if not read_json(preset.folder / "tokens" / "manifest.json"):
        preset = configuration.load("smoke")
        pipeline.tokens(preset)
    return TokenStories(preset.folder / "tokens", "train")


class Loop:
    """The training loop of a preset, without teachers, to be run for a few steps at a time.

    One loop serves every measurement of a preset, since compiling takes most of a minute on a GPU: it is compiled anew only
    where the size of the micro-batch changes, and once each for stories that are isolated and that are not.
    """

    def __init__(self, preset: Preset, device: torch.device):
        self.preset, self.device = preset, device
        self.stories = training_stories(preset)
        self.model = LanguageModel(preset.model).to(device).train()
        self.loss_of, self.mode = self.model, "eager"
        self.restart()

    def restart(self, **train) -> None:
        """Back to step 0 and to fresh weights, with other settings of training from now on."""
        config = replace(self.preset.train, **train)
        self.preset = replace(self.preset, train=config)
        fresh = LanguageModel(self.preset.model, config.seed).state_dict()
        self.model.load_state_dict(fresh)  # in place, which leaves what is compiled as it is
        self.model.zero_grad(set_to_none=True)  # a step that ran out of memory left some
        self.optimizers = make_optimizers(self.model, config)
        batches = Batches(self.stories, self.preset.model.seq_len, config.batch_size, config.seed)
        self._batches = batches.prefetched(range(2**31))  # its thread ends with it
        self.losses: list[float] = []

    def compile(self) -> None:
        """Compile the model. Where that fails, steps stay eager with a warning on a CPU; a GPU raises RunError."""
        self.loss_of = _compiled(self.model, self.preset, self.device)
        self.mode = "eager" if self.loss_of is self.model else "compiled"

    def run(self, steps: int, **train) -> None:
        """Take `steps` steps, with other settings of training where given; their losses go to `losses`."""
        config, here, losses = replace(self.preset.train, **train), Processes(0, 1, self.device), []
        for step in range(len(self.losses), len(self.losses) + steps):
            lr = learning_rate(min(step, config.steps - 1), config)
            losses.append(_step(self.loss_of, self.model, self.optimizers, next(self._batches), lr, config, here)[0])
        self.losses += [float(loss) for loss in losses]  # waits for the device

    def rate(self, steps: int, **train) -> float:
        """Tokens per second over `steps` steps."""
        return rate_of(steps * self.preset.tokens_per_step, partial(self.run, steps, **train))

    def steps_in(self, seconds: float) -> int:
        """How many steps take about `seconds`, at least one; the first of all sets up kernels and memory."""
        self.run(1)
        return max(1, round(seconds * self.rate(1) / self.preset.tokens_per_step))


def reset_memory(device: torch.device) -> None:
    """Let the peak that `hardware.memory` tells begin anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else the next measurement finds the memory in pieces
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def choose_micro_batch(loop: Loop) -> list[dict]:
    """Double the micro-batch until memory runs out or the batch is whole, and restart with the fastest; the sizes that fit.

    Of sizes that are nearly as fast the smallest is taken. Those that do not divide the batch are not tried.
    Raises ConfigError where not even the first fits.
    """
    batch, tried = loop.preset.train.batch_size, []
    size = min(FIRST_MICRO_BATCH, batch)
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        while size <= batch and batch % size == 0:
            reset_memory(loop.device)
            rate = max(loop.rate(1, micro_batch_size=size) for _ in range(2))  # the first sets up kernels and memory
            tried.append({"micro_batch_size": size, "tokens_per_second": round(rate), "memory_gb": memory(loop.device)})
            size *= 2
    if not tried:
        raise ConfigError(f"micro-batches of {size} windows do not fit: of train.batch_size = {batch}, or of the GPU's memory.")
    fastest = max(found["tokens_per_second"] for found in tried)
    chosen = next(found for found in tried if found["tokens_per_second"] >= NEARLY * fastest)
    loop.restart(micro_batch_size=chosen["micro_batch_size"])
    return tried


def training_row(loop: Loop, seconds: float) -> dict:
    """Speed, memory and power of `loop` as it is."""
    preset, device = loop.preset, loop.device
    reset_memory(device)
    steps = loop.steps_in(seconds)
    with contextlib.closing(PowerSampler(device)) as power:
        rate = loop.rate(steps)
        watts = power.watts()
    return {
        "preset": preset.name,
        "parameters": parameter_counts(preset.model)["total"],
        "mode": loop.mode,
        "dtype": resolve_dtype(device, preset.train.dtype),
        "micro_batch_size": preset.train.micro_batch_size,
        "seq_len": preset.model.seq_len,
        "steps": steps,
        "tokens_per_second": round(rate),
        "mfu": mfu(rate * flops_per_token(preset.model), device),
        "memory_gb": memory(device),
        "watts": watts,
    }


def isolation_ratio(loop: Loop, seconds: float, repeats: int) -> dict:
    """Stories of a window isolated against shared, in tokens per second."""
    steps = loop.steps_in(seconds / 2)
    isolated, shared = (partial(loop.rate, steps, isolate_stories=isolated) for isolated in (True, False))
    question = f"stories of a window isolated, shape of {loop.preset.name}, {loop.mode}"
    return by_turns(question, "tokens/s", ("isolated", isolated), ("shared", shared), repeats)


def plain_ratio(loop: Loop, seconds: float, repeats: int) -> dict:
    """Steps of this project against those of a plain loop, in tokens per second, on the CPU."""
    preset, plain, steps = loop.preset, plain_loop(loop.preset), loop.steps_in(seconds / 2)
    ours = f"this project ({resolve_dtype(loop.device, preset.train.dtype)}, {loop.mode})", partial(loop.rate, steps)
    theirs = "plain float32 loop", partial(rate_of, steps * preset.tokens_per_step, lambda: list(islice(plain, steps)))
    return by_turns(f"training, shape of {preset.name}", "tokens/s", ours, theirs, repeats)


def plain_loop(preset: Preset) -> Iterator[float]:
    """The losses of a float32 loop as a first attempt has it: eager, batches cut from a list, `.item()` in every step."""
    B, T, stories = preset.train.batch_size, preset.model.seq_len, training_stories(preset)
    tokens = [int(token) for i in range(min(len(stories), 5000)) for token in stories[i]]
    model = LanguageModel(replace(preset.model, dropout=0.0), preset.train.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), preset.train.learning_rate, foreach=False)
    for step in count():
        starts = [row * T % (len(tokens) - T - 1) for row in range(step * B, step * B + B)]
        batch = torch.tensor([tokens[start : start + T + 1] for start in starts])
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), preset.train.max_grad_norm, foreach=False)
        optimizer.step()
        yield loss.item()


# ---- Encoding and sampling


def encoding_ratio(seconds: float, repeats: int) -> dict:
    """Encoding in two processes against one, in MB of text per second, start of the processes included."""
    preset = configuration.load("smoke")
    tokenizer = pipeline.tokenizer(preset)
    half = "".join(json.dumps({"story": story}) + "\n" for story in data.read_split(preset.folder / "data", "train"))
    half *= max(1, round(seconds * 1e6 / len(half)))

    def encode(*files: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "stories").mkdir()
            for number, lines in enumerate(files):
                (Path(folder) / "stories" / f"train-data{number:02}.jsonl").write_text(lines)
            work = partial(shards.encode_splits, Path(folder), tokenizer, Path(folder) / "tokens", 0.0)
            return rate_of(2 * len(half) / 1e6, work)

    sides = ("two processes", partial(encode, half, half)), ("one process", partial(encode, half + half))
    return by_turns("encoding, vocabulary of smoke", "MB/s", *sides, repeats)


def sampling_ratio(folder: Path, batch_size: int, tokens: int, repeats: int) -> dict:
    """Our sampling against `generate` of transformers: the model in `folder`, float32, CPU, tokens per second."""
    from transformers import AutoModelForCausalLM

    ours, tokenizer = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    prompts, sampling = [[tokenizer.eot, *tokenizer.encode("Once")][:4]] * batch_size, Sampling(max_tokens=tokens)
    options = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}
    options |= {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": tokenizer.eot}
    options |= {"inputs": torch.tensor(prompts), "attention_mask": torch.ones(batch_size, len(prompts[0]), dtype=torch.int64)}
    writers = {
        "this project": lambda: list(sample_tokens(ours, prompts, sampling, eot=-1)),  # nothing ends early
        "transformers": lambda: theirs.generate(**options),
    }
    sides = [(name, partial(rate_of, tokens * batch_size, write)) for name, write in writers.items()]
    return by_turns(f"sampling, batch {batch_size}, {Path(folder).name}", "tokens/s", *sides, repeats)


# ---- The benchmark: all of it, in one file for each machine


def bench(names: list[str] | None = None, device: str = "auto", quick: bool = False) -> dict:
    """Everything, for the presets called `names` (default: cpu, on CUDA a100), as plain values for JSON. Raises ConfigError.

    Each has a row eager and, where it asks for that, one compiled, on CUDA with the fastest micro-batch. Ratios of training
    are those of the last. `quick` takes seconds, compiles nothing, and its figures are rough.
    """
    seconds, repeats, tokens = (0.2, 2, 8) if quick else (SECONDS, REPEATS, 64)
    where, rows = find_device(device), []
    for preset in map(configuration.load, names or ["a100" if where.type == "cuda" else "cpu"]):
        loop = Loop(preset, where)
        if where.type == "cuda":
            choose_micro_batch(loop)
        rows.append(training_row(loop, seconds))
        if preset.train.compile and not quick:
            loop.compile()
            rows.append(training_row(loop, seconds))
    ratios = [isolation_ratio(loop, seconds, repeats)]
    if where.type == "cpu":
        ratios.append(plain_ratio(loop, seconds, repeats))
    ratios.append(encoding_ratio(seconds, repeats))
    if (ROOT / "release" / "model.safetensors").is_file():
        ratios += [sampling_ratio(ROOT / "release", size, tokens, repeats) for size in (1, 16)]
    return machine(where) | {"quick": quick, "training": rows, "ratios": ratios}


def save(result: dict, path: Path | None = None) -> Path:
    """Write `result` to `path` (default: named by the device); where it lies."""
    name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    path = Path(path or BENCHMARKS / f"{name}.json")
    write_json(path, result)
    return path


def training_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of training: one row per preset and mode."""
    rows = []
    for row in result["training"]:
        mode = f"{row['mode']}, {row['dtype']}, {row['micro_batch_size']} x {row['seq_len']}"
        figures = (_number(row[key]) for key in ("mfu", "memory_gb", "watts"))
        rows.append((row["preset"], f"{row['parameters'] / 1e6:.2f} M", mode, f"{row['tokens_per_second']:,}", *figures))
    return ("preset", "parameters", "mode", "tokens/s", "MFU", "memory, GB", "W"), rows


def ratio_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of what was measured by turns: median, and in brackets the lowest and the highest."""
    rows = []
    for row in result["ratios"]:
        a, b = (f"{row[side]['name']}: {_number(row[side]['median'])}" for side in ("a", "b"))
        median, low, high = (_number(row["ratio"][which]) for which in ("median", "low", "high"))
        rows.append((row["question"], row["unit"], a, b, f"{median} [{low}, {high}]"))
    return ("what", "unit", "A", "B", "A / B"), rows


def _number(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---- What a model costs beside GPT2-XL


def measure_cost(folder: Path, opponent: str | dict, device: str = "cpu") -> dict:
    """`models`: the BLM in `folder` and its opponent; `ratios`: their speeds of reading and writing, in bytes of text.

    `opponent` is a folder or hub name for transformers, or an architecture of GPT-2, which gets random weights. Both models run
    in float32. A turn reads `READ` tokens at once, or writes `WRITTEN` tokens one by one behind them.
    """
    both = [_loaded(source, device) for source in (str(folder), opponent)]
    ratios = []
    for question, written in ((f"{READ} tokens read at once", 0), (f"{WRITTEN} tokens written one by one", WRITTEN)):
        sides = [(about["name"], partial(_speed, model, about["bytes_per_token"], written)) for model, about in both]
        ratios.append(by_turns(question, "bytes of text/s", *sides, REPEATS))
    return machine(find_device(device)) | {"models": [about for _, about in both], "ratios": ratios}


def _loaded(source: str | dict, device: str) -> tuple[torch.nn.Module, dict]:
    """The model of `source`, and what is known of it: its size, and the bytes of text in one of its tokens."""
    if isinstance(source, str):
        held = load(source, device)
        model, about = held.model, {"name": held.name, "revision": held.revision}
        sample = configuration.load("smoke")
        pipeline.stories(sample)
        stories = list(data.read_split(sample.folder / "data", "train"))
        per_token = sum(len(story.encode()) for story in stories) / sum(len(held.encode(story)) - 1 for story in stories)
    else:
        model = random_gpt2(source, device=device)
        about = {"name": f"{'gpt2-xl' if source == GPT2_XL else 'gpt2'} with random weights", "revision": None}
        per_token = PUBLISHED["characters"] / PUBLISHED["tokens"]  # of TinyStories text in GPT-2's vocabulary
    weights = list(model.parameters())
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return model, about | {"parameters": sum(map(torch.numel, weights)), "bytes": size, "bytes_per_token": per_token}


def _speed(model: torch.nn.Module, bytes_per_token: float, written: int) -> float:
    """Bytes of text per second in writing `written` tokens behind `READ` random ones, or for 0 in reading those."""
    steps = _greedy(model, torch.randint(model.config.vocab_size, (1, READ)).to(model.device))
    if not written:
        return rate_of(READ * bytes_per_token, lambda: next(steps))
    next(steps)
    return rate_of(written * bytes_per_token, lambda: list(islice(steps, written)))


@torch.inference_mode()
def _greedy(model: torch.nn.Module, tokens: torch.Tensor) -> Iterator[int]:
    """Read `tokens` (1, T), then write the likeliest next token again and again, with a cache."""
    ours = isinstance(model, LanguageModel)
    cache = KeyValueCache(model.config, 1, model.device) if ours else None
    while True:
        if ours:
            logits = model(tokens, cache=cache)
        else:
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            logits, cache = out.logits, out.past_key_values
        tokens = logits[:, -1:].argmax(-1)
        yield int(tokens)  # waits for the device
