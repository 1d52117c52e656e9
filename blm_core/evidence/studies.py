"""The experiments: each a question, its variants, and what is tuned anew for each of them.

All runs start from the preset `study`; what a variant does not change is held fixed. A run is a folder, named by what it
changes, with its configuration, metrics and summary; a failed one has a summary that says why. What is finished is found
and not repeated, and one run may serve several studies. Tables and figures are made from these folders alone, by 04_train.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blm_core import config, pipeline, train
from blm_core.config import ROOT, ConfigError, Preset
from blm_core.files import read_json, write_json
from blm_core.model import flops_per_token

RUNS = ROOT / "runs" / "study"


@dataclass(frozen=True)
class Study:
    """One question. `variants` maps a name to what it changes; each is run at each of its learning rates."""

    name: str
    question: str
    variants: dict[str, str]
    learning_rates: dict[str, tuple[float, ...]] | tuple[float, ...]

    @property
    def runs(self) -> list[tuple[str, Preset]]:
        """The variant of each run, and its preset."""
        rates = self.learning_rates
        return [
            (variant, config.override(config.load("study"), [*changes.split(), f"train.learning_rate={rate:g}"]))
            for variant, changes in self.variants.items()
            for rate in (rates[variant] if isinstance(rates, dict) else rates)
        ]


RATES = (8e-3, 1.6e-2)
STUDENT = {2: 4.303, 3: 3.182, 4: 2.776}  # 97.5 % quantiles of Student's t, by degrees of freedom
STUDIES = [
    Study(
        "optimizer",
        "Muon or AdamW for the matrices of the blocks, and at which learning rate?",
        {"muon": "", "adamw": "train.optimizer=adamw"},
        {"muon": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "adamw": (2e-3, 4e-3, 8e-3, 1.6e-2)},
    ),
    Study(
        "packing",
        "Does it help to forbid attention between the stories of a window?",
        {"shared": "train.isolate_stories=false", "isolated": ""},
        {"shared": (4e-3, 8e-3, 1.6e-2), "isolated": (4e-3, 8e-3, 1.6e-2, 3.2e-2)},
    ),
    Study(
        "seeds",
        "How far do runs differ that differ in nothing but the seed?",
        {f"seed {seed}": f"train.seed={seed}" for seed in range(1, 6)},
        (1.6e-2,),
    ),
    Study(
        "schedule",
        "Cosine, or warm-up, stable and decay? Does an average of the weights help?",
        {
            "cosine": "",
            "cosine, averaged": "train.weight_average=0.98",
            "stable, then decay over 50 %": "train.schedule=wsd train.decay_share=0.5",
            "stable, then decay over 20 %": "train.schedule=wsd",
        },
        (1.6e-2,),
    ),
    Study(
        "batch",
        "How many windows in a step, at equal tokens?",
        {
            "4 windows": "train.batch_size=4 train.micro_batch_size=4 train.steps=500 train.warmup_steps=50",
            "8 windows": "",
            "16 windows": "train.batch_size=16 train.steps=125 train.warmup_steps=12",
        },
        RATES,
    ),
    Study(
        "shape",
        "Deep or wide, at about equal parameters?",
        {
            "2 layers of 128": "model.n_layers=2 model.d_model=128 model.n_heads=4 model.n_kv_heads=4 model.d_ff=320",
            "4 layers of 96": "",
            "8 layers of 64": "model.n_layers=8 model.d_model=64 model.n_heads=2 model.n_kv_heads=2 model.d_ff=208",
        },
        RATES,
    ),
    Study(
        "vocabulary",
        "How many pieces, at equal tokens and so at equal computation in the blocks?",
        {f"{size} pieces": f"tokenizer.vocab_size={size}" for size in (1024, 2048, 4096)},
        RATES,
    ),
    Study(
        "vocabulary-flops",
        "How many pieces, at equal FLOPs, those of the output matrix included?",
        {
            f"{size} pieces, {steps} steps": f"tokenizer.vocab_size={size} train.steps={steps}"
            for size, steps in ((1024, 276), (2048, 250), (4096, 210), (8192, 159))
        },
        (1.6e-2,),
    ),
    Study(
        "heads",
        "Smaller heads, or fewer keys and values?",
        {
            "3 heads of 32": "",
            "6 heads of 16": "model.n_heads=6 model.n_kv_heads=6",
            "3 heads, 1 key/value head": "model.n_kv_heads=1",
        },
        (1.6e-2,),
    ),
    Study(
        "block",
        "What does each part of the Llama block bring over that of GPT-2?",
        {
            "Llama": "",
            "learned positions": "model.position=learned",
            "LayerNorm": "model.norm=layer",
            "GELU feed-forward": "model.feed_forward=gelu model.d_ff=384",
            "GPT-2 block": "model.position=learned model.norm=layer model.feed_forward=gelu model.d_ff=384",
        },
        {
            "Llama": RATES,
            "learned positions": RATES,
            "LayerNorm": RATES[1:],
            "GELU feed-forward": RATES[1:],
            "GPT-2 block": RATES,
        },
    ),
    Study(
        "tokens",
        "How many steps until the loss that AdamW reaches in 250?",
        {
            "llama2.c's settings, 250 steps": "train.optimizer=adamw train.isolate_stories=false",
            "AdamW, 250 steps": "train.optimizer=adamw",
            **{
                f"Muon, {steps} steps": f"train.steps={steps} train.warmup_steps={round(steps / 10)}"
                for steps in (25, 50, 75, 100, 150)
            },
        },
        {
            "llama2.c's settings, 250 steps": (5e-4,),
            "AdamW, 250 steps": (2e-3, 4e-3, 8e-3, 1.6e-2),
            **{f"Muon, {steps} steps": (1.6e-2,) for steps in (25, 50, 75, 100, 150)},
        },
    ),
    Study(
        "few-data",
        "With 250 stories only: how many epochs, how much weight decay and dropout?",
        {
            f"{epochs} epochs, decay {decay}, dropout {dropout}": (
                f"train.max_stories=250 train.steps={14 * epochs} train.weight_decay={decay} model.dropout={dropout}"
            )
            for epochs in (4, 12)
            for decay in (0.1, 0.5)
            for dropout in (0.0, 0.1)
        },
        (1.6e-2,),
    ),
    Study(
        "scaling",
        "How does the loss fall with parameters and tokens?",
        {
            f"{layers} x {width}, {tokens} M tokens": (
                f"model.n_layers={layers} model.d_model={width} model.n_heads={width // 32} "
                f"model.n_kv_heads={width // 32} model.d_ff={width * 8 // 3 // 16 * 16} "
                f"train.steps={round(tokens * 1e6 / 4096)} train.warmup_steps={round(tokens * 1e6 / 40960)}"
            )
            for layers, width in ((2, 32), (2, 64), (3, 96), (4, 96), (4, 128))
            for tokens in (0.2, 0.4, 0.8, 1.6)
        },
        (1.6e-2,),
    ),
]


def find(name: str) -> Study:
    """The study called `name`. Raises ConfigError naming those that there are."""
    found = {study.name: study for study in STUDIES}
    if name not in found:
        raise ConfigError(f"there is no study {name!r}; there are: {', '.join(found)}")
    return found[name]


def run(study: Study, folder: Path = RUNS) -> None:
    """Carry out what is missing of `study`. Raises RunError where a finished run was made from other data."""
    for _, preset in study.runs:
        target = Path(folder) / run_name(preset)
        pipeline.tokens(preset)
        try:
            train.train(preset, preset.folder / "tokens", pipeline.tokenizer(preset), target, keep_model=False)
        except train.DivergedError as error:
            write_json(target / "summary.json", {"failed": str(error)})


def results(study: Study, folder: Path = RUNS) -> list[dict]:
    """Variant, folder, configuration and summary of every finished run of `study`, in the study's order."""
    found = []
    for variant, preset in study.runs:
        target = Path(folder) / run_name(preset)
        summary = read_json(target / "summary.json")
        if summary:
            found.append({"variant": variant, "folder": target, "summary": summary, **read_json(target / "config.json")})
    return found


def run_name(preset: Preset) -> str:
    """What `preset` changes in the preset `study`, apart from where the data come from."""
    base = config.PRESETS["study"]
    changed = []
    for part in ("tokenizer", "model", "train"):
        mine, theirs = vars(getattr(preset, part)), vars(getattr(base, part))
        changed += [
            f"{key}={mine[key]:g}" if isinstance(mine[key], float) else f"{key}={mine[key]}"
            for key in mine
            if mine[key] != theirs[key] and key not in ("sweep", *train.FREE)
        ]
    return ",".join(sorted(set(changed))) or "base"


def best(runs: list[dict]) -> dict[str, dict]:
    """Of each variant, the run with the lowest bits per byte; failed runs never are."""
    chosen: dict[str, dict] = {}
    for each in runs:
        value = each["summary"].get("validation_bits_per_byte")
        if value is not None:
            before = chosen.get(each["variant"])
            if before is None or value < before["summary"]["validation_bits_per_byte"]:
                chosen[each["variant"]] = each
    return chosen


def seed_noise(folder: Path = RUNS) -> float:
    """What two runs that differ in nothing but the seed differ by at most, in 95 of 100 cases; NaN below three seeds.

    Student's t for the standard deviation of the seeds that were run, times that of a difference.
    """
    values = [run["summary"]["validation_bits_per_byte"] for run in results(find("seeds"), folder)]
    return STUDENT[len(values) - 1] * 2**0.5 * statistics.stdev(values) if len(values) - 1 in STUDENT else math.nan


def steps_needed(bits_per_byte: float, folder: Path = RUNS) -> float:
    """Steps that the recipe needs to reach `bits_per_byte`: interpolated, in the logarithm of the steps, between runs of
    the study `tokens` and the whole run, each with a schedule of its own. Where the shortest run was better already, its
    steps, which then are the most that can be needed; NaN where none was as good."""
    names = ("tokens", "optimizer")
    runs = [run for name in names for run in results(find(name), folder) if run["train"]["optimizer"] == "muon"]
    points = sorted(
        (run["summary"]["validation_bits_per_byte"], run["train"]["steps"])
        for run in runs
        if run["train"]["learning_rate"] == config.PRESETS["study"].train.learning_rate
    )
    if not points or bits_per_byte < points[0][0]:
        return math.nan
    reached, steps = zip(*points, strict=True)
    return float(np.exp(np.interp(bits_per_byte, reached, np.log(steps))))


def forest(names: list[str], folder: Path = RUNS) -> list[tuple[str, str, float]]:
    """Study, variant and bits per byte of its best run minus those of the study's first variant, for every finished variant."""
    rows = []
    for study in map(find, names):
        chosen = best(results(study, folder))
        first = chosen.get(next(iter(study.variants)))
        if first:
            base = first["summary"]["validation_bits_per_byte"]
            own = ((v, chosen[v]["summary"]["validation_bits_per_byte"] - base) for v in study.variants if v in chosen)
            rows += [(study.name, variant, difference) for variant, difference in own]
    return rows


def speeds(folder: Path) -> tuple[list[dict], int]:
    """The training lines of a run whose tokens per second can be used, and how many cannot.

    In runs made before the clock was mended, a line counts the steps before an evaluation but not their time: its speed is
    too high, up to double.
    """
    training, validation = train.metrics(folder)
    evaluated, kept, before = {line["step"] for line in validation}, [], 0
    for line in training:
        if not any(before < step < line["step"] for step in evaluated):
            kept.append(line)
        before = line["step"]
    return kept, len(training) - len(kept)


def comparison(study: Study, folder: Path = RUNS) -> list[tuple[str, ...]]:
    """A row for each variant: name, bits per byte at its best learning rate, that minus the first variant's, the rate
    and those tried, TFLOPs of all its runs (the machine's load does not change them, as it does seconds)."""
    runs, noise = results(study, folder), seed_noise(folder)
    chosen = best(runs)
    rows: list[tuple[str, ...]] = []
    if len({run["variant"] for run in runs}) < 2:  # one alone compares with nothing
        return [(f"{len(study.variants)} variants", "not run", "", "", "")]
    for variant in study.variants:
        mine = [run for run in runs if run["variant"] == variant]
        if variant not in chosen:
            rows.append((variant, "failed" if mine else "not run", "", "", ""))
            continue
        value = chosen[variant]["summary"]["validation_bits_per_byte"]
        rates = sorted(f"{run['train']['learning_rate']:g}" for run in mine)
        rate = f"{chosen[variant]['train']['learning_rate']:g}"
        rows.append(
            (
                variant,
                f"{value:.4f}",
                _against(value, chosen.get(next(iter(study.variants))), noise),
                rate if len(rates) == 1 else f"{rate} of {', '.join(rates)}",
                f"{sum(flops(run) for run in mine) / 1e12:.0f}",
            )
        )
    return rows


def flops(run: dict) -> float:
    return run["summary"].get("tokens", 0) * flops_per_token(config.ModelConfig(**run["model"]))


def _against(value: float, first: dict | None, noise: float) -> str:
    difference = value - first["summary"]["validation_bits_per_byte"] if first else 0
    if not difference:
        return ""
    return f"{difference:+.4f}" + (" (noise)" if abs(difference) < noise else " (noise unknown)" if math.isnan(noise) else "")
