"""The training loop and its log.

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
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from blm_core.checkpoint import llama_config, load_model, load_state, save_model, save_state
from blm_core.config import ConfigError, Preset, to_dict
from blm_core.evaluate import score
from blm_core.files import read_json, read_json_lines, sha256, text_sha256, write_json, written_aside
from blm_core.hardware import PowerSampler, device_name, find_device, memory, mfu, precision, resolve_dtype
from blm_core.model import Distilled, LanguageModel, flops_per_token
from blm_core.optimizer import learning_rate, make_optimizers, restore
from blm_core.tokenizer import Tokenizer
from blm_core.tokens import NOT_SCORED, Batches, TokenStories

# What changes speed or display and not the result; a run may be continued with other values of these.
FREE = ("micro_batch_size", "device", "compile", "checkpoint_minutes", "wandb")


class RunError(RuntimeError):
    """A run that cannot start, continue or go on."""


class DivergedError(RunError):
    """A run whose loss is no longer finite."""


class RunLog:
    """`metrics.jsonl`, and wandb where asked for. Lines after the checkpoint are dropped on a restart."""

    def __init__(self, folder: Path, step: int, preset: Preset):
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # a line that a kill cut in half belongs to a step that is repeated
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with written_aside(path) as aside:
            aside.write_text("".join(line + "\n" for line in kept))
        self._wandb = _wandb_run(folder, preset) if preset.train.wandb else None
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the run

    def write(self, **values) -> None:
        self._file.write(json.dumps(values) + "\n")
        if self._wandb:
            self._wandb.log({k: v for k, v in values.items() if v is not None}, step=values["step"])

    def close(self) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.finish()


def _wandb_run(folder: Path, preset: Preset):
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"train.wandb=true: {error}. Install the package wandb, or leave the setting out.") from error
    # Every preset's run lies in a folder of the name `run`: the identity and the whole path tell runs apart.
    where = f"{folder.resolve()} {(folder / 'config.json').read_text()}"
    run_id = f"{preset.name}-{text_sha256(where)[:8]}"
    return wandb.init(project="blm", dir=str(folder), name=run_id, id=run_id, resume="allow")


def metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """The lines of `metrics.jsonl`: those of training, those of validation."""
    lines = list(read_json_lines(Path(folder) / "metrics.jsonl"))
    return [x for x in lines if "loss" in x], [x for x in lines if "validation_bits_per_byte" in x]


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, as `torchrun` states it."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process; all of them have to ask at the same step."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)


@contextlib.contextmanager
def _processes(device: str):
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    where = find_device(device)
    if where.type == "cuda" and world_size > 1:
        where = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(where)
    if world_size > 1:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield Processes(int(os.environ.get("RANK", 0)), world_size, where)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def _interruption():
    """A list of the signals received: SIGTERM, or Ctrl-C, of which the second ends the run at once."""
    received: list[int] = []

    def receive(number: int, frame) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {}
    try:
        if threading.current_thread() is threading.main_thread():  # no other thread can listen
            before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    preset: Preset, tokens: Path, tokenizer: Tokenizer, folder: Path, keep_model: bool = True, teachers: Sequence[Path] = ()
) -> dict:
    """Train `preset`'s model on the encoded stories in `tokens`; returns the run's summary, made now or found.

    `teachers` are the folders of finished runs whose mean prediction it learns from, `train.teacher_weight` of the loss.
    Without `keep_model` only the text files of the finished run stay: configuration, metrics and summary.
    Raises RunError where `folder` holds another configuration's run, DivergedError where the loss is not finite, and
    CheckpointError, before the first step, where the model is one that cannot be kept.
    """
    folder = Path(folder)
    if keep_model:
        llama_config(preset.model, tokenizer.eot)
    _claim(folder, _identity(preset, tokens, tokenizer, teachers))
    if summary := read_json(folder / "summary.json"):
        return summary
    with _processes(preset.train.device) as here, _interruption() as signals:
        return _run(preset, tokens, tokenizer, folder, keep_model, teachers, here, signals)


def _identity(preset: Preset, tokens: Path, tokenizer: Tokenizer, teachers: Sequence[Path]) -> dict:
    """What the result of the run depends on."""
    manifest = read_json(Path(tokens) / "manifest.json")
    if manifest is None:
        raise RunError(f"{tokens} holds no encoded stories; run 01_data and 02_tokenizer first.")
    train_config = {k: v for k, v in to_dict(preset.train).items() if k not in FREE}
    data = {"tokenizer": tokenizer.hash, "tokens": manifest["tokens"], "bytes": manifest["bytes"]}
    if teachers:
        data["teachers"] = [sha256(teacher / "summary.json") for teacher in teachers]
    return {"model": to_dict(preset.model), "train": train_config, "data": data}


def _claim(folder: Path, identity: dict) -> None:
    """Make `folder` this run's, or find that it is. Raises RunError naming what differs."""
    found = read_json(folder / "config.json")
    if found is None:
        if int(os.environ.get("RANK", 0)) == 0:
            write_json(folder / "config.json", identity)
        return
    differs = [
        f"{part}.{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for part, here in identity.items()
        for there in [found.get(part, {})]
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]
    if differs:
        differences = "; ".join(differs)
        raise RunError(f"{folder} holds a run of another configuration ({differences}). Name another folder or remove it.")


class Run:
    """What a run has come to: all that a checkpoint holds."""

    def __init__(self, preset: Preset, device: torch.device):
        self.model = LanguageModel(preset.model, preset.train.seed).to(device).train()
        self.optimizers = make_optimizers(self.model, preset.train)
        self.step, self.seconds = 0, 0.0
        self.pending: list[tuple] = []  # loss and gradient norm of the steps since the last log line
        self.stretches: list[dict] = []  # from which step on, with what precision, device and PyTorch

    def load(self, path: Path) -> None:
        state = load_state(path)
        if state:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                restore(optimizer, saved)
            self.step, self.seconds, self.stretches = state["step"], state["seconds"], state["stretches"]
            self.pending = [tuple(pair) for pair in state["pending"]]

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name) for name in ("step", "seconds", "pending", "stretches")}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        save_state(path, state | {"model": self.model.state_dict()})


def _run(
    preset: Preset,
    tokens: Path,
    tokenizer: Tokenizer,
    folder: Path,
    keep_model: bool,
    teachers: Sequence[Path],
    here: Processes,
    signals: list,
) -> dict:
    config, device, checkpoint = preset.train, here.device, folder / "checkpoint.pt"
    if config.batch_size % (config.micro_batch_size * here.world_size):
        raise ConfigError(
            f"train.batch_size = {config.batch_size} cannot be shared by {here.world_size} processes with micro-batches of "
            f"{config.micro_batch_size} (train.micro_batch_size)."
        )
    stories = TokenStories(tokens, "train")
    batches = Batches(stories, preset.model.seq_len, config.batch_size, config.seed, config.max_stories)
    split = "official" if len(TokenStories(tokens, "official")) else "validation"
    held_out = TokenStories(tokens, split)
    watched = [tokenizer.decode(held_out[i].tolist()) for i in range(min(config.eval_stories, len(held_out)))]
    if here.first:
        for left in folder.glob(".*.tmp"):  # by a process that was killed while it wrote
            left.unlink()
    run = Run(preset, device)
    run.load(checkpoint)
    used = {"device": device_name(device), "dtype": resolve_dtype(device, config.dtype), "processes": here.world_size}
    run.stretches.append({"from_step": run.step, **used, "torch": str(torch.__version__)})
    loss_of = run.model
    if teachers:
        loss_of = Distilled(run.model, [load_model(path / "model", device)[0] for path in teachers], config.teacher_weight)
    if config.compile:
        loss_of = _compiled(loss_of, preset, device)
    if here.world_size > 1:
        loss_of = DistributedDataParallel(loss_of, device_ids=[device.index] if device.type == "cuda" else None)

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(RunLog(folder, run.step, preset))) if here.first else None
        power = stack.enter_context(contextlib.closing(PowerSampler(device)))
        data = batches.prefetched(range(run.step, config.steps), here.rank, here.world_size)
        stack.enter_context(contextlib.closing(data))
        bar = tqdm(total=config.steps, initial=run.step, desc=f"training {preset.name}", unit="step", disable=not here.first)
        stack.enter_context(bar)
        began = since = saved = time.perf_counter()  # since: of the last log line, moved on by evaluations and saves
        seconds, logged_step = run.seconds, run.step
        for batch in data:
            torch.manual_seed((config.seed * 1_000_003 + run.step) * 4096 + here.rank)  # dropout
            lr = learning_rate(run.step, config)
            run.pending.append(_step(loss_of, run.model, run.optimizers, batch, lr, config, here))
            run.step += 1
            bar.update()
            last = run.step == config.steps
            at_log, at_eval = (last or run.step % every == 0 for every in (config.log_every, config.eval_every))
            stopping = False
            if at_log or at_eval or (signals and here.world_size == 1):
                run.pending = [(float(loss), float(norm)) for loss, norm in run.pending]  # waits for the device
                _require_finite(run.pending, run.step, preset, checkpoint)
                stopping = here.any(bool(signals))  # a signal reaches the processes at different steps
            paused = time.perf_counter()
            if at_log:
                rate = (run.step - logged_step) * preset.tokens_per_step / (paused - since)
                loss = sum(loss for loss, _ in run.pending) / len(run.pending)
                if here.first:
                    log.write(
                        step=run.step,
                        tokens=run.step * preset.tokens_per_step,
                        loss=loss,
                        learning_rate=lr,
                        gradient_norm=run.pending[-1][1],
                        tokens_per_second=round(rate),
                        mfu=mfu(rate * flops_per_token(preset.model) / here.world_size, device),
                        power_w=power.watts(),
                        memory_gb=memory(device),
                    )
                bar.set_postfix(loss=f"{loss:.3f}", tokens_per_second=f"{rate:,.0f}")
                run.pending, since, logged_step = [], paused, run.step
            if here.first and at_eval:
                with precision(device, config.dtype):
                    found, *_ = score(run.model.eval(), tokenizer, watched)
                run.model.train()
                value = {"validation_bits_per_byte": found.bits_per_byte, "low": found.low, "high": found.high}
                log.write(step=run.step, tokens=run.step * preset.tokens_per_step, **value)
            run.seconds = seconds + time.perf_counter() - began
            due = at_log and time.perf_counter() - saved > 60 * config.checkpoint_minutes
            if here.first and (due or stopping or last):
                run.save(checkpoint)
                saved = time.perf_counter()
            since += time.perf_counter() - paused
            if stopping and not last:
                where = f"after step {run.step}; {checkpoint} continues from there."
                if signal.SIGINT in signals:
                    raise KeyboardInterrupt(f"stopped by Ctrl-C {where}")
                raise SystemExit(f"stopped by SIGTERM {where}")
    if not here.first:
        return {}
    if keep_model:
        save_model(folder / "model", run.model, tokenizer)
    training, evaluated = metrics(folder)
    summary = {
        "steps": run.step,
        "tokens": run.step * preset.tokens_per_step,
        "epochs": run.step * config.batch_size / batches.windows_per_epoch,
        "padding": round(batches.padding, 4),
        "seconds": round(run.seconds, 1),
        "loss": training[-1]["loss"],
        "validation_bits_per_byte": evaluated[-1]["validation_bits_per_byte"],
        "validation_split": split,
        **used,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "stretches": run.stretches,
    }
    write_json(folder / "summary.json", summary)
    if not keep_model:
        checkpoint.unlink()
    return summary


def _step(loss_of, model, optimizers, batch, lr, config, here: Processes):
    """One optimizer step over the micro-batches of `batch`; the mean loss and the gradient's norm, still on the device."""
    scored = (batch[:, 1] != NOT_SCORED).sum()
    if here.device.type == "cuda":
        batch = batch.pin_memory().to(here.device, non_blocking=True)
        scored = scored.to(here.device, non_blocking=True)
    if here.world_size > 1:
        dist.all_reduce(scored)
    parts = batch.split(config.micro_batch_size)
    total = torch.zeros((), device=here.device)
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        with contextlib.nullcontext() if last or here.world_size == 1 else loss_of.no_sync():
            inputs, targets, stories = part.unbind(1)
            with precision(here.device, config.dtype):
                loss = loss_of(inputs, targets, stories=stories if config.isolate_stories else None)
            # The mean over all tokens of the step, however padding falls on micro-batches and processes.
            loss = loss * (targets != NOT_SCORED).sum() / scored
            (loss * here.world_size).backward()  # DDP averages gradients over the processes
        total += loss.detach()
    if here.world_size > 1:
        dist.all_reduce(total)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm


def _compiled(model: torch.nn.Module, preset: Preset, device: torch.device):
    """The compiled model, tried on one micro-batch. Without a working compiler: a warning on a CPU, else RunError."""
    try:
        batch = torch.zeros(preset.train.micro_batch_size, 3, preset.model.seq_len, dtype=torch.int64, device=device)
        inputs, targets, stories = batch.unbind(1)  # laid out as in a step: else the first step would compile again
        compiled = torch.compile(model)
        with precision(device, preset.train.dtype):
            compiled(inputs, targets, stories=stories if preset.train.isolate_stories else None).backward()
    except Exception as error:  # a missing compiler shows as one of many kinds
        if device.type != "cpu":  # to train on eagerly would cost half of a rented machine's time, unseen
            raise RunError(
                f"torch.compile failed on {device}: {error}"[:500] + "\nSet train.compile=false to train without it, or a "
                "smaller train.micro_batch_size where memory is short."
            ) from error
        warnings.warn(f"torch.compile does not work here, training goes on without it: {error}"[:500], stacklevel=2)
        compiled = model
    model.zero_grad(set_to_none=True)
    return compiled


def _require_finite(pending: list[tuple[float, float]], step: int, preset: Preset, checkpoint: Path) -> None:
    for bad, (loss, norm) in enumerate(pending, step - len(pending)):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"loss {loss} and gradient norm {norm} in step {bad + 1} at learning rate "
                f"{learning_rate(bad, preset.train):.2e}; last good checkpoint: "
                f"{checkpoint if checkpoint.exists() else 'none yet'}. Lower train.learning_rate or raise train.warmup_steps."
            )
