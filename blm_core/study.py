"""The experiments: each a question, what is varied, what is held fixed, and its runs.

Every run is a folder `runs/STUDY/RUN/` with its configuration, metrics and summary; a failed one has a summary that says
why. What is finished is found and not repeated. Tables and figures are made from these folders alone, by 04_train.
"""

from dataclasses import dataclass
from pathlib import Path

from blm_core import config, pipeline, train
from blm_core.config import ROOT, ConfigError
from blm_core.files import read_json, write_json

RUNS = ROOT / "runs"


@dataclass(frozen=True)
class Study:
    """One question. `runs` maps a run's name to what it changes in the preset `study`."""

    name: str
    question: str
    varied: str
    tuned: str  # what is chosen anew for each variant
    runs: dict[str, tuple[str, ...]]


def _grid(variants: dict[str, str], rates: dict[str, tuple[float, ...]] | tuple[float, ...]) -> dict[str, tuple[str, ...]]:
    """Every variant at each of its learning rates."""
    return {
        f"{name}-lr{rate:g}": (*changes.split(), f"train.learning_rate={rate:g}")
        for name, changes in variants.items()
        for rate in (rates[name] if isinstance(rates, dict) else rates)
    }


STUDIES = [
    Study(
        "optimizer",
        "Muon or AdamW, and at which learning rate?",
        "the optimizer of the blocks' matrices",
        "the learning rate",
        _grid(
            {"muon": "train.optimizer=muon", "adamw": "train.optimizer=adamw"},
            {"muon": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "adamw": (2e-3, 4e-3, 8e-3, 1.6e-2)},
        ),
    ),
    Study(
        "packing",
        "Does it help to forbid attention between the stories of a window?",
        "the attention mask",
        "nothing: the mask does not change the scale of any gradient",
        {"isolated": ("train.isolate_stories=true",), "shared": ()},
    ),
]


def find(name: str) -> Study:
    """The study called `name`. Raises ConfigError naming those that there are."""
    found = {study.name: study for study in STUDIES}
    if name not in found:
        raise ConfigError(f"there is no study {name!r}; there are: {', '.join(found)}")
    return found[name]


def run(study: Study, folder: Path = RUNS) -> None:
    """Carry out what is missing of `study`."""
    for name, changes in study.runs.items():
        target = Path(folder) / study.name / name
        if read_json(target / "summary.json"):
            continue
        preset = config.override(config.load("study"), list(changes))
        pipeline.tokens(preset)
        try:
            train.train(preset, preset.folder / "tokens", pipeline.tokenizer(preset), target, keep_model=False)
        except train.RunError as error:
            if not read_json(target / "config.json"):
                raise
            write_json(target / "summary.json", {"failed": str(error).split(";")[0]})


def results(name: str, folder: Path = RUNS) -> list[dict]:
    """Name, configuration and summary of every run of the study `name`, in the study's order."""
    found = []
    for run_name in find(name).runs:
        target = Path(folder) / name / run_name
        summary = read_json(target / "summary.json")
        if summary:
            found.append({"run": run_name, "folder": target, **read_json(target / "config.json"), "summary": summary})
    return found
