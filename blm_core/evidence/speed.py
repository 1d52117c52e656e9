"""How fast: training, sampling and encoding, and what generation costs beside GPT2-XL.

- Two things are compared by turns, A B A B, so that a machine that slows down slows both; the ratio is that of each turn
- Training is timed on the real step of a preset, on its own stories where they are encoded, else on those of the sample
- Speed and memory do not depend on the values of the weights: where GPT2-XL is not at hand, its architecture with random
  weights stands in, and the result says so. Each model runs in a process of its own, so that memory does not mix
"""

import contextlib
import dataclasses
import itertools
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch

from blm_core import config as configuration
from blm_core import data, pipeline
from blm_core import tokens as shards
from blm_core.checkpoint import load_model
from blm_core.config import ROOT, ConfigError, Preset
from blm_core.evidence.models import GPT2_XL, PUBLISHED, UnavailableError, _device, load, random_gpt2, versions
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
NEARLY = 0.97  # as fast as the fastest: the rest is noise


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 5.0  # of steps for each figure of training
    repeats: int = 3  # of each side of a ratio
    megabytes: float = 8.0  # of text to encode
    tokens: int = 64  # to sample per text
    compile: bool = True  # also compiled, where the preset asks for compilation


QUICK = Effort(seconds=0.2, repeats=2, megabytes=0.2, tokens=8, compile=False)


def by_turns(question: str, unit: str, a: tuple, b: tuple, repeats: int) -> dict:
    """Measure A and B by turns; `a` and `b` are (name, function that gives a rate)."""
    turns = [(a[1](), b[1]()) for _ in range(repeats)]
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
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"device": device_name(device), "device_type": device.type, "versions": versions(), "date": date}


# ---- Training


def training_stories(preset: Preset) -> tuple[TokenStories, str]:
    """The encoded training stories of `preset`, "own", or where there are none those of the sample: its tokens fit them all."""
    if read_json(preset.folder / "tokens" / "manifest.json"):
        return TokenStories(preset.folder / "tokens", "train"), "own"
    sample = configuration.load("smoke")
    pipeline.tokens(sample)
    return TokenStories(sample.folder / "tokens", "train"), "sample"


class Loop:
    """The training loop of a preset, without teachers, to be run for a few steps at a time.

    One loop serves every measurement of a preset, since compiling takes most of a minute on a GPU: it is compiled anew only
    where the size of the micro-batch changes, and once each for stories that are isolated and that are not.
    """

    def __init__(self, preset: Preset, device: torch.device):
        self.preset, self.device = preset, device
        self.stories, self.tokens = training_stories(preset)
        self.model = LanguageModel(preset.model).to(device).train()
        self.loss_of = self.model
        self.restart()

    def restart(self, **train) -> None:
        """Back to step 0 and to fresh weights, with other settings of training from now on."""
        config = dataclasses.replace(self.preset.train, **train)
        self.preset = dataclasses.replace(self.preset, train=config)
        fresh = LanguageModel(self.preset.model, config.seed).state_dict()
        self.model.load_state_dict(fresh)  # in place, which leaves what is compiled as it is
        self.model.zero_grad(set_to_none=True)
        self.optimizers = make_optimizers(self.model, config)
        batches = Batches(self.stories, self.preset.model.seq_len, config.batch_size, config.seed)
        self._batches = batches.prefetched(range(2**31))  # its thread ends with it
        self.step, self.losses = 0, []

    def compile(self) -> None:
        """Compile the model. Where that fails, steps stay eager with a warning on a CPU; a GPU raises RunError."""
        self.loss_of = _compiled(self.model, self.preset, self.device)

    @property
    def mode(self) -> str:
        return "eager" if self.loss_of is self.model else "compiled"

    def run(self, steps: int, **train) -> float:
        """Seconds that `steps` steps take, with other settings of training where given; their losses go to `losses`."""
        config, here, losses = dataclasses.replace(self.preset.train, **train), Processes(0, 1, self.device), []
        began = now(self.device)
        for _ in range(steps):
            lr = learning_rate(min(self.step, config.steps - 1), config)
            losses.append(_step(self.loss_of, self.model, self.optimizers, next(self._batches), lr, config, here)[0])
            self.step += 1
        seconds = now(self.device) - began
        self.losses += [float(loss) for loss in losses]
        return seconds

    def rate(self, steps: int, **train) -> float:
        """Tokens per second over `steps` steps."""
        return steps * self.preset.tokens_per_step / self.run(steps, **train)

    def steps_in(self, seconds: float, **train) -> int:
        """How many steps take about `seconds`, at least one; the first of all sets up kernels and memory."""
        self.run(1, **train)
        return max(1, round(seconds / self.run(1, **train)))


def plain_loop(preset: Preset) -> Iterator[float]:
    """The losses of a float32 loop as a first attempt has it: eager, batches cut from a list, `.item()` in every step."""
    B, T, stories = preset.train.batch_size, preset.model.seq_len, training_stories(preset)[0]
    tokens = [int(token) for i in range(min(len(stories), 5000)) for token in stories[i]]
    model = LanguageModel(dataclasses.replace(preset.model, dropout=0.0), preset.train.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), preset.train.learning_rate, foreach=False)
    for step in itertools.count():
        starts = [row * T % (len(tokens) - T - 1) for row in range(step * B, step * B + B)]
        batch = torch.tensor([tokens[start : start + T + 1] for start in starts])
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), preset.train.max_grad_norm, foreach=False)
        optimizer.step()
        yield loss.item()


def now(device: torch.device) -> float:
    """Seconds, when `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def choose_micro_batch(loop: Loop) -> list[dict]:
    """Double the micro-batch until memory runs out or the batch is whole, and restart with the fastest; what each size gave.

    Of sizes that are nearly as fast the smallest is taken. Those that do not divide the batch are not tried.
    Raises torch.cuda.OutOfMemoryError where the first does not fit.
    """
    batch, tried = loop.preset.train.batch_size, []
    size = min(FIRST_MICRO_BATCH, batch)
    while size <= batch and batch % size == 0:
        torch.cuda.empty_cache()  # else a size finds the memory in pieces
        reset_memory(loop.device)
        found = {"micro_batch_size": size, "tokens_per_second": None, "memory_gb": None}  # None: out of memory
        tried.append(found)
        try:
            loop.run(1, micro_batch_size=size)
            found |= {"tokens_per_second": round(loop.rate(1, micro_batch_size=size)), "memory_gb": memory(loop.device)}
        except torch.cuda.OutOfMemoryError:
            if len(tried) == 1:
                raise
            break
        size *= 2
    most = max(found["tokens_per_second"] or 0 for found in tried)
    chosen = next(found for found in tried if (found["tokens_per_second"] or 0) >= NEARLY * most)
    loop.restart(micro_batch_size=chosen["micro_batch_size"])
    torch.cuda.empty_cache()
    return tried


def training_row(loop: Loop, effort: Effort) -> dict:
    """Speed, memory and power of `loop` as it is."""
    preset, device = loop.preset, loop.device
    reset_memory(device)
    steps = loop.steps_in(effort.seconds)
    with contextlib.closing(PowerSampler(device)) as power:
        rate = loop.rate(steps)
        watts = power.watts()
    return {
        "preset": preset.name,
        "parameters": parameter_counts(preset.model)["total"],
        "mode": loop.mode,
        "tokens": loop.tokens,
        "dtype": resolve_dtype(device, preset.train.dtype),
        "micro_batch_size": preset.train.micro_batch_size,
        "seq_len": preset.model.seq_len,
        "steps": steps,
        "tokens_per_second": round(rate),
        "mfu": mfu(rate * flops_per_token(preset.model), device),
        "memory_gb": memory(device),
        "watts": watts,
    }


def isolation_ratio(loop: Loop, effort: Effort) -> dict:
    """Stories of a window isolated against shared, in tokens per second."""
    steps = loop.steps_in(effort.seconds / 2, isolate_stories=True)
    loop.run(1, isolate_stories=False)
    isolated, shared = (partial(loop.rate, steps, isolate_stories=isolated) for isolated in (True, False))
    question = f"stories of a window isolated, shape of {loop.preset.name}, {loop.mode}"
    return by_turns(question, "tokens/s", ("isolated", isolated), ("shared", shared), effort.repeats)


def plain_ratio(loop: Loop, effort: Effort) -> dict:
    """Steps of this project against those of a plain loop, in tokens per second, on the CPU."""
    preset, plain = loop.preset, plain_loop(loop.preset)
    next(plain)
    steps = loop.steps_in(effort.seconds / 2)
    ours = f"this project ({resolve_dtype(loop.device, preset.train.dtype)}, {loop.mode})", partial(loop.rate, steps)
    several = partial(rate_of, steps * preset.tokens_per_step, lambda: list(itertools.islice(plain, steps)))
    question = f"training, shape of {preset.name}"
    return by_turns(question, "tokens/s", ours, ("plain float32 loop", several), effort.repeats)


# ---- Encoding and sampling


def encoding_ratio(effort: Effort) -> dict:
    """Encoding in two processes against one, in MB of text per second, start of the processes included."""
    preset = configuration.load("smoke")
    tokenizer = pipeline.tokenizer(preset)
    text = "".join(path.read_text() for path in data.split_files(preset.folder / "data", "train"))
    half = text * max(1, round(effort.megabytes * 1e6 / 2 / len(text)))

    def encode(*files: str) -> float:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "stories").mkdir()
            for number, stories in enumerate(files):
                (folder / "stories" / f"train-data{number:02}.jsonl").write_text(stories)
            began = time.perf_counter()
            made = shards.encode_splits(folder, tokenizer, folder / "tokens", 0.0)
            return made["bytes"]["train"] / 1e6 / (time.perf_counter() - began)

    sides = ("two processes", partial(encode, half, half)), ("one process", partial(encode, half + half))
    return by_turns("encoding, vocabulary of smoke", "MB/s", *sides, effort.repeats)


@torch.inference_mode()
def sampling_ratio(folder: Path, effort: Effort, batch_size: int) -> dict:
    """Our sampling against `generate` of transformers: the model in `folder`, float32, CPU, tokens per second."""
    from transformers import AutoModelForCausalLM

    ours, tokenizer = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    tokens = min(effort.tokens, ours.config.seq_len - 8)
    sampling = Sampling(max_tokens=tokens)
    prompt = [tokenizer.eot, *tokenizer.encode("Once")][:4]
    inputs = torch.tensor([prompt] * batch_size)
    options = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}
    options |= {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": tokenizer.eot}
    options |= {"attention_mask": torch.ones_like(inputs)}

    def write_ours() -> float:
        steps = sample_tokens(ours, [prompt] * batch_size, sampling, eot=-1)  # nothing ends early
        return rate_of(tokens * batch_size, lambda: list(steps))

    def write_theirs() -> float:
        return rate_of(tokens * batch_size, lambda: theirs.generate(inputs, **options))

    write_ours(), write_theirs()
    sides = ("this project", write_ours), ("transformers", write_theirs)
    return by_turns(f"sampling, batch {batch_size}, {Path(folder).name}", "tokens/s", *sides, effort.repeats)


# ---- The benchmark: all of it, in one file for each machine


def bench(names: list[str] | None = None, device: str = "auto", effort: Effort | None = None) -> dict:
    """Everything, for the presets called `names`, as plain values for JSON. Raises ConfigError.

    Without `names`, all presets that the machine can measure in minutes. Each has a row eager and, where it asks for that, one
    compiled, on CUDA with the fastest micro-batch. Ratios of training are those of the largest.
    """
    effort, where = effort or Effort(), _device(device)
    presets = {preset: flops_per_token(preset.model) for preset in map(configuration.load, names or configuration.PRESETS)}
    if not names and where.type == "cpu":
        presets = {preset: flops for preset, flops in presets.items() if flops * preset.tokens_per_step < MOST_FLOPS_ON_CPU}
    rows = []
    for preset in sorted(presets, key=presets.get):
        loop = Loop(preset, where)
        if where.type == "cuda":
            choose_micro_batch(loop)
        rows.append(training_row(loop, effort))
        if effort.compile and preset.train.compile:
            loop.compile()
            rows += [training_row(loop, effort)] if loop.mode == "compiled" else []
    ratios = [isolation_ratio(loop, effort)]
    if where.type == "cpu":
        ratios.append(plain_ratio(loop, effort))
    ratios.append(encoding_ratio(effort))
    if (ROOT / "release" / "model.safetensors").is_file():
        ratios += [sampling_ratio(ROOT / "release", effort, size) for size in (1, 16)]
    about = machine(where) | {"cpu": device_name(torch.device("cpu")), "effort": dataclasses.asdict(effort)}
    return about | {"training": rows, "ratios": ratios}


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
        mode = f"{row['mode']}, {row['dtype']}, {row['micro_batch_size']} x {row['seq_len']}"
        figures = (_number(row[key]) for key in ("mfu", "memory_gb", "watts"))
        rows.append((row["preset"], f"{row['parameters'] / 1e6:.2f} M", mode, f"{row['tokens_per_second']:,}", *figures))
    return ("preset", "parameters", "mode", "tokens/s", "MFU", "memory, GB", "W"), rows


def ratio_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of what was measured by turns: median, and in brackets the lowest and the highest."""
    rows = []
    for row in result["ratios"]:
        a, b = (f"{row[side]['name']}: {_number(row[side]['median'])}" for side in ("a", "b"))
        rows.append((row["question"], row["unit"], a, b, _spread(row["ratio"])))
    return ("what", "unit", "A", "B", "A / B"), rows


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


def measure_cost(folder: Path, opponent: str | dict = "gpt2-xl", settings: CostSettings | None = None) -> dict:
    """`device`, `settings`, `time` and `models`: the BLM in `folder`, then the opponent, timed by turns.

    `opponent` is a folder or hub name for transformers, or an architecture of GPT-2, which gets random weights.
    Raises CostError where a measurement fails.
    """
    settings = settings or CostSettings()
    sources = [str(folder), tuple(opponent.items()) if isinstance(opponent, dict) else opponent]
    turns = []
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in sources]
        for _ in range(settings.repeats + 1):
            turns.append([])
            for source, process in zip(sources, processes, strict=True):
                try:
                    turns[-1].append(process.submit(_turn, source, settings).result())
                except Exception as error:
                    killed = "killed, most likely for want of memory" if isinstance(error, BrokenProcessPool) else error
                    raise CostError(f"measuring {source}: {killed}") from error
    models = []
    for own in zip(*turns[1:], strict=True):  # the first turn sets up kernels and memory
        models.append(own[-1]["model"])
        for name, count in (("prefill", settings.prefill), ("generation", settings.generated)):
            speeds = [count / turn[name] for turn in own]
            models[-1][f"{name}_tokens_per_second"] = spread(speeds)
            models[-1][f"{name}_bytes_per_second"] = spread([speed * models[-1]["bytes_per_token"] for speed in speeds])
    about = machine(torch.device(settings.device))
    return {"device": about["device"], "settings": dataclasses.asdict(settings), "time": about["date"], "models": models}


def _turn(source: str | tuple, settings: CostSettings) -> dict:
    """Seconds to read random tokens and to write more behind a cache, and what is known of the model by then."""
    model, known = _loaded(source, settings)
    device, theirs = model.device, hasattr(model, "generate")  # of transformers
    cache = None if theirs else KeyValueCache(model.config, 1, device)

    def read(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal cache
        if not theirs:
            return model(tokens, cache=cache)[:, -1]
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        return out.logits[:, -1]

    tokens = torch.randint(model.config.vocab_size, (1, settings.prefill), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        start = now(device)
        logits = read(tokens.to(device))
        middle = now(device)
        for _ in range(settings.generated):
            logits = read(logits.argmax(-1, keepdim=True))
        end = now(device)
    known = known | {"peak_memory_gb": memory(device), "versions": versions()}
    return {"prefill": middle - start, "generation": end - middle, "model": known}


@lru_cache(maxsize=1)
def _loaded(source: str | tuple, settings: CostSettings) -> tuple[torch.nn.Module, dict]:
    """The model of `source`, loaded once in its process, and what is known of it: its size, and bytes of text in a token."""
    dtype = getattr(torch, settings.dtype)
    if isinstance(source, str):
        held = load(source, settings.device, dtype)
        model, known = held.model, {"name": held.name, "weights": "trained", "revision": held.revision}
        records = [record for path in (ROOT / "blm_core" / "sample").glob("*.json") for record in read_json(path)]
        texts = [record["story"] for record in records if record.get("story")]
        per_token = sum(len(text.encode()) for text in texts) / sum(len(held.encode(text)) - 1 for text in texts)
    else:
        model = random_gpt2(dict(source), dtype, settings.device)
        known = {"name": "gpt2-xl" if dict(source) == GPT2_XL else "gpt2", "weights": "random", "revision": None}
        per_token = PUBLISHED["characters"] / PUBLISHED["tokens"]  # of TinyStories text in GPT-2's vocabulary
    weights = list(model.parameters())
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    if isinstance(model, LanguageModel):
        size = sum(path.stat().st_size for path in Path(source).iterdir())
    counts = {"parameters": sum(weight.numel() for weight in weights), "disk_bytes": size, "bytes_per_token": per_token}
    return model, known | counts | {"dtype": str(weights[0].dtype).removeprefix("torch.")}


def read_cost(path: Path) -> dict:
    """What `measure_cost` found and the command `cost` wrote. Raises UnavailableError."""
    result = read_json(path)
    if not isinstance(result, dict) or not all("peak_memory_gb" in model for model in result.get("models", [{}])):
        raise UnavailableError(
            f"{path} holds no measured costs. Make them with `python -m blm_core.evidence cost --out {path}`."
        )
    return result


def cost_line(result: dict) -> dict:
    """For both speeds in bytes of text `ratio`, ours over theirs, its lowest and highest turn, and `verdict`.

    A speed wins if it is higher in every turn, and loses if lower in every one.
    """
    ours, theirs = result["models"]
    line = {}
    for name in ("prefill_bytes_per_second", "generation_bytes_per_second"):
        turns = spread([a / b for a, b in zip(ours[name]["values"], theirs[name]["values"], strict=True)])
        verdict = "wins" if turns["low"] > 1 else "loses" if turns["high"] < 1 else "undecided"
        line[name] = {"ratio": turns["median"], "low": turns["low"], "high": turns["high"], "verdict": verdict}
    return line


def cost_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of a table: one row per figure, one column per model, and the ratio; random weights are named."""
    models = ours, theirs = result["models"]
    rows = [
        ("parameters", *(f"{m['parameters']:,}" for m in models), _number(theirs["parameters"] / ours["parameters"])),
        ("MB on disk", *(f"{m['disk_bytes'] / 1e6:,.0f}" for m in models), _number(theirs["disk_bytes"] / ours["disk_bytes"])),
        ("peak memory, GB", *(_number(m["peak_memory_gb"]) for m in models), ""),
    ]
    for label, kind in (("read", "prefill"), ("written", "generation")):
        tokens, text = f"{kind}_tokens_per_second", f"{kind}_bytes_per_second"
        turns = cost_line(result)[text]
        rows.append((f"tokens {label} per second", *(_number(m[tokens]["median"]) for m in models), ""))
        speeds = (_number(m[text]["median"]) for m in models)
        rows.append((f"bytes of text {label} per second", *speeds, _spread(turns | {"median": turns["ratio"]})))
    return ("", "BLM", f"{theirs['name']} ({theirs['weights']} weights)", "times"), rows
