"""The plan: costs follow from the speed, the preset is in it, and no row claims a measurement that was not made."""

import json

import pytest

from blm_core.config import PRESETS, ConfigError
from blm_core.evidence.plan import Budget, assumed, find_speed, plan, plan_note, plan_table, read_speed
from blm_core.model import flops_per_token

A100 = PRESETS["a100"]


def save_benchmark(folder, device: str, tokens_per_second: int | None, date: str = "2024-01-01", device_type: str = "cuda"):
    row = {"preset": "a100", "tokens_per_second": tokens_per_second} if tokens_per_second else None
    row = row or {"preset": "a100", "not_measured": "too large"}
    result = {"device": device, "device_type": device_type, "date": date, "training": [row], "ratios": []}
    path = folder / f"{device}.json"
    path.write_text(json.dumps(result))
    return path


def test_sizes_go_from_5_to_350_million_parameters_and_the_preset_is_one_of_them():
    rows = plan(assumed())
    chinchilla = [row for row in rows if row.tokens == 20 * row.parameters]
    sizes = [row.parameters for row in chinchilla]
    assert len(sizes) >= 8
    assert sizes == sorted(sizes)
    assert 4.5e6 < sizes[0] < 6e6
    assert 3e8 < sizes[-1] < 3.6e8
    assert [row.model for row in rows if row.preset] == [A100.model] * 2
    assert max(row.tokens for row in rows if row.preset) == A100.train.steps * A100.tokens_per_step


def test_hours_energy_and_price_follow_from_flops():
    speed, budget = assumed(), Budget(hours=15, price_per_hour=2.5, watts=300)
    assert speed.flops_per_second == pytest.approx(0.45 * 312e12)
    for row in plan(speed, budget):
        assert row.hours == pytest.approx(row.tokens * flops_per_token(row.model) / 0.45 / 312e12 / 3600)
        assert row.kwh == pytest.approx(0.3 * row.hours)
        assert row.price == pytest.approx(2.5 * row.hours)
        assert row.tokens_in_budget == pytest.approx(row.tokens * 15 / row.hours)
        assert row.fits == (row.tokens <= row.tokens_in_budget)


def test_the_budget_decides_what_fits():
    fitting = [sum(row.fits for row in plan(assumed(), Budget(hours=hours))) for hours in (0.001, 1, 15, 1000)]
    assert fitting == sorted(fitting)
    assert (fitting[0], fitting[-1]) == (0, len(plan(assumed())))
    assert fitting[1] < fitting[2]


def test_an_assumed_speed_is_called_assumed_in_every_row(tmp_path):
    speed = find_speed(tmp_path)
    assert speed == assumed()
    header, rows = plan_table(plan(speed))
    assert all(row[header.index("tokens/s")].endswith("(assumed)") for row in rows)
    assert "assumed, not measured" in plan_note(speed)


def test_only_the_preset_counts_as_measured_and_other_sizes_as_scaled(tmp_path):
    save_benchmark(tmp_path, "NVIDIA A100-SXM4-80GB", 400_000)
    speed = find_speed(tmp_path)
    for row in plan(speed):
        assert row.speed == ("measured" if row.preset else "scaled")
        if row.preset:
            assert row.tokens_per_second == 400_000
    assert "measured on NVIDIA A100-SXM4-80GB" in plan_note(speed)


def test_an_a100_goes_before_other_cards_and_among_those_the_latest_counts(tmp_path):
    save_benchmark(tmp_path, "NVIDIA H100", 900_000, "2024-02-01")
    save_benchmark(tmp_path, "NVIDIA H200", 950_000, "2024-03-01")
    save_benchmark(tmp_path, "AMD EPYC", 300, "2024-05-01", device_type="cpu")
    assert find_speed(tmp_path).device == "NVIDIA H200"
    save_benchmark(tmp_path, "NVIDIA A100", 400_000, "2024-01-01")
    assert find_speed(tmp_path).device == "NVIDIA A100"


@pytest.mark.parametrize(("device_type", "rate"), [("cpu", 300), ("cpu", None), ("cuda", None)])
def test_a_benchmark_without_an_accelerators_speed_is_refused(tmp_path, device_type, rate):
    path = save_benchmark(tmp_path, "some device", rate, device_type=device_type)
    assert not find_speed(tmp_path).measured
    with pytest.raises(ConfigError, match="bench --presets a100"):
        read_speed(path)


def test_the_rows_of_the_preset_are_marked():
    rows = plan(assumed())
    _, printed = plan_table(rows)
    assert ["`a100`" in row[0] for row in printed] == [row.preset for row in rows]


@pytest.mark.parametrize("settings", [{"hours": 0}, {"price_per_hour": -1}, {"watts": float("nan")}], ids=str)
def test_a_budget_of_nothing_is_refused_by_name(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Budget(**settings)
