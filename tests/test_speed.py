"""Speed: the real training step is timed, sides take turns, and a figure that was not measured is named."""

import json
import statistics

import numpy as np
import pytest
import torch
from tiny_models import save_blm

from blm_core import config, pipeline
from blm_core import train as training
from blm_core.config import ConfigError
from blm_core.evidence import rehearsal, speed
from blm_core.evidence.models import UnavailableError, random_gpt2
from blm_core.evidence.speed import QUICK, CostError, CostSettings, Loop, PlainLoop, cost_line, cost_table, measure_cost
from blm_core.model import flops_per_token

CPU = torch.device("cpu")
SMALL = {"n_embd": 8, "n_layer": 1, "n_head": 1}


@pytest.fixture(scope="module")
def result(smoke) -> dict:
    return speed.bench(["smoke", "a100"], "cpu", QUICK)


def test_timed_steps_are_the_steps_of_a_training_run(smoke, tmp_path):
    preset = config.override(smoke, ["train.steps=4", "train.warmup_steps=1", "train.log_every=1", "train.eval_every=4"])
    training.train(preset, preset.folder / "tokens", pipeline.tokenizer(preset), tmp_path / "run", keep_model=False)
    lines, _ = training.metrics(tmp_path / "run")
    with Loop(preset, CPU) as loop:
        loop.run(2), loop.run(2)
        assert loop.losses == [line["loss"] for line in lines]


def test_torch_dropout_drops_and_leaves_the_same_loss_on_average(smoke):
    with Loop(smoke, CPU) as without, Loop(smoke, CPU, torch_dropout=0.1) as dropped:
        without.run(1), dropped.run(1)
    assert without.losses[0] != dropped.losses[0]
    assert dropped.losses[0] == pytest.approx(without.losses[0], rel=0.02)


def test_without_encoded_stories_random_tokens_are_used_and_named(smoke, tmp_path, monkeypatch):
    assert speed.training_stories(smoke)[1] == "own"
    monkeypatch.setenv("BLM_BUILD", str(tmp_path))
    stories, name = speed.training_stories(smoke)
    assert name == "random"
    assert [len(stories[i]) for i in range(len(stories))] == stories.lengths.tolist()
    with Loop(smoke, CPU) as loop:
        loop.run(1)
        assert loop.losses[0] == pytest.approx(np.log(smoke.model.vocab_size), rel=0.02)


def test_the_plain_loop_learns(smoke):
    loop = PlainLoop(smoke)
    loop.rate(26)
    assert loop.losses[-1] < 0.97 * loop.losses[0]


def search(batch_size: int, rates: dict[int, float], most: int) -> tuple[int, list[dict]]:
    def measure(size: int) -> tuple[float, float]:
        if size > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return rates[size], 1.0

    return speed.fastest_micro_batch(batch_size, measure)


def test_the_fastest_micro_batch_is_taken_and_the_search_ends_where_memory_does():
    size, tried = search(64, {8: 100, 16: 180, 32: 230, 64: 210}, most=64)
    assert (size, [found["tokens_per_second"] for found in tried]) == (32, [100, 180, 230, 210])
    size, tried = search(1024, {8: 100, 16: 180}, most=16)
    assert size == 16
    assert tried[-1] == {"micro_batch_size": 32, "tokens_per_second": None, "memory_gb": None}
    assert [found["micro_batch_size"] for found in search(48, dict.fromkeys((8, 16), 1.0), most=64)[1]] == [8, 16]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        search(64, {}, most=0)


def test_two_sides_are_measured_by_turns_and_compared_turn_by_turn():
    order, rates = [], {"a": iter([10.0, 30.0, 8.0]), "b": iter([5.0, 10.0, 8.0])}

    def side(name):
        def measure() -> float:
            order.append(name)
            return next(rates[name])

        return name, measure

    found = speed.by_turns("?", "tokens/s", side("a"), side("b"), 3)
    assert order == ["a", "b"] * 3
    assert found["ratio"] == {"median": 2.0, "low": 1.0, "high": 3.0, "values": [2.0, 3.0, 1.0]}


def test_figures_agree_with_each_other_and_what_was_not_measured_is_named(result, smoke, tmp_path):
    row, large = result["training"]
    assert (row["preset"], row["mode"], row["tokens"], row["mfu"]) == ("smoke", "eager", "own", None)
    assert row["tflops"] == pytest.approx(row["tokens_per_second"] * flops_per_token(smoke.model) / 1e12, abs=1e-4)
    assert "tokens_per_second" not in large
    assert {row["question"].split(",")[0] for row in result["ratios"]} >= {
        "training",
        "encoding",
        "stories of a window isolated",
    }
    for each in result["ratios"]:
        turns = [a / b for a, b in zip(each["a"]["values"], each["b"]["values"], strict=True)]
        assert each["ratio"]["median"] == pytest.approx(statistics.median(turns))
    text = speed.tables(speed.read(speed.save(result, tmp_path / "here.json")))
    assert text == speed.tables(result)
    assert "python -m blm_core.evidence bench --presets a100" in text
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no benchmark"):
        speed.read(tmp_path / "x.json")


# ---- Cost


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_blm(tmp_path_factory.mktemp("models") / "blm", tokenizer)


@pytest.fixture(scope="module")
def measured(folder):
    return measure_cost(folder, SMALL, CostSettings(prefill=8, generated=4, repeats=2, threads=1))


def test_both_models_take_turns_and_random_weights_are_named(measured, tmp_path, folder):
    ours, theirs = measured["models"]
    assert (ours["weights"], theirs["weights"]) == ("trained", "random")
    assert theirs["parameters"] == sum(weight.numel() for weight in random_gpt2(SMALL).parameters())
    assert theirs["disk_bytes"] == 4 * theirs["parameters"]
    assert ours["disk_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    for model in measured["models"]:
        tokens, text = model["generation_tokens_per_second"], model["generation_bytes_per_second"]
        assert len(tokens["values"]) == 2
        assert text["median"] == pytest.approx(tokens["median"] * model["bytes_per_token"])
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(measured))
    assert speed.read_cost(path) == measured
    assert "random weights" in cost_table(measured)[0][2]
    with pytest.raises(UnavailableError, match="evidence cost"):
        speed.read_cost(tmp_path / "missing.json")


def test_a_speed_wins_only_where_it_is_higher_in_every_turn(measured):
    ours, theirs = (dict(model) for model in measured["models"])
    ours["generation_bytes_per_second"] = speed.spread([100.0, 30.0])
    theirs["generation_bytes_per_second"] = speed.spread([10.0, 5.0])
    ours["prefill_bytes_per_second"], theirs["prefill_bytes_per_second"] = speed.spread([1.0, 3.0]), speed.spread([2.0, 2.0])
    line = cost_line({"models": [ours, theirs]})
    assert (line["generation_bytes_per_second"]["ratio"], line["generation_bytes_per_second"]["verdict"]) == (8.0, "wins")
    assert line["prefill_bytes_per_second"]["verdict"] == "undecided"


def test_a_measurement_that_fails_is_named(folder):
    with pytest.raises(CostError, match=r"measuring BLM ended with status 1.*context of 64"):
        measure_cost(folder, SMALL, CostSettings(prefill=80, generated=1, repeats=1))
    with pytest.raises(CostError, match="gpt2-xl"):
        measure_cost(folder, "unheard-of", random=True)


# ---- The rehearsal


def test_the_rehearsal_runs_in_miniature_and_prints_a_plan(smoke):
    found = rehearsal.rehearse(smoke, "cpu", steps=20, effort=QUICK)
    assert all(check["figure"] <= check["limit"] for check in found["checks"])
    assert [trial["learning_rate"] for trial in found["learning_rates"]] == [2e-3, 4e-3, 8e-3]
    assert all(trial["loss"] < np.log(smoke.model.vocab_size) for trial in found["learning_rates"])
    text = rehearsal.plan(found, price_per_hour=3.0)
    hours = smoke.train.steps * smoke.tokens_per_step / found["training"][0]["tokens_per_second"] / 3600
    assert f"{hours:.1f} hours" in text
    assert "train.micro_batch_size=" in text


def test_a_rehearsal_without_encoded_stories_is_refused(smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("BLM_BUILD", str(tmp_path))
    with pytest.raises(ConfigError, match="no encoded stories"):
        rehearsal.rehearse(smoke, "cpu", steps=20, effort=QUICK)
