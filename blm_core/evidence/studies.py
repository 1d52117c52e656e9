"""Experiments: each a question, its variants and the learning rates that they are run at. Notebook 04 defines them.

All start from the preset `study`; what a variant does not change is held fixed. A run is a folder, named by what it changes,
with its configuration, metrics and summary; that of a failed one says why. What is finished is found and not repeated, and
one run may serve several studies.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from blm_core import config, pipeline, train
from blm_core.config import ROOT, Preset
from blm_core.files import read_json, write_json
from blm_core.model import flops_per_token

RUNS = ROOT / "runs" / "study"
BASE = config.PRESETS["study"]


@dataclass(frozen=True)
class Study:
    """`variants` maps a name to the settings that it changes; each is run at each of its learning rates, if only at BASE's."""

    question: str
    variants: dict[str, str]
    learning_rates: dict[str, tuple[float, ...]] | tuple[float, ...] = (BASE.train.learning_rate,)

    @property
    def runs(self) -> list[tuple[str, Preset]]:
        """The variant of each run, and its preset."""
        rates = self.learning_rates
        if not isinstance(rates, dict):
            rates = dict.fromkeys(self.variants, rates)
        return [
            (variant, config.override(BASE, [*changes.split(), f"train.learning_rate={rate:g}"]))
            for variant, changes in self.variants.items()
            for rate in rates.get(variant, (BASE.train.learning_rate,))
        ]


def steps(n: int) -> str:
    """Settings of a run of `n` steps, the first tenth of them warm-up."""
    return f"train.steps={n} train.warmup_steps={round(n / 10)}"


def shape(layers: int, width: int, d_ff: int = 0) -> str:
    """Settings of a model with heads of 32, as many keys and values, and `d_ff` near 8/3 of the width unless given."""
    heads, d_ff = width // 32, d_ff or width * 8 // 3 // 16 * 16
    return f"model.n_layers={layers} model.d_model={width} model.n_heads={heads} model.n_kv_heads={heads} model.d_ff={d_ff}"


def run(study: Study, folder: Path = RUNS) -> None:
    """Carry out what is missing of `study`. Raises RunError where a finished run was made from other data."""
    data = config.load("study").data  # where the environment says that the stories are
    for _, preset in study.runs:
        preset = dataclasses.replace(preset, data=data)
        target = Path(folder) / run_name(preset)
        pipeline.tokens(preset)
        try:
            train.train(preset, preset.folder / "tokens", pipeline.tokenizer(preset), target, keep_model=False)
        except train.DivergedError as error:
            write_json(target / "summary.json", {"failed": str(error)})


def results(study: Study, folder: Path = RUNS) -> list[dict]:
    """Variant, folder, configuration and summary of every run of `study` that reached its end, in the study's order."""
    finished = []
    for variant, preset in study.runs:
        place = Path(folder) / run_name(preset)
        summary = read_json(place / "summary.json")
        if summary and "failed" not in summary:
            finished.append({"variant": variant, "folder": place, "summary": summary, **read_json(place / "config.json")})
    return finished


def run_name(preset: Preset) -> str:
    """What `preset` changes in the preset `study`, apart from where the data come from."""
    changed = []
    for part in ("tokenizer", "model", "train"):
        before = vars(getattr(BASE, part))
        for key, value in vars(getattr(preset, part)).items():
            if value != before[key] and key not in ("sweep", *train.FREE):
                changed.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return ",".join(sorted(set(changed))) or "base"


def bits_per_byte(run: dict) -> float:
    return run["summary"]["validation_bits_per_byte"]


def flops(run: dict) -> float:
    return run["summary"]["tokens"] * flops_per_token(config.ModelConfig(**run["model"]))


def best(study: Study, folder: Path = RUNS) -> dict[str, dict]:
    """Of each variant that was run, the run with the lowest bits per byte."""
    chosen: dict[str, dict] = {}
    for run in results(study, folder):
        chosen[run["variant"]] = min(chosen.get(run["variant"], run), run, key=bits_per_byte)
    return chosen


def differences(study: Study, folder: Path = RUNS) -> dict[str, float]:
    """Bits per byte of each variant's best run minus those of the first variant, NaN where that was not run."""
    reached = {variant: bits_per_byte(run) for variant, run in best(study, folder).items()}
    first = reached.get(next(iter(study.variants)), math.nan)
    return {variant: bits - first for variant, bits in reached.items()}
