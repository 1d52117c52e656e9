"""The training loop.

- bfloat16 autocast over float32 master weights, gradient accumulation, clipping, one process or many (DDP)
- Everything random in a step follows from (seed, step, rank), so a run continued from a checkpoint repeats itself
- A run is a folder: `config.json`, `metrics.jsonl`, `checkpoint.pt`, and when it has finished `model/` and
  `summary.json`, by which it is found and not repeated
"""

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from blm_core.batches import Batches
from blm_core.checkpoint import load_state, save_model, save_state
from blm_core.config import ConfigError, Preset, to_dict
from blm_core.files import read_json, write_json, written_aside
from blm_core.model import LanguageModel, flops_per_token
from blm_core.optimizer import learning_rate, make_optimizer
from blm_core.scoring import bits_per_byte, precision, story_bits
from blm_core.shards import TokenStories
from blm_core.tokenizer import Tokenizer

# Dense bfloat16 FLOP/s that the makers state. MFU is given for these only.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
# What changes speed or display and not the result; a run may be continued with other values of these.
FREE = ("micro_batch_size", "device", "compile", "checkpoint_minutes", "tensorboard", "wandb")


class RunError(RuntimeError):
    """A run that cannot start, continue or go on."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, as `torchrun` states it."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def _processes(device: str):
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and world_size > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(int(os.environ.get("RANK", 0)), world_size, torch.device(device))
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def train(preset: Preset, tokens: Path, tokenizer: Tokenizer, folder: Path) -> dict:
    """Train `preset`'s model on the encoded stories in `tokens`; returns the run's summary, made now or found.

    Raises RunError where `folder` holds another configuration's run, or where the loss is not finite.
    """
    folder = Path(folder)
    identity = _identity(preset, tokens, tokenizer)
    _claim(folder, identity)
    summary = read_json(folder / "summary.json")
    if summary:
        return summary
    with _processes(preset.train.device) as processes, _termination() as terminated:
        return _run(preset, tokens, tokenizer, folder, processes, terminated)


def metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """The lines of `metrics.jsonl`: those of training, those of validation."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x], [x for x in lines if "validation_bits_per_byte" in x]


def _identity(preset: Preset, tokens: Path, tokenizer: Tokenizer) -> dict:
    """What the result of the run depends on."""
    manifest = read_json(Path(tokens) / "manifest.json")
    if manifest is None:
        raise RunError(f"{tokens} holds no encoded stories; run 01_data and 02_tokenizer first.")
    train_config = {k: v for k, v in to_dict(preset.train).items() if k not in FREE}
    data = {"tokenizer": tokenizer.hash, "tokens": manifest["tokens"], "bytes": manifest["bytes"]}
    return json.loads(json.dumps({"model": to_dict(preset.model), "train": train_config, "data": data}))


def _claim(folder: Path, identity: dict) -> None:
    """Make `folder` this run's, or find that it is. Raises RunError naming what differs."""
    found = read_json(folder / "config.json")
    if found is None:
        if int(os.environ.get("RANK", 0)) == 0:
            write_json(folder / "config.json", identity)
        return
    if found != identity:
        differs = [
            f"{part}.{key}: {found.get(part, {}).get(key)!r} there, {identity[part].get(key)!r} here"
            for part in identity
            for key in sorted({*found.get(part, {}), *identity[part]})
            if found.get(part, {}).get(key) != identity[part].get(key)
        ]
        raise RunError(
            f"{folder} holds a run of another configuration ({'; '.join(differs)}). Name another folder or remove it."
        )


@contextlib.contextmanager
def _termination():
    """A list that is no longer empty after SIGTERM. Only the main thread can listen."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(preset: Preset, tokens: Path, tokenizer: Tokenizer, folder: Path, here: Processes, terminated: list) -> dict:
    config, device = preset.train, here.device
    if config.batch_size % (config.micro_batch_size * here.world_size):
        raise ConfigError(
            f"train.batch_size = {config.batch_size} cannot be shared by {here.world_size} processes with micro-batches of "
            f"{config.micro_batch_size} (train.micro_batch_size)."
        )
    batches = Batches(TokenStories(tokens, "train"), preset.model.seq_len, config.batch_size, config.seed)
    validation = _validation(tokens, tokenizer, config.eval_stories)
    model = LanguageModel(preset.model, config.seed).to(device).train()
    optimizer = make_optimizer(model, config)
    step, seconds, pending = 0, 0.0, []
    state = load_state(folder / "checkpoint.pt")
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, pending = state["step"], state["seconds"], [tuple(pair) for pair in state["pending"]]
    log = _Log(folder, step, config) if here.first else None
    loss_of = _compiled(model, preset, device) if config.compile else model
    if here.world_size > 1:
        loss_of = DistributedDataParallel(loss_of, device_ids=[device.index] if device.type == "cuda" else None)

    def save() -> None:
        if here.first:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(folder / "checkpoint.pt", state | {"step": step, "seconds": seconds, "pending": pending})

    bar = tqdm(total=config.steps, initial=step, desc=f"training {preset.name}", unit="step", disable=not here.first)
    saved = logged = time.perf_counter()
    logged_step = step
    data = batches.prefetched(range(step, config.steps), here.rank, here.world_size)
    with contextlib.closing(data):
        for batch in data:
            began = time.perf_counter()
            torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + here.rank)  # dropout
            lr = learning_rate(step, config)
            loss, norm = _step(loss_of, model, optimizer, batch, lr, config, here)
            step += 1
            pending.append((loss, norm))
            if step % config.log_every == 0 or step == config.steps or terminated:
                pending = [(float(a), float(b)) for a, b in pending]  # waits for the device
                _require_finite(pending, step, preset, folder)
                if here.world_size > 1:  # SIGTERM may have reached some processes only
                    flag = torch.tensor([len(terminated)], device=device)
                    dist.all_reduce(flag, dist.ReduceOp.MAX)
                    terminated.extend([signal.SIGTERM] * (int(flag) > len(terminated)))
            if step % config.log_every == 0 or step == config.steps:
                now = time.perf_counter()
                rate = (step - logged_step) * preset.tokens_per_step / (now - logged)
                mean_loss = sum(loss for loss, _ in pending) / len(pending)
                if here.first:
                    log.write(
                        step=step,
                        tokens=step * preset.tokens_per_step,
                        loss=mean_loss,
                        learning_rate=lr,
                        gradient_norm=pending[-1][1],
                        tokens_per_second=round(rate),
                        mfu=_mfu(rate / here.world_size, preset, device),
                        power_w=_power(device),
                        memory_gb=_memory(device),
                    )
                    bar.set_postfix(loss=f"{mean_loss:.3f}", tokens_per_second=f"{rate:,.0f}")
                pending, logged, logged_step = [], now, step
            bar.update()
            if here.first and (step % config.eval_every == 0 or step == config.steps):
                value, low, high = _validate(model, validation, config.dtype)
                log.write(step=step, tokens=step * preset.tokens_per_step, validation_bits_per_byte=value, low=low, high=high)
                model.train()
                logged = time.perf_counter()
            seconds += time.perf_counter() - began
            due = time.perf_counter() - saved > 60 * config.checkpoint_minutes and not pending
            if due or terminated or step == config.steps:
                save()
                saved = time.perf_counter()
            if terminated and step < config.steps:
                bar.close()
                raise SystemExit(f"stopped by SIGTERM after step {step}; {folder / 'checkpoint.pt'} continues from there.")
    bar.close()
    summary = {}
    if here.first:
        log.close()
        save_model(folder / "model", model, tokenizer)
        training, evaluated = metrics(folder)
        summary = {
            "steps": step,
            "tokens": step * preset.tokens_per_step,
            "epochs": step * preset.tokens_per_step / batches.tokens_per_epoch,
            "seconds": round(seconds, 1),
            "loss": training[-1]["loss"],
            "validation_bits_per_byte": evaluated[-1]["validation_bits_per_byte"],
            "validation_split": validation[2],
            "device": _device_name(device),
            "processes": here.world_size,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        write_json(folder / "summary.json", summary)
    return summary


def _step(loss_of, model, optimizer, batch, lr, config, here: Processes):
    """One optimizer step over the micro-batches of `batch`; the mean loss and the gradient's norm, still on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if here.device.type == "cuda":
        batch = batch.pin_memory().to(here.device, non_blocking=True)
    parts = batch.split(config.micro_batch_size)
    total = torch.zeros((), device=here.device)
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        sync = contextlib.nullcontext() if last or here.world_size == 1 else loss_of.no_sync()
        with sync:
            with precision(here.device, config.dtype):
                loss = loss_of(part[:, :-1], part[:, 1:])
            (loss / len(parts)).backward()
        total += loss.detach() / len(parts)
    if here.world_size > 1:
        dist.all_reduce(total)
        total /= here.world_size
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def _compiled(model: LanguageModel, preset: Preset, device: torch.device):
    """The compiled model, tried on one sequence; where there is no working compiler, the model and a warning."""
    compiled = torch.compile(model)
    tokens = torch.zeros(preset.train.micro_batch_size, preset.model.seq_len, dtype=torch.int64, device=device)
    try:
        with precision(device, preset.train.dtype):
            compiled(tokens, tokens).backward()
    except Exception as error:  # a missing compiler shows as one of many kinds
        warnings.warn(f"torch.compile does not work here, training goes on without it: {error}"[:500], stacklevel=2)
        compiled = model
    model.zero_grad(set_to_none=True)
    return compiled


def _require_finite(pending: list[tuple[float, float]], step: int, preset: Preset, folder: Path) -> None:
    for i, (loss, norm) in enumerate(pending):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad = step - len(pending) + i
            kept = folder / "checkpoint.pt"
            raise RunError(
                f"loss {loss} and gradient norm {norm} in step {bad + 1} at learning rate "
                f"{learning_rate(bad, preset.train):.2e}; last good checkpoint: {kept if kept.exists() else 'none yet'}. Lower train.learning_rate or raise "
                "train.warmup_steps."
            )


def _validation(tokens: Path, tokenizer: Tokenizer, count: int):
    """Token arrays, sizes in bytes and name of the stories validated on: official ones where there are some."""
    split = "official" if len(TokenStories(tokens, "official")) else "validation"
    stories = TokenStories(tokens, split)
    chosen = [stories[i] for i in range(min(count, len(stories)))]
    sizes = [len(tokenizer.decode(story.tolist()).encode()) for story in chosen]
    return chosen, torch.tensor(sizes).numpy(), split


@torch.no_grad()
def _validate(model: LanguageModel, validation, dtype: str) -> tuple[float, float, float]:
    stories, sizes, _ = validation
    with precision(model.device, dtype):
        bits = story_bits(model.eval(), stories, model.config.seq_len, model.device)
    return bits_per_byte(bits, sizes, resamples=1000)


class _Log:
    """`metrics.jsonl`, and tensorboard or wandb where asked for. Lines after the checkpoint are dropped on a restart."""

    def __init__(self, folder: Path, step: int, config):
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # a line that a kill cut in half belongs to a step that is repeated
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with written_aside(path) as aside:
            aside.write_text("".join(line + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the run
        self._board = self._wandb = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        if config.wandb:
            import wandb

            self._wandb = wandb.init(project="blm", dir=str(folder), name=folder.name, resume="allow", id=folder.name)

    def write(self, **values) -> None:
        self._file.write(json.dumps(values) + "\n")
        numbers = {k: v for k, v in values.items() if v is not None and k != "step"}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, values["step"])
        if self._wandb:
            self._wandb.log(numbers, step=values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _mfu(tokens_per_second: float, preset: Preset, device: torch.device) -> float | None:
    """Model FLOPs utilisation of one device, None where the peak is not known."""
    name = _device_name(device) if device.type == "cuda" else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    return round(tokens_per_second * flops_per_token(preset.model) / peak, 4) if peak else None


def _power(device: torch.device) -> float | None:
    """Watts that the GPU draws now, None where there is no GPU or no nvidia-smi."""
    if device.type != "cuda":
        return None
    query = ["nvidia-smi", f"--id={device.index or 0}", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _memory(device: torch.device) -> float | None:
    """Peak memory in GB (10^9 bytes): allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    peak = [line.split()[1] for line in _read("/proc/self/status").splitlines() if line.startswith("VmHWM")]
    return round(int(peak[0]) * 1024 / 1e9, 2) if peak else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
