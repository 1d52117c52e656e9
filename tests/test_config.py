"""Presets: what may be changed, and what is refused by name."""

from types import SimpleNamespace

import pytest
import torch

from blm_core import config
from blm_core.config import PRESETS, ROOT, ConfigError

SMOKE = PRESETS["smoke"]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_every_key_can_be_set_to_the_value_it_has(preset):
    for key, value in config.settings(preset).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert config.override(preset, [f"{key}={text}"]) == preset


def test_values_are_read_as_the_type_that_they_replace():
    settings = ["train.steps=30", "train.learning_rate=1e-2", "train.compile=true", "tokenizer.sweep=400,500", " samples = 3 "]
    preset = config.override(
        SMOKE, [*settings, "data.validation_file=a=b.txt", "train.teacher_weight=0.5", "teachers=train.seed=2,"]
    )
    assert (preset.train.steps, preset.train.learning_rate, preset.train.compile) == (30, 0.01, True)
    assert (preset.tokenizer.sweep, preset.samples, preset.data.validation_file) == ((400, 500), 3, "a=b.txt")
    assert preset.teacher(0) == config.override(SMOKE, [*settings, "data.validation_file=a=b.txt", "train.seed=2"])


def test_values_that_only_fit_together_can_be_changed_together_in_any_order():
    sizes = config.override(SMOKE, ["tokenizer.vocab_size=600"])
    assert sizes.tokenizer.vocab_size == sizes.model.vocab_size == 600
    settings = ["model.n_heads=3", "model.n_kv_heads=3", "model.d_model=96"]
    assert config.override(SMOKE, settings) == config.override(SMOKE, settings[::-1])
    with pytest.raises(ConfigError, match=r"model\.n_heads"):
        config.override(SMOKE, settings[:2])


@pytest.mark.parametrize("assignment", ["train.stepz=3", "steps=3", "model=3", "name=x", "train.steps", "", "model.d_head=3"])
def test_an_unknown_key_is_refused_by_name_with_the_known_ones(assignment):
    with pytest.raises(ConfigError, match=r"train\.steps") as refused:
        config.override(SMOKE, [assignment])
    assert repr(assignment) in str(refused.value)


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("train.steps=1.5", "train.steps = '1.5'"),
        ("train.compile=perhaps", "train.compile = 'perhaps'"),
        ("tokenizer.sweep=512,big", "tokenizer.sweep = '512,big'"),
        ("data.validation_share=0", "data.validation_share = 0.0 cannot be used: it must be in (0, 1)"),
        ("tokenizer.vocab_size=65537", "vocab_size = 65537"),
        ("model.n_heads=5", "model.n_heads = 5"),
        ("model.n_heads=0", "model.n_heads = 0"),
        ("model.n_kv_heads=3", "model.n_kv_heads = 3"),
        ("model.d_model=12", "(3) is even"),
        ("train.micro_batch_size=5", "train.micro_batch_size = 5"),
        ("train.steps=15", "train.warmup_steps = 15"),
        ("train.learning_rate=nan", "train.learning_rate = nan"),
        ("train.schedule=linear", "train.schedule = 'linear' cannot be used: it must be cosine or wsd"),
        ("train.teacher_weight=0.5", "train.teacher_weight = 0.5"),
    ],
)
def test_an_impossible_value_is_refused_by_name(assignment, named):
    with pytest.raises(ConfigError) as refused:
        config.override(SMOKE, [assignment])
    assert named in str(refused.value)


def test_the_environment_chooses_and_changes_the_preset_and_arguments_have_the_last_word(monkeypatch, tmp_path):
    monkeypatch.setenv("BLM_PRESET", "a100")
    monkeypatch.setenv("BLM_OVERRIDES", "train.steps=900  samples=3")
    monkeypatch.setenv("BLM_ARCHIVE", "/some/where.tar.gz")
    monkeypatch.setenv("BLM_VALIDATION", "/some/file.txt")
    monkeypatch.setenv("BLM_BUILD", str(tmp_path))
    preset = config.load(overrides=["train.steps=800"])
    assert (preset.name, preset.folder) == ("a100", tmp_path / "a100")
    assert (preset.train.steps, preset.samples) == (800, 3)
    assert (preset.data.archive, preset.data.validation_file) == ("/some/where.tar.gz", "/some/file.txt")
    assert config.load("smoke") == config.override(SMOKE, ["train.steps=900", "samples=3"])  # always the embedded sample
    monkeypatch.setenv("BLM_BUILD", "")
    assert config.build() == ROOT / "build"


@pytest.mark.parametrize(
    ("named", "gpu", "taken"),
    [
        ("cpu", ("A100", 80e9, 8), "cpu"),
        ("", None, "smoke"),
        ("", ("A100", 42e9, 8), "a100"),
        ("", ("L4", 24e9, 8), "smoke"),
        ("", ("V100", 80e9, 7), "smoke"),  # without bfloat16
    ],
)
def test_the_machine_chooses_the_preset_where_none_is_named_and_the_first_cell_says_why(monkeypatch, named, gpu, taken):
    monkeypatch.setenv("BLM_PRESET", named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    found = gpu and SimpleNamespace(name=gpu[0], total_memory=gpu[1], major=gpu[2])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: found)
    preset = config.load()
    said = config.introduce(preset)
    assert preset.name == taken
    assert f"Preset {taken}: BLM_PRESET is" in said
    assert (named or (gpu and gpu[0]) or "no GPU") in said
    assert "BLM_PRESET=" in said
