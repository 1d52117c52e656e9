"""The experiments: each a question, its variants, and what is tuned anew for each of them.

All runs start from the preset `study`; what a variant does not change is held fixed. A run is a folder, named by what it
changes, with its configuration, metrics and summary; a failed one has a summary that says why. What is finished is found
and not repeated, and one run may serve several studies. Tables and figures are made from these folders alone, by 04_train.
"""

import math
from dataclasses import dataclass
from itertools import product
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


BEST, NEAR, WIDE = (1.6e-2,), (8e-3, 1.6e-2), (4e-3, 8e-3, 1.6e-2, 3.2e-2)  # learning rates of Muon
ADAMW = (2e-3, 4e-3, 8e-3, 1.6e-2)
FEW_STEPS = {f"Muon, {n} steps": f"train.steps={n} train.warmup_steps={round(n / 10)}" for n in (25, 50, 75, 100, 150)}
STUDIES = [
    Study(
        "optimizer",
        "Muon or AdamW for the matrices of the blocks, and at which learning rate?",
        {"muon": "", "adamw": "train.optimizer=adamw"},
        {"muon": WIDE, "adamw": ADAMW},
    ),
    Study(
        "packing",
        "Does it help to forbid attention between the stories of a window?",
        {"shared": "train.isolate_stories=false", "isolated": ""},
        {"shared": WIDE[:3], "isolated": WIDE},
    ),
    Study(
        "seeds",
        "How far do runs differ that differ in nothing but the seed?",
        {f"seed {seed}": f"train.seed={seed}" for seed in range(1, 6)},
        BEST,
    ),
    Study(
        "schedule",
        "Cosine, or warm-up, stable and decay?",
        {
            "cosine": "",
            "stable, then decay over 50 %": "train.schedule=wsd train.decay_share=0.5",
            "stable, then decay over 20 %": "train.schedule=wsd",
        },
        BEST,
    ),
    Study(
        "batch",
        "How many windows in a step, at equal tokens?",
        {
            "4 windows": "train.batch_size=4 train.micro_batch_size=4 train.steps=500 train.warmup_steps=50",
            "8 windows": "",
            "16 windows": "train.batch_size=16 train.steps=125 train.warmup_steps=12",
        },
        NEAR,
    ),
    Study(
        "shape",
        "Deep or wide, at about equal parameters?",
        {
            "2 layers of 128": "model.n_layers=2 model.d_model=128 model.n_heads=4 model.n_kv_heads=4 model.d_ff=320",
            "4 layers of 96": "",
            "8 layers of 64": "model.n_layers=8 model.d_model=64 model.n_heads=2 model.n_kv_heads=2 model.d_ff=208",
        },
        NEAR,
    ),
    Study(
        "vocabulary",
        "How many pieces, at equal tokens and so at equal computation in the blocks?",
        {f"{size} pieces": f"tokenizer.vocab_size={size}" for size in (1024, 2048, 4096)},
        NEAR,
    ),
    Study(
        "vocabulary-flops",
        "How many pieces, at equal FLOPs, those of the output matrix included?",
        {
            f"{size} pieces, {steps} steps": f"tokenizer.vocab_size={size} train.steps={steps}"
            for size, steps in ((1024, 276), (2048, 250), (4096, 210), (8192, 159))
        },
        BEST,
    ),
    Study(
        "heads",
        "Smaller heads, or fewer keys and values?",
        {
            "3 heads of 32": "",
            "6 heads of 16": "model.n_heads=6 model.n_kv_heads=6",
            "3 heads, 1 key/value head": "model.n_kv_heads=1",
        },
        BEST,
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
        {"Llama": NEAR, "learned positions": NEAR, "LayerNorm": BEST, "GELU feed-forward": BEST, "GPT-2 block": NEAR},
    ),
    Study(
        "tokens",
        "How many steps until the loss that AdamW reaches in 250?",
        {
            "llama2.c's settings, 250 steps": "train.optimizer=adamw train.isolate_stories=false",
            "AdamW, 250 steps": "train.optimizer=adamw",
            **FEW_STEPS,
        },
        {"llama2.c's settings, 250 steps": (5e-4,), "AdamW, 250 steps": ADAMW, **dict.fromkeys(FEW_STEPS, BEST)},
    ),
    Study(
        "few-data",
        "With 250 stories only: how many epochs, how much weight decay and dropout?",
        {
            f"{epochs} epochs, decay {decay}, dropout {dropout}": (
                f"train.max_stories=250 train.steps={14 * epochs} train.weight_decay={decay} model.dropout={dropout}"
            )
            for epochs, decay, dropout in product((4, 12), (0.1, 0.5), (0.0, 0.1))
        },
        BEST,
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
        BEST,
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
    places = [(variant, Path(folder) / run_name(preset)) for variant, preset in study.runs]
    return [
        {"variant": variant, "folder": place, "summary": summary, **read_json(place / "config.json")}
        for variant, place in places
        if (summary := read_json(place / "summary.json"))
    ]


def run_name(preset: Preset) -> str:
    """What `preset` changes in the preset `study`, apart from where the data come from."""
    changed = set()
    for part in ("tokenizer", "model", "train"):
        before = vars(getattr(config.PRESETS["study"], part))
        for key, value in vars(getattr(preset, part)).items():
            if value != before[key] and key not in ("sweep", *train.FREE):
                changed.add(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return ",".join(sorted(changed)) or "base"


def best(runs: list[dict]) -> dict[str, dict]:
    """Of each variant, the run with the lowest bits per byte; failed runs never are."""
    chosen: dict[str, dict] = {}
    for run in sorted((run for run in runs if "failed" not in run["summary"]), key=bits_per_byte):
        chosen.setdefault(run["variant"], run)
    return chosen


def bits_per_byte(run: dict) -> float:
    return run["summary"]["validation_bits_per_byte"]


def flops(run: dict) -> float:
    return run["summary"].get("tokens", 0) * flops_per_token(config.ModelConfig(**run["model"]))


def seed_noise(folder: Path = RUNS) -> float:
    """What two runs that differ in nothing but the seed differ by at most, in 95 of 100 cases; NaN below three seeds.

    Student's t for the standard deviation of the seeds that were run, times that of a difference.
    """
    from scipy.stats import t

    values = [bits_per_byte(run) for run in results(find("seeds"), folder)]
    return float(t.ppf(0.975, len(values) - 1) * 2**0.5 * np.std(values, ddof=1)) if len(values) > 2 else math.nan


def steps_needed(goal: float, folder: Path = RUNS) -> float:
    """Steps that the recipe needs to reach `goal` bits per byte: interpolated, in the logarithm of the steps, between runs of
    the study `tokens` and the whole run, each with a schedule of its own. Where the shortest run was better already, its
    steps, which then are the most that can be needed; NaN where none was as good."""
    recipe = {"optimizer": "muon", "learning_rate": config.PRESETS["study"].train.learning_rate}
    runs = [run for name in ("tokens", "optimizer") for run in results(find(name), folder)]
    points = sorted((bits_per_byte(run), run["train"]["steps"]) for run in runs if recipe.items() <= run["train"].items())
    if not points or goal < points[0][0]:
        return math.nan
    reached, steps = zip(*points, strict=True)
    return float(np.exp(np.interp(goal, reached, np.log(steps))))


def forest(names: list[str], folder: Path = RUNS) -> list[tuple[str, str, float]]:
    """Study, variant and bits per byte of its best run minus those of the study's first variant, for every finished variant."""
    rows = []
    for study in map(find, names):
        reached = {variant: bits_per_byte(run) for variant, run in best(results(study, folder)).items()}
        first = next(iter(study.variants))
        if first in reached:
            rows += [(study.name, v, reached[v] - reached[first]) for v in study.variants if v in reached]
    return rows
