"""Speeds set against each other: measured by turns, A B A B, so that a machine that slows down slows both."""

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from blm_core import config as configuration
from blm_core import data, pipeline
from blm_core import tokens as shards
from blm_core.checkpoint import load_model, save_model
from blm_core.config import ROOT, Preset
from blm_core.evidence.bench_training import Effort, Loop, training_stories
from blm_core.generate import Sampling, sample_tokens
from blm_core.hardware import resolve_dtype
from blm_core.model import LanguageModel
from blm_core.optimizer import learning_rate


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


def bench_optimizers(preset: Preset, effort: Effort) -> dict:
    """Training with Muon against the same with AdamW, on the CPU, in tokens per second: what a step of Muon costs."""
    sides = [
        Loop(configuration.override(preset, [f"train.optimizer={name}"]), torch.device("cpu")) for name in ("muon", "adamw")
    ]
    with sides[0] as muon, sides[1] as adamw:
        adamw.run(1), muon.run(1)
        steps = max(1, round(effort.seconds / 2 / adamw.run(1)))
        return ratio(
            f"training step, shape of `{preset.name}`, CPU",
            "tokens/s",
            ("Muon", lambda: steps * preset.tokens_per_step / muon.run(steps)),
            ("AdamW", lambda: steps * preset.tokens_per_step / adamw.run(steps)),
            effort.repeats,
            target="none",
        )


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
        command = "pip install transformers; python -m blm_core.evidence bench"
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
            rows.append(found | {"note": f"{name}, {tokens} tokens"})
    return rows
