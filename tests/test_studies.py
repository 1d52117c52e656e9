"""Studies: runs in folders, found when finished, with the reason where one failed."""

import math

import pytest

from blm_core import train
from blm_core.evidence import studies as study
from blm_core.evidence.studies import Study
from blm_core.files import read_json, write_json

TINY = [
    *("data.archive=sample", "data.validation_file=", "tokenizer.vocab_size=400", "tokenizer.sweep=400"),
    *("model.n_layers=1", "model.d_model=16", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=32", "model.seq_len=32"),
    *("train.steps=4", "train.warmup_steps=1", "train.batch_size=4", "train.micro_batch_size=4"),
    *("train.eval_every=4", "train.eval_stories=2", "train.log_every=1", "train.dtype=float32"),
]
RATES = Study(
    "rates",
    "Which norm, and which learning rate?",
    {"rms": "", "absurd": "train.weight_decay=1e25 train.warmup_steps=0", "layer": "model.norm=layer"},
    {"rms": (1e-3,), "absurd": (0.9,), "layer": (1e-3,)},
)


def test_runs_are_carried_out_once_and_a_diverged_one_is_kept_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("BLM_OVERRIDES", " ".join(TINY))  # the preset `study` on the embedded sample, tiny
    study.run(RATES, tmp_path)
    results = study.results(RATES, tmp_path)
    assert [run["variant"] for run in results] == ["rms", "absurd", "layer"]
    rms, absurd, layer = results
    assert absurd["summary"].keys() == {"failed"}
    assert "learning rate" in absurd["summary"]["failed"]
    assert layer["model"]["norm"] == "layer"
    for run in (rms, layer):
        evaluated = train.metrics(run["folder"])[1][-1]
        assert run["summary"]["steps"] == 4
        assert run["summary"]["validation_bits_per_byte"] == evaluated["validation_bits_per_byte"]
        names = sorted(path.name for path in run["folder"].iterdir())
        assert names == ["config.json", "metrics.jsonl", "summary.json"]  # what is committed: text, and no weights
    assert study.best(results) == {"rms": rms, "layer": layer}

    kept = {path: path.stat().st_mtime_ns for run in (rms, absurd) for path in run["folder"].iterdir()}
    (layer["folder"] / "summary.json").unlink()
    assert len(study.results(RATES, tmp_path)) == 2
    study.run(RATES, tmp_path)  # what is missing, and nothing else
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert study.results(RATES, tmp_path)[2]["summary"]["steps"] == 4

    other = Study("other", "Is it the same?", {"as before": "", "small": "model.d_ff=16"}, (1e-3,))
    (shared,) = study.results(other, tmp_path)
    assert (shared["variant"], shared["folder"]) == ("as before", rms["folder"])

    config = read_json(rms["folder"] / "config.json")
    config["data"]["bytes"]["train"] += 1
    write_json(rms["folder"] / "config.json", config)
    with pytest.raises(train.RunError, match=r"another configuration \(data\.bytes"):
        study.run(RATES, tmp_path)


def test_every_study_asks_something_and_its_runs_differ_and_were_all_made():
    for each in study.STUDIES:
        names = [study.run_name(preset) for _, preset in each.runs]
        assert each.question.endswith("?")
        assert len(set(names)) == len(names) > 1
        assert len(study.results(each)) == len(names)


def test_steps_to_a_loss_are_read_between_the_runs_and_bounded_by_the_shortest():
    muon = [run for run in study.results(study.find("tokens")) if run["variant"].startswith("Muon")]
    at = {run["train"]["steps"]: study.bits_per_byte(run) for run in muon}
    assert study.steps_needed(at[50]) == pytest.approx(50)
    assert 50 < study.steps_needed((at[50] + at[75]) / 2) < 75
    assert study.steps_needed(9.0) == pytest.approx(min(at))
    assert math.isnan(study.steps_needed(0.1))


def test_differences_are_those_of_the_best_runs_from_the_first_variant_of_a_study(tmp_path):
    rows = study.forest(["optimizer", "seeds"])
    best = study.best(study.results(study.find("optimizer")))
    adamw = study.bits_per_byte(best["adamw"]) - study.bits_per_byte(best["muon"])
    assert rows[:2] == [("optimizer", "muon", 0.0), ("optimizer", "adamw", adamw)]
    assert study.forest(["optimizer"], tmp_path) == []
    assert math.isnan(study.seed_noise(tmp_path))
