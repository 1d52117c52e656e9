"""What a model costs to run: parameters, bytes on disk, memory, speed and energy, two models on one machine in one run.

- Each model is measured in a process of its own (`python -m blm_core.cost`), so that memory does not mix.
- Tokens of different vocabularies are not the same amount of text: speeds are given in bytes of text, too.
- Speed and memory do not depend on the values of the weights. Where GPT2-XL cannot be loaded, its architecture with random
  weights stands in, and the result says so.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from blm_core.config import ROOT
from blm_core.evidence.models import (
    BLM,
    GPT2_XL,
    PUBLISHED,
    TransformersModel,
    UnavailableError,
    random_gpt2,
    read_prompts,
    versions,
)
from blm_core.files import read_json
from blm_core.hardware import PowerSampler
from blm_core.model import KeyValueCache

ARCHITECTURES = {"gpt2-xl": GPT2_XL}  # what can stand in for weights that cannot be loaded
GPT2_VOCABULARY = 50_257
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_REPEATS = 50


class CostError(RuntimeError):
    """A measurement that did not come to its end."""


@dataclass(frozen=True)
class CostSettings:
    """One measurement reads `prefill` tokens at once and then writes `generated` tokens one by one, one text at a time."""

    prefill: int = 96
    generated: int = 32
    repeats: int = 3  # at least; more where they take less than `seconds` altogether
    seconds: float = 3.0
    device: str = "cpu"
    dtype: str = "float32"  # of the opponent's weights; the BLM runs in float32
    threads: int = 0  # 0: as many as torch takes


def measure_cost(
    folder: Path, opponent: str | dict = "gpt2-xl", settings: CostSettings | None = None, random: bool = False
) -> dict:
    """Line 5: `machine`, `settings`, `time` and `models`, the BLM in `folder` first, then the opponent.

    `opponent` is a folder or hub name for transformers, or an architecture of GPT-2 (dict) to be filled with random weights;
    `random` fills the named one without trying to load it. Takes about two minutes with GPT2-XL on two CPU cores.
    Raises CostError where a measurement fails.
    """
    settings = settings or CostSettings()
    if isinstance(opponent, dict):
        theirs = {"name": "gpt2", "architecture": opponent}
    else:
        name = Path(opponent).name
        theirs = {"name": name, "source": None if random else opponent, "architecture": ARCHITECTURES.get(name)}
        if random and name not in ARCHITECTURES:
            raise CostError(f"the architecture of {name!r} is not known here; only {', '.join(ARCHITECTURES)} can be random.")
    specs = [{"name": "BLM", "folder": str(Path(folder).resolve())}, theirs]
    return {
        "machine": machine(settings.device),
        "settings": asdict(settings),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": [_in_own_process(spec, settings) for spec in specs],
    }


def read_cost(path: Path) -> dict:
    """What `measure_cost` found and the command `cost` wrote. Raises UnavailableError."""
    result = read_json(path)
    if not isinstance(result, dict) or len(result.get("models", [])) != 2:
        raise UnavailableError(
            f"{path} holds no measured costs. Make them with `python -m blm_core.evidence cost --out {path}`."
        )
    return result


def cost_line(result: dict) -> dict:
    """How many times less the BLM needs, or more it does, than the opponent; a verdict where the figure was repeated.

    For each figure: `ratio`, ours over theirs, and `verdict`. A speed wins if the slowest of our repeats beats the fastest
    of theirs, loses in the opposite case, else it is undecided. Counted figures (parameters, bytes) have no spread. Energy
    is "not run" where it could not be read.
    """
    ours, theirs = result["models"]
    line = {}
    counted = ["parameters", "disk_bytes", "peak_memory_bytes"]
    counted += ["gpu_peak_memory_bytes"] if ours["gpu_peak_memory_bytes"] else []
    for name in counted:
        a, b = ours[name], theirs[name]
        line[name] = {"ratio": a / b, "verdict": "wins" if a < b else "loses" if a > b else "undecided"}
    for name in ("prefill_bytes_per_second", "generation_bytes_per_second"):
        a, b = ours[name], theirs[name]
        outcome = "wins" if a["low"] > b["high"] else "loses" if a["high"] < b["low"] else "undecided"
        line[name] = {"ratio": a["value"] / b["value"], "verdict": outcome}
    for part in ("gpu",):
        a, b = ours["joules_per_text"][part], theirs["joules_per_text"][part]
        if a is None or b is None:
            line[f"{part}_joules_per_text"] = {"ratio": None, "verdict": "not run"}
        else:
            line[f"{part}_joules_per_text"] = {
                "ratio": a / b,
                "verdict": "wins" if a < b else "loses" if a > b else "undecided",
            }
    return line


def cost_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of a table: one row per figure, one column per model; random weights are named in the header."""
    ours, theirs = result["models"]
    header = ("", *(f"{m['name']} ({'random weights' if m['weights'] == 'random' else m['weights']})" for m in (ours, theirs)))
    rows = [("parameters", f"{ours['parameters']:,}", f"{theirs['parameters']:,}")]
    for label, key in (
        ("MB on disk", "disk_bytes"),
        ("peak memory, MB", "peak_memory_bytes"),
        ("peak memory of the GPU, MB", "gpu_peak_memory_bytes"),
    ):
        if ours[key]:
            rows.append((label, *(f"{model[key] / 1e6:,.1f}" for model in (ours, theirs))))
    for label, key in (
        ("tokens read per second", "prefill_tokens_per_second"),
        ("bytes of text read per second", "prefill_bytes_per_second"),
        ("tokens written per second", "generation_tokens_per_second"),
        ("bytes of text written per second", "generation_bytes_per_second"),
    ):
        rows.append(
            (label, *(f"{_short(m[key]['value'])} [{_short(m[key]['low'])}, {_short(m[key]['high'])}]" for m in (ours, theirs)))
        )
    for part in ("gpu",):
        joules = [model["joules_per_text"][part] for model in (ours, theirs)]
        rows.append((f"joules per text ({part.upper()})", *("not readable" if j is None else _short(j) for j in joules)))
    return header, rows


def measure(spec: dict, settings: CostSettings) -> dict:
    """The costs of one model in this process, which should have done nothing else before."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    before = memory()["now"]
    began = time.perf_counter()
    model, encode, found = _loaded(spec, settings)
    load_seconds = time.perf_counter() - began
    device = torch.device(settings.device)
    read, write = _steps(model, device)
    vocabulary = found.pop("vocabulary")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, settings.prefill), generator=generator).to(device)
    sampler = PowerSampler(device)

    def once() -> tuple[float, float]:
        start = _now(device)
        logits, cache = read(tokens)
        middle = _now(device)
        for _ in range(settings.generated):
            logits, cache = write(logits.argmax(-1, keepdim=True), cache)
        return middle - start, _now(device) - middle

    with torch.inference_mode():
        once()  # the first run also sets up kernels and memory
        times: list[tuple[float, float]] = []
        sampler.watts()  # the mean begins here
        while len(times) < settings.repeats or (sum(map(sum, times)) < settings.seconds and len(times) < MOST_REPEATS):
            times.append(once())
        watts = sampler.watts()
    sampler.close()
    joules = {"gpu": None if watts is None else watts * sum(map(sum, times)) / len(times)}
    bytes_per_token, how = _bytes_per_token(encode, vocabulary)
    result = {
        "name": spec["name"],
        **found,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "bytes_per_token": bytes_per_token,
        "bytes_per_token_from": how,
        "load_seconds": load_seconds,
        "threads": torch.get_num_threads(),
        "repeats": len(times),
        "memory_before_bytes": before,
        "memory_bytes": memory()["now"],
        "peak_memory_bytes": memory()["peak"],
        "gpu_peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "joules_per_text": joules,
        "energy_unread": {} if watts else {"gpu": sampler.why},
        "versions": versions(),
    }
    for name, count, column in (("prefill", settings.prefill, 0), ("generation", settings.generated, 1)):
        speeds = [count / pair[column] for pair in times]
        spread = {"value": statistics.median(speeds), "low": min(speeds), "high": max(speeds)}
        result[f"{name}_tokens_per_second"] = spread
        result[f"{name}_bytes_per_second"] = {key: value * bytes_per_token for key, value in spread.items()}
    return result


def machine(device: str = "cpu") -> dict:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "system": platform.system()}


def memory() -> dict[str, int]:
    """Resident bytes of this process: `now` (0 where the system does not say) and `peak`."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would still hold the peak of the process that started this one
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return {"now": int(fields["VmRSS"].split()[0]) * 1024, "peak": int(fields["VmHWM"].split()[0]) * 1024}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"now": 0, "peak": peak if sys.platform == "darwin" else peak * 1024}


def _loaded(spec: dict, settings: CostSettings) -> tuple[torch.nn.Module, Callable[[str], list[int]] | None, dict]:
    """The model of `spec`, its tokenizer's encoding if there is one, and what is known of its weights and files."""
    if "folder" in spec:
        blm = BLM(spec["folder"], settings.device)
        size = sum(path.stat().st_size for path in Path(spec["folder"]).iterdir() if path.is_file())
        found = {"weights": "trained", "revision": blm.revision, "disk_bytes": size, "disk_bytes_from": "the model's folder"}
        return blm.model, blm.tokenizer.encode, found | {"vocabulary": len(blm.tokenizer)}
    dtype, source, why = DTYPES[settings.dtype], spec.get("source"), "random weights were asked for"
    if source:
        try:
            theirs = TransformersModel(source, settings.device, dtype)
        except UnavailableError as error:
            if not spec["architecture"]:
                raise
            why = str(error)
        else:
            folder = Path(source).expanduser()
            weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
            size, how = sum(path.stat().st_size for path in weights), "the weights in the model's folder"
            if not weights:
                size, how = _bytes(theirs.model), f"counted: parameters in {settings.dtype}"
            found = {"weights": "trained", "revision": theirs.revision, "disk_bytes": size, "disk_bytes_from": how}
            return theirs.model, lambda text: theirs.encode(text)[1:], found | {"vocabulary": len(theirs.tokenizer)}
    model = random_gpt2(spec["architecture"], dtype, settings.device)
    found = {"weights": "random", "weights_why": why, "revision": None, "disk_bytes": _bytes(model)}
    return (
        model,
        None,
        found
        | {
            "disk_bytes_from": f"counted: parameters in {settings.dtype}",
            "vocabulary": model.config.vocab_size,
        },
    )


def _steps(model: torch.nn.Module, device: torch.device) -> tuple[Callable, Callable]:
    """Two functions: read tokens (1, T), and write on behind a cache; both give the last logits (1, V) and the cache."""
    if hasattr(model, "generate"):  # transformers

        def write(tokens: Tensor, cache) -> tuple[Tensor, object]:
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            return out.logits[:, -1], out.past_key_values

        return lambda tokens: write(tokens, None), write

    def write(tokens: Tensor, cache: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        return model(tokens, cache=cache)[:, -1], cache

    return lambda tokens: write(tokens, KeyValueCache(model.config, 1, device)), write


def _bytes_per_token(encode: Callable[[str], list[int]] | None, vocabulary: int) -> tuple[float, str]:
    if encode is None:
        if vocabulary != GPT2_VOCABULARY:
            raise CostError(
                f"how much text a token of this vocabulary of {vocabulary} holds is not known without its tokenizer."
            )
        return PUBLISHED["characters"] / PUBLISHED["tokens"], "published for GPT-2's vocabulary on TinyStories text"
    texts = [prompt.text for prompt in read_prompts("own")]
    return sum(len(text.encode()) for text in texts) / sum(len(encode(text)) for text in texts), "measured on the own prompts"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(model: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _in_own_process(spec: dict, settings: CostSettings) -> dict:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "blm_core.cost", json.dumps({"spec": spec, "settings": asdict(settings)})]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        killed = " (killed; most likely there was not enough memory)" if done.returncode in (-9, 137) else ""
        raise CostError(f"measuring {spec['name']} ended with status {done.returncode}{killed}: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(measure(task["spec"], CostSettings(**task["settings"]))))
