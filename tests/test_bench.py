"""The benchmark: it times the real training step, sets sides against each other by turns, and invents no figure."""

import copy
import statistics

import numpy as np
import pytest
import torch

from blm_core import config, pipeline
from blm_core import train as training
from blm_core.config import ConfigError
from blm_core.evidence import bench
from blm_core.evidence.bench_ratios import PlainLoop, ratio
from blm_core.evidence.bench_training import PARTS, QUICK, Loop, fastest_micro_batch, training_stories
from blm_core.hardware import memory, reset_memory
from blm_core.model import flops_per_token

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(smoke) -> dict:
    """What `bench --quick --presets smoke --device cpu` finds."""
    return bench.bench(["smoke"], "cpu", QUICK)


def weights(loop: Loop) -> list[torch.Tensor]:
    return [weight.detach() for weight in loop.model.parameters()]


def test_timed_steps_are_the_steps_of_a_training_run(smoke, tmp_path):
    preset = config.override(smoke, ["train.steps=4", "train.warmup_steps=1", "train.log_every=1", "train.eval_every=4"])
    training.train(preset, preset.folder / "tokens", pipeline.tokenizer(preset), tmp_path / "run", keep_model=False)
    lines, _ = training.metrics(tmp_path / "run")
    with Loop(preset, CPU) as loop:
        losses = []
        for _ in range(4):
            loop.run(1)
            losses.append(loop.loss)
    assert losses == [line["loss"] for line in lines]


@pytest.mark.parametrize("micro_batch", [16, 4])
def test_taking_the_time_of_each_part_does_not_change_what_a_step_does(smoke, micro_batch):
    preset = config.override(smoke, [f"train.micro_batch_size={micro_batch}"])
    with Loop(preset, CPU) as plain, Loop(preset, CPU) as timed:
        plain.run(2)
        shares = timed.shares(2)
        assert all(a.equal(b) for a, b in zip(weights(plain), weights(timed), strict=True))
    assert set(shares) == set(PARTS)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert all(share > 0 for share in shares.values())
    assert shares["forward"] + shares["backward"] > shares["data"]


def test_without_encoded_stories_random_tokens_of_the_same_shape_are_used_and_named(smoke, tmp_path, monkeypatch):
    assert training_stories(smoke)[1] == "own"
    monkeypatch.setenv("BLM_BUILD", str(tmp_path))
    stories, name = training_stories(smoke)
    assert name == "random"
    assert [len(stories[i]) for i in range(len(stories))] == stories.lengths.tolist()
    assert max(int(stories[i].max()) for i in range(len(stories))) < smoke.model.vocab_size
    with Loop(smoke, CPU) as loop:
        loop.run(1)
        assert loop.loss == pytest.approx(np.log(smoke.model.vocab_size), rel=0.02)


def test_the_plain_loop_learns_and_reads_on_in_the_text(smoke):
    loop = PlainLoop(smoke)
    loop.run(1)
    first = loop.loss
    loop.run(25)
    assert loop.loss < 0.97 * first
    assert all(weight.dtype == torch.float32 for weight in loop.model.parameters())


def search(batch_size: int, rates: dict[int, float], most: int, **settings) -> tuple[int, list[dict], list[int]]:
    asked = []

    def measure(size: int) -> float:
        asked.append(size)
        if size > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return rates[size]

    return *fastest_micro_batch(batch_size, measure, **settings), asked


def test_the_fastest_micro_batch_is_taken_and_not_the_largest():
    size, tried, asked = search(64, {8: 100, 16: 180, 32: 230, 64: 210}, most=64)
    assert size == 32
    assert asked == [8, 16, 32, 64]
    assert [found["tokens_per_second"] for found in tried] == [100, 180, 230, 210]


def test_the_search_ends_where_memory_runs_out_and_goes_on_with_what_was_found():
    size, tried, asked = search(1024, {8: 100, 16: 180}, most=16)
    assert size == 16
    assert asked == [8, 16, 32]
    assert tried[-1] == {"micro_batch_size": 32, "tokens_per_second": None}


def test_a_model_that_does_not_fit_at_all_is_an_error():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        search(64, {}, most=0)


@pytest.mark.parametrize(("batch_size", "expected"), [(4, [4]), (8, [8]), (24, [8]), (48, [8, 16])])
def test_only_sizes_that_divide_the_batch_are_tried(batch_size, expected):
    assert search(batch_size, dict.fromkeys(expected, 1.0), most=64)[2] == expected


def test_two_sides_are_measured_by_turns_and_compared_turn_by_turn():
    order, rates = [], {"a": iter([10.0, 30.0, 8.0]), "b": iter([5.0, 10.0, 8.0])}

    def side(name):
        def measure() -> float:
            order.append(name)
            return next(rates[name])

        return name, measure

    found = ratio("?", "tokens/s", side("a"), side("b"), 3)
    assert order == ["a", "b"] * 3
    assert found["ratio"] == {"median": 2.0, "low": 1.0, "high": 3.0, "values": [2.0, 3.0, 1.0]}
    assert (found["a"]["median"], found["b"]["low"], found["b"]["high"]) == (10.0, 5.0, 10.0)


def test_figures_of_training_agree_with_each_other(result, smoke):
    row = result["training"][0]
    assert (row["preset"], row["mode"], row["tokens"], row["dtype"] in ("float32", "bfloat16")) == (
        "smoke",
        "eager",
        "own",
        True,
    )
    assert row["tflops"] == pytest.approx(row["tokens_per_second"] * flops_per_token(smoke.model) / 1e12, abs=1e-4)
    assert row["mfu"] is None  # the peak of a CPU is not known
    assert row["memory_gb"] > 0
    assert (row["watts"] is None) == (row["joules_per_token"] is None) == bool(row["energy_unread"])


def test_every_ratio_has_its_turns_and_a_target(result):
    measured = {row["question"]: row for row in result["ratios"] if "not_measured" not in row}
    assert {question.split(",")[0] for question in measured} == {"training", "training step", "encoding", "sampling"}
    assert {"sampling, batch 1, CPU", "sampling, batch 16, CPU"} <= set(measured)
    for row in measured.values():
        turns = [a / b for a, b in zip(row["a"]["values"], row["b"]["values"], strict=True)]
        assert len(turns) == QUICK.repeats
        assert row["ratio"]["median"] == pytest.approx(statistics.median(turns))
        assert row["target"]


def test_what_cannot_be_measured_here_is_named_with_the_command_that_fills_it(result):
    (row,) = [row for row in result["training"] if row["preset"] == "a100"]
    assert "tokens_per_second" not in row
    assert row["command"] == "python -m blm_core.evidence bench --presets a100"
    _, rows = bench.training_table(result)
    assert set(rows[-1][3:]) == {"not measured"}
    assert row["command"] in bench.tables(result)


def test_tables_printed_from_the_file_are_those_of_the_measurement(result, tmp_path):
    path = bench.save(result, tmp_path / "here.json")
    text = bench.tables(bench.read(path))
    assert text == bench.tables(result)
    for part in (result["device"], result["versions"]["torch"], result["date"], "`smoke`", "6 N + 12 L H D T"):
        assert part in text
    assert bench.default_path(result).parent == bench.BENCHMARKS


def test_tables_show_energy_utilisation_and_micro_batches_of_a_gpu(result):
    gpu = copy.deepcopy(result)
    gpu["training"][0] |= {
        "mfu": 0.4567,
        "watts": 321.4,
        "joules_per_token": 0.00123,
        "energy_unread": None,
        "micro_batches": [
            {"micro_batch_size": 8, "tokens_per_second": 123_456},
            {"micro_batch_size": 16, "tokens_per_second": None},
        ],
    }
    header, rows = bench.training_table(gpu)
    shown = dict(zip(header, rows[0], strict=True))
    assert (shown["MFU"], shown["W"], shown["mJ/token"]) == ("0.457", "321", "1.23")
    assert "8: 123,456, 16: out of memory" in bench.tables(gpu)


def test_a_file_that_is_no_benchmark_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no benchmark"):
        bench.read(tmp_path / "x.json")


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="unknown preset 'nano'"):
        bench.bench(["nano"])


def test_peak_memory_is_that_since_the_last_reset():
    if memory(CPU) is None:
        pytest.skip("this system does not tell a process's peak memory")
    reset_memory(CPU)
    before = memory(CPU)
    block = torch.ones(100_000_000)
    assert memory(CPU) >= before + 0.35
    del block
    reset_memory(CPU)
    assert memory(CPU) <= before + 0.1
