import copy
import json

import pytest
from tiny_models import save_blm, save_gpt2

from blm_core.evidence import cost
from blm_core.evidence.cost import CostError, CostSettings, cost_line, cost_table, measure_cost, memory, read_cost
from blm_core.evidence.models import UnavailableError, random_gpt2

QUICK = CostSettings(prefill=8, generated=4, repeats=2, seconds=0, threads=1)
SMALL = {"n_embd": 8, "n_layer": 1, "n_head": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_blm(tmp_path_factory.mktemp("models") / "blm", tokenizer)


@pytest.fixture(scope="module")
def measured(folder):
    ballast = bytearray(b"x") * 900_000_000  # of this process alone
    result = measure_cost(folder, SMALL, QUICK)
    assert memory()["peak"] > len(ballast)
    return result


def test_both_models_are_measured_and_random_weights_are_named_as_such(measured):
    ours, theirs = measured["models"]
    assert (ours["weights"], theirs["weights"]) == ("trained", "random")
    assert theirs["parameters"] == sum(weight.numel() for weight in random_gpt2(SMALL).parameters())
    assert theirs["disk_bytes"] == 4 * theirs["parameters"]
    assert "random weights" in cost_table(measured)[0][2]
    assert measured["machine"]["cores"] >= 1


def test_bytes_on_disk_are_those_of_the_folder(measured, folder):
    assert measured["models"][0]["disk_bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_speeds_have_a_spread_and_are_given_in_bytes_of_text_too(measured):
    for model in measured["models"]:
        assert model["repeats"] == 2
        for kind in ("prefill", "generation"):
            tokens, text = model[f"{kind}_tokens_per_second"], model[f"{kind}_bytes_per_second"]
            assert 0 < tokens["low"] <= tokens["value"] <= tokens["high"]
            assert text["value"] == pytest.approx(tokens["value"] * model["bytes_per_token"])


def test_memory_is_that_of_the_model_alone_and_not_of_who_measures(measured):
    for model in measured["models"]:
        assert model["memory_before_bytes"] < model["peak_memory_bytes"] < 900_000_000


def test_the_result_can_be_kept_and_read(measured, tmp_path):
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(measured))
    assert read_cost(path) == measured
    assert len(cost_table(measured)[1]) == 9
    with pytest.raises(UnavailableError, match="blm_core cost"):
        read_cost(tmp_path / "missing.json")


def test_a_measurement_beyond_the_context_fails_by_name(folder):
    with pytest.raises(CostError, match=r"measuring BLM ended with status 1.*context of 64"):
        measure_cost(folder, SMALL, CostSettings(prefill=80, generated=1, repeats=1, seconds=0))


def test_random_weights_need_a_known_architecture(folder):
    with pytest.raises(CostError, match="gpt2-xl"):
        measure_cost(folder, "unheard-of", QUICK, random=True)


def test_weights_that_cannot_be_loaded_are_replaced_only_where_the_architecture_is_known_and_the_reason_kept(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    spec = {"name": "theirs", "source": "no/such-model", "architecture": SMALL}
    found = cost.measure(spec, QUICK)
    assert found["weights"] == "random"
    assert "no/such-model cannot be loaded" in found["weights_why"]
    with pytest.raises(UnavailableError, match="BLM_GPT2XL"):
        cost.measure(spec | {"architecture": None}, QUICK)


def test_weights_that_can_be_loaded_are_measured_with_their_own_vocabulary(tmp_path):
    folder = save_gpt2(tmp_path / "gpt2-tiny")
    found = cost.measure({"name": "gpt2-tiny", "source": str(folder), "architecture": None}, QUICK)
    assert found["weights"] == "trained"
    assert found["disk_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["bytes_per_token_from"] == "measured on the own prompts"
    assert 1 <= found["bytes_per_token"] < 4


def model_costs(**changes) -> dict:
    speed = {"value": 10.0, "low": 9.0, "high": 11.0}
    base = {"parameters": 5, "disk_bytes": 5, "peak_memory_bytes": 5, "gpu_peak_memory_bytes": None}
    base |= {"prefill_bytes_per_second": speed, "generation_bytes_per_second": speed}
    return copy.deepcopy(base | {"joules_per_text": {"gpu": 1.0}} | changes)


def test_less_wins_where_it_is_counted_and_disjoint_ranges_win_where_it_is_timed():
    fast = {"value": 100.0, "low": 90.0, "high": 110.0}
    ours = model_costs(parameters=1, generation_bytes_per_second=fast, joules_per_text={"gpu": 4.0})
    line = cost_line({"models": [ours, model_costs(disk_bytes=4)]})
    assert line["parameters"] == {"ratio": 0.2, "verdict": "wins"}
    assert line["disk_bytes"]["verdict"] == "loses"
    assert line["peak_memory_bytes"]["verdict"] == "undecided"
    assert line["generation_bytes_per_second"] == {"ratio": 10.0, "verdict": "wins"}
    assert line["prefill_bytes_per_second"]["verdict"] == "undecided"
    assert line["gpu_joules_per_text"] == {"ratio": 4.0, "verdict": "loses"}
