"""Studies: runs in folders, found when finished, with the reason where one failed."""

import json

import pytest

from blm_core import config, train
from blm_core.evidence import studies
from blm_core.evidence.studies import Study
from blm_core.files import read_json, write_json

TINY = (
    "tokenizer.vocab_size=400 tokenizer.sweep=400 model.n_layers=1 model.d_model=16 model.n_heads=2 model.n_kv_heads=1 "
    "model.d_ff=32 model.seq_len=32 train.steps=4 train.warmup_steps=1 train.batch_size=4 train.micro_batch_size=4 "
    "train.eval_every=4 train.eval_stories=2 train.log_every=1 train.dtype=float32"
)
NORMS = Study(
    "Which norm?",
    {"rms": TINY, "absurd": f"{TINY} train.weight_decay=1e25 train.warmup_steps=0", "layer": f"{TINY} model.norm=layer"},
    {"rms": (1e-3, 1e-4), "absurd": (0.9,), "layer": (1e-3,)},
)


def test_runs_are_carried_out_once_and_a_diverged_one_leaves_its_reason(monkeypatch, tmp_path):
    monkeypatch.setenv(
        "BLM_OVERRIDES", "data.archive=sample data.validation_file= model.dropout=0.5"
    )  # only the data's reach it
    assert studies.differences(NORMS, tmp_path) == {}
    studies.run(NORMS, tmp_path)
    rms, slow, layer = results = studies.results(NORMS, tmp_path)
    assert [run["variant"] for run in results] == ["rms", "rms", "layer"]
    (absurd,) = set(tmp_path.iterdir()) - {run["folder"] for run in results}
    assert "learning rate" in read_json(absurd / "summary.json")["failed"]
    for run in results:
        evaluated = train.metrics(run["folder"])[1][-1]
        assert (run["summary"]["steps"], run["model"]["dropout"]) == (4, 0)
        assert studies.bits_per_byte(run) == evaluated["validation_bits_per_byte"]
        names = sorted(path.name for path in run["folder"].iterdir())
        assert names == ["config.json", "metrics.jsonl", "summary.json"]  # what is committed: text, and no weights
    assert studies.best(NORMS, tmp_path) == {"rms": min(rms, slow, key=studies.bits_per_byte), "layer": layer}

    kept = {path: path.stat().st_mtime_ns for folder in (rms["folder"], absurd) for path in folder.iterdir()}
    (layer["folder"] / "summary.json").unlink()
    assert len(studies.results(NORMS, tmp_path)) == 2
    studies.run(NORMS, tmp_path)  # what is missing, and nothing else
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert studies.results(NORMS, tmp_path)[2]["summary"]["steps"] == 4

    other = Study("Is it the same?", {"as before": TINY, "small": f"{TINY} model.d_ff=16"}, (1e-3,))
    (shared,) = studies.results(other, tmp_path)
    assert (shared["variant"], shared["folder"]) == ("as before", rms["folder"])
    found = read_json(rms["folder"] / "config.json")
    found["data"]["bytes"]["train"] += 1
    write_json(rms["folder"] / "config.json", found)
    with pytest.raises(train.RunError, match=r"another configuration \(data\.bytes"):
        studies.run(NORMS, tmp_path)


def test_every_study_of_the_notebook_asks_something_and_its_runs_differ_and_were_all_made():
    cells = json.loads((config.ROOT / "notebooks" / "04_train.ipynb").read_text())["cells"]
    defined = {"studies": studies}
    exec("\n".join("".join(cell["source"]) for cell in cells if cell["source"][0].startswith("STUDIES")), defined)
    assert len(defined["STUDIES"]) == 13
    for each in defined["STUDIES"].values():
        names = [studies.run_name(preset) for _, preset in each.runs]
        assert each.question.endswith("?")
        assert len(set(names)) == len(names) == len(studies.results(each)) > 1
        differences = studies.differences(each)
        assert list(differences) == list(each.variants)
        assert next(iter(differences.values())) == 0
