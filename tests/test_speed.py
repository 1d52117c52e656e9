"""Speed: the real training step is timed, sides take turns, compiling is done once, and a figure says what it rests on."""

import dataclasses
import itertools
import json
import shutil
import statistics

import numpy as np
import pytest
import torch
from tiny_models import save_blm
from torch._dynamo.testing import CompileCounter

from blm_core import config, pipeline
from blm_core import train as training
from blm_core.config import ConfigError
from blm_core.evidence import rehearsal, speed
from blm_core.evidence.models import UnavailableError, random_gpt2
from blm_core.evidence.speed import QUICK, CostError, CostSettings, Effort, Loop, cost_line, cost_table, measure_cost

CPU = torch.device("cpu")
SMALL = {"n_embd": 8, "n_layer": 1, "n_head": 1}


def test_timed_steps_are_the_steps_of_a_training_run(smoke, tmp_path):
    preset = config.override(smoke, ["train.steps=4", "train.warmup_steps=1", "train.log_every=1", "train.eval_every=4"])
    training.train(preset, preset.folder / "tokens", pipeline.tokenizer(preset), tmp_path / "run", keep_model=False)
    lines, _ = training.metrics(tmp_path / "run")
    loop = Loop(preset, CPU)
    for _ in range(2):
        loop.run(2), loop.run(2)
        assert loop.losses == [line["loss"] for line in lines]
        loop.restart()


def test_where_no_stories_are_encoded_those_of_the_sample_are_used_and_named(smoke):
    assert Loop(smoke, CPU).tokens == "own"
    assert Loop(dataclasses.replace(smoke, name="unprepared"), CPU).tokens == "sample"


def test_the_plain_loop_learns(smoke):
    losses = list(itertools.islice(speed.plain_loop(smoke), 26))
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize(
    ("batch_size", "rates", "fastest"),
    [
        (64, {8: 100, 16: 180, 32: 230, 64: 231}, 32),  # nearly as fast, in half the memory
        (1024, {8: 100, 16: 180, 32: None}, 16),
        (48, {8: 100, 16: 200}, 16),
    ],
)
def test_the_smallest_of_the_fastest_micro_batches_is_taken_and_the_search_ends_where_memory_does(
    smoke, batch_size, rates, fastest
):
    class Timed(Loop):
        def run(self, steps: int, micro_batch_size: int) -> float:
            if not rates[micro_batch_size]:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return steps * self.preset.tokens_per_step / rates[micro_batch_size]

    loop = Timed(config.override(smoke, [f"train.batch_size={batch_size}"]), CPU)
    tried = speed.choose_micro_batch(loop)
    assert {found["micro_batch_size"]: found["tokens_per_second"] for found in tried} == rates
    assert loop.preset.train.micro_batch_size == fastest
    rates[8] = None
    with pytest.raises(torch.cuda.OutOfMemoryError):
        speed.choose_micro_batch(loop)


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


def test_figures_of_a_bench_agree_with_each_other_and_are_read_as_they_were_written(smoke, tmp_path):
    result = speed.bench(["smoke"], "cpu", QUICK)
    (row,) = result["training"]
    assert (row["preset"], row["mode"], row["tokens"], row["mfu"]) == ("smoke", "eager", "own", None)
    kinds = {each["question"].split(",")[0] for each in result["ratios"]}
    assert kinds >= {"training", "encoding", "stories of a window isolated"}
    for each in result["ratios"]:
        turns = [a / b for a, b in zip(each["a"]["values"], each["b"]["values"], strict=True)]
        assert each["ratio"]["median"] == pytest.approx(statistics.median(turns))
    assert speed.read(speed.save(result, tmp_path / "here.json")) == result
    assert f"{row['tokens_per_second']:,}" in speed.training_table(result)[1][0]
    assert "not measured" in speed.training_table(result)[1][0]  # there is no MFU of a CPU
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no benchmark"):
        speed.read(tmp_path / "x.json")


# ---- Cost


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_blm(tmp_path_factory.mktemp("models") / "blm", tokenizer)


@pytest.fixture(scope="module")
def measured(folder):
    return measure_cost(folder, SMALL, CostSettings(prefill=8, generated=4, repeats=2))


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
    with pytest.raises(CostError, match=r"measuring .*blm: .*context of 64"):
        measure_cost(folder, SMALL, CostSettings(prefill=80, generated=1, repeats=1))


# ---- The rehearsal


def test_the_rehearsal_prepares_what_is_missing_compiles_twice_and_prints_a_plan(smoke, monkeypatch):
    shutil.rmtree(smoke.folder / "tokens")
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=counter))
    preset = config.override(smoke, ["train.compile=true"])
    found = rehearsal.rehearse(preset, "cpu", steps=20, effort=Effort(seconds=0.2, repeats=2))
    assert counter.frame_count == 2  # isolated and not
    assert found["training"][0]["mode"] == "compiled"
    assert all(check["figure"] <= check["limit"] for check in found["checks"])
    assert [trial["learning_rate"] for trial in found["learning_rates"]] == [2e-3, 4e-3, 8e-3]
    assert all(trial["loss"] < np.log(smoke.model.vocab_size) for trial in found["learning_rates"])
    text = rehearsal.plan(found, price_per_hour=3.0)
    hours = smoke.train.steps * smoke.tokens_per_step / found["training"][0]["tokens_per_second"] / 3600
    assert f"{hours:.1f} hours" in text
    assert "train.micro_batch_size=" in text
