"""Studies: runs in folders, found when finished, with the reason where one failed."""

import json
import math

import pytest

from blm_core import train
from blm_core.config import ConfigError
from blm_core.evidence import studies as study
from blm_core.evidence.studies import Study
from blm_core.files import read_json

TINY = [
    *("data.archive=sample", "data.validation_file=", "tokenizer.vocab_size=400", "tokenizer.sweep=400"),
    *("model.n_layers=1", "model.d_model=16", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=32", "model.seq_len=32"),
    *("train.steps=4", "train.warmup_steps=1", "train.batch_size=4", "train.micro_batch_size=4"),
    *("train.eval_every=4", "train.eval_stories=2", "train.log_every=1", "train.dtype=float32"),
]


@pytest.fixture(scope="module", autouse=True)
def tiny_preset():
    """The preset `study` on the embedded sample, so small that its runs take no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLM_OVERRIDES", " ".join(TINY))
        yield


RATES = Study(
    "rates",
    "Which norm, and which learning rate?",
    {"rms": "", "absurd": "train.weight_decay=1e25 train.warmup_steps=0", "layer": "model.norm=layer"},
    {"rms": (1e-3,), "absurd": (0.9,), "layer": (1e-3,)},
)


def test_runs_are_carried_out_and_a_diverged_one_is_kept_with_its_reason(tmp_path):
    study.run(RATES, tmp_path)
    results = study.results(RATES, tmp_path)
    assert [run["variant"] for run in results] == ["rms", "absurd", "layer"]
    rms, absurd, layer = results
    assert absurd["summary"].keys() == {"failed"}
    assert "in step 2 at learning rate" in absurd["summary"]["failed"]
    assert layer["model"]["norm"] == "layer"
    for run in (rms, layer):
        evaluated = train.metrics(run["folder"])[1][-1]
        assert run["summary"]["steps"] == 4
        assert run["summary"]["validation_bits_per_byte"] == evaluated["validation_bits_per_byte"]
        names = sorted(path.name for path in run["folder"].iterdir())
        assert names == ["config.json", "metrics.jsonl", "summary.json"]  # what is committed: text, and no weights
        for line in (run["folder"] / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert study.best(results) == {"rms": rms, "layer": layer}


def test_what_is_finished_or_failed_is_not_repeated_and_what_is_missing_is(tmp_path):
    study.run(RATES, tmp_path)
    rms, absurd, layer = (run["folder"] for run in study.results(RATES, tmp_path))
    kept = {path: path.stat().st_mtime_ns for folder in (rms, absurd) for path in folder.iterdir()}
    (layer / "summary.json").unlink()
    assert len(study.results(RATES, tmp_path)) == 2
    study.run(RATES, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert read_json(layer / "summary.json")["steps"] == 4


def test_studies_share_the_runs_that_they_have_in_common(tmp_path):
    study.run(RATES, tmp_path)
    other = Study("other", "Is it the same?", {"as before": "", "small": "model.d_ff=16"}, (1e-3,))
    (shared,) = study.results(other, tmp_path)
    assert shared["variant"] == "as before"
    assert shared["folder"] == study.results(RATES, tmp_path)[0]["folder"]


def test_a_run_that_cannot_start_is_no_result(tmp_path):
    wrong = Study("wrong", "Which speed?", {"fast": "train.speed=3"}, (1e-3,))
    with pytest.raises(ConfigError, match=r"train\.speed"):
        study.run(wrong, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_study_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no study 'colour'; there are: .*optimizer"):
        study.find("colour")


@pytest.mark.parametrize("each", study.STUDIES, ids=lambda each: each.name)
def test_every_study_asks_something_and_its_runs_differ(each, monkeypatch):
    monkeypatch.setenv("BLM_OVERRIDES", "")  # the real preset: what studies vary need not fit the tiny one
    assert each.question.endswith("?")
    names = [study.run_name(preset) for _, preset in each.runs]
    assert len(names) > 1
    assert len(set(names)) == len(names)
    assert {variant for variant, _ in each.runs} == set(each.variants)


def test_a_finished_run_on_other_data_is_named_and_not_mixed_in(tmp_path):
    study.run(RATES, tmp_path)
    rms = study.results(RATES, tmp_path)[0]["folder"]
    config = read_json(rms / "config.json")
    config["data"]["bytes"]["train"] += 1
    (rms / "config.json").write_text(json.dumps(config))
    with pytest.raises(train.RunError, match=r"another configuration \(data\.bytes"):
        study.run(RATES, tmp_path)


def test_steps_to_a_loss_are_read_between_the_runs_and_bounded_by_the_shortest(monkeypatch):
    monkeypatch.setenv("BLM_OVERRIDES", "")  # the committed runs, not the tiny ones
    runs = study.results(study.find("tokens"))
    at = {
        run["train"]["steps"]: run["summary"]["validation_bits_per_byte"] for run in runs if run["variant"].startswith("Muon")
    }
    assert study.steps_needed(at[50]) == pytest.approx(50)
    assert 50 < study.steps_needed((at[50] + at[75]) / 2) < 75
    assert study.steps_needed(9.0) == pytest.approx(min(at))
    assert math.isnan(study.steps_needed(0.1))


def test_differences_are_those_of_the_best_runs_from_the_first_variant_of_a_study(tmp_path, monkeypatch):
    monkeypatch.setenv("BLM_OVERRIDES", "")  # the committed runs, not the tiny ones
    rows = study.forest(["optimizer", "seeds"])
    best = study.best(study.results(study.find("optimizer")))
    adamw = best["adamw"]["summary"]["validation_bits_per_byte"] - best["muon"]["summary"]["validation_bits_per_byte"]
    assert rows[:2] == [("optimizer", "muon", 0.0), ("optimizer", "adamw", adamw)]
    assert study.forest(["optimizer"], tmp_path) == []


def test_speeds_that_leave_out_the_time_before_an_evaluation_are_not_used(tmp_path):
    lines = [{"step": step, "loss": 1.0, "tokens_per_second": 5} for step in (10, 20, 30)]
    lines.insert(1, {"step": 15, "validation_bits_per_byte": 1.0})
    lines.append({"step": 30, "validation_bits_per_byte": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept, left_out = study.speeds(tmp_path)
    assert ([line["step"] for line in kept], left_out) == ([10, 30], 1)
    assert sum(study.speeds(path.parent)[1] > 0 for path in study.RUNS.glob("*/metrics.jsonl")) > 50
