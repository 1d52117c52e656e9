"""Speed: the real training step is timed, sides take turns, compiling is done once, and a figure says what it rests on."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch
from tiny_models import save_blm
from torch._dynamo.testing import CompileCounter

from blm_core import config, pipeline
from blm_core import train as training
from blm_core.config import ConfigError
from blm_core.evidence import __main__ as commands
from blm_core.evidence import rehearsal, speed
from blm_core.evidence.models import random_gpt2
from blm_core.evidence.speed import Loop
from blm_core.files import read_json

CPU = torch.device("cpu")


def test_timed_steps_are_the_steps_of_a_training_run(smoke, tmp_path):
    preset = config.override(smoke, ["train.steps=4", "train.warmup_steps=1", "train.log_every=1", "train.eval_every=4"])
    training.train(preset, preset.folder / "tokens", pipeline.tokenizer(preset), tmp_path / "run", keep_model=False)
    lines, _ = training.metrics(tmp_path / "run")
    loop = Loop(preset, CPU)
    for _ in range(2):
        loop.run(2), loop.run(2)
        assert loop.losses == [line["loss"] for line in lines]
        loop.restart()


def test_the_plain_loop_learns_from_the_sample_where_no_stories_are_encoded(smoke):
    losses = list(itertools.islice(speed.plain_loop(dataclasses.replace(smoke, name="unprepared")), 26))
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize(
    ("batch_size", "rates", "fastest"),
    [(64, {8: 100, 16: 180, 32: 230, 64: 231}, 32), (1024, {8: 100, 16: 180}, 16), (16, {}, None)],
    ids=["nearly as fast in half the memory", "until memory ends", "none fits"],
)
def test_the_smallest_of_the_fastest_micro_batches_is_taken(smoke, monkeypatch, batch_size, rates, fastest):
    def rate(loop: Loop, steps: int, micro_batch_size: int) -> float:
        if micro_batch_size not in rates:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return rates[micro_batch_size]

    monkeypatch.setattr(Loop, "rate", rate)
    loop = Loop(config.override(smoke, [f"train.batch_size={batch_size}"]), CPU)
    if fastest is None:
        with pytest.raises(ConfigError, match="do not fit"):
            speed.choose_micro_batch(loop)
    else:
        tried = {found["micro_batch_size"]: found["tokens_per_second"] for found in speed.choose_micro_batch(loop)}
        assert (tried, loop.preset.train.micro_batch_size) == (rates, fastest)


def test_two_sides_are_measured_by_turns_and_compared_turn_by_turn():
    order, rates = [], {"a": iter([1.0, 10.0, 30.0, 8.0]), "b": iter([9.0, 5.0, 10.0, 8.0])}

    def side(name: str) -> tuple:
        def measure() -> float:
            order.append(name)
            return next(rates[name])

        return name, measure

    found = speed.by_turns("?", "tokens/s", side("a"), side("b"), 3)
    assert order == ["a", "b"] * 4
    assert found["ratio"] == {"median": 2.0, "low": 1.0, "high": 3.0, "values": [2.0, 3.0, 1.0]}


def test_a_quick_bench_writes_what_its_tables_show(smoke, tmp_path, capsys):
    path = tmp_path / "here.json"
    assert commands.main(["bench", "--quick", "--presets", "smoke", "--device", "cpu", "--out", str(path)]) == 0
    result, shown = read_json(path), capsys.readouterr().out
    (row,) = result["training"]
    assert (row["preset"], row["mode"], row["mfu"]) == ("smoke", "eager", None)
    kinds = {each["question"].split(",")[0] for each in result["ratios"]}
    assert kinds == {"training", "encoding", "stories of a window isolated", "sampling"}
    assert f"{row['tokens_per_second']:,}" in shown
    assert "not measured" in shown  # there is no MFU of a CPU
    assert all(each["a"]["name"] in shown and each["question"] in shown for each in result["ratios"])
    for committed in map(read_json, speed.BENCHMARKS.glob("*.json")):  # can be shown too
        assert len(speed.training_table(committed)[1]) + len(speed.ratio_table(committed)[1]) > 1


def test_what_both_models_cost_is_measured_by_turns_and_random_weights_are_named(tokenizer, tmp_path):
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 1}
    result = speed.measure_cost(save_blm(tmp_path, tokenizer, seq_len=256), shape)
    ours, theirs = result["models"]
    assert theirs["parameters"] == sum(weight.numel() for weight in random_gpt2(shape).parameters())
    assert all(model["bytes"] == 4 * model["parameters"] for model in result["models"])
    assert 1 < ours["bytes_per_token"] < theirs["bytes_per_token"]
    assert [each["question"].split()[2] for each in result["ratios"]] == ["read", "written"]
    assert "gpt2 with random weights" in speed.ratio_table(result)[1][0][3]


def test_the_rehearsal_prepares_what_is_missing_compiles_twice_and_prints_a_plan(smoke, monkeypatch):
    shutil.rmtree(smoke.folder / "tokens")
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=counter))
    preset = config.override(smoke, ["train.compile=true"])
    found = rehearsal.rehearse(preset, "cpu", steps=20, seconds=0.2, repeats=2)
    assert counter.frame_count == 2  # isolated and not
    assert found["training"][0]["mode"] == "compiled"
    assert [trial["learning_rate"] for trial in found["learning_rates"]] == [2e-3, 4e-3, 8e-3]
    assert all(trial["loss"] < np.log(smoke.model.vocab_size) for trial in found["learning_rates"])
    text = rehearsal.plan(found, price_per_hour=3.0)
    hours = smoke.train.steps * smoke.tokens_per_step / found["training"][0]["tokens_per_second"] / 3600
    assert f"{hours:.1f} hours" in text
    assert "MFU not known, power not measured" in text
    assert "train.micro_batch_size=" in text
