"""Presets: what may be changed, and what is refused by name."""

import json

import pytest

from blm_core import config
from blm_core.config import PRESETS, ROOT, ConfigError


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("BLM_PRESET", "BLM_OVERRIDES", "BLM_ARCHIVE", "BLM_VALIDATION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", PRESETS)
def test_every_key_of_a_preset_can_be_set_to_the_value_it_has(name):
    preset = PRESETS[name]
    for key in config.keys(preset):
        section, _, field = key.rpartition(".")
        value = getattr(getattr(preset, section) if section else preset, field)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert config.override(preset, [f"{key}={text}"]) == preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    values = config.to_dict(PRESETS[name])
    assert json.loads(json.dumps(values)) == json.loads(json.dumps(config.to_dict(config.load(name))))
    assert values["name"] == name


def test_values_are_read_as_the_type_that_they_replace():
    preset = config.override(
        PRESETS["smoke"],
        [
            "train.steps=30",
            "train.learning_rate=1e-2",
            "train.compile=true",
            "tokenizer.sweep=400,500",
            "data.validation_file=a=b.txt",
            " samples = 3 ",
        ],
    )
    assert (preset.train.steps, preset.train.learning_rate, preset.train.compile) == (30, 0.01, True)
    assert preset.tokenizer.sweep == (400, 500)
    assert preset.data.validation_file == "a=b.txt"
    assert preset.samples == 3


def test_values_that_only_fit_together_can_be_changed_together_in_any_order():
    sizes = config.override(PRESETS["smoke"], ["tokenizer.vocab_size=600"])
    assert sizes.tokenizer.vocab_size == sizes.model.vocab_size == 600
    one = config.override(PRESETS["smoke"], ["model.n_heads=3", "model.n_kv_heads=3", "model.d_model=96"])
    other = config.override(PRESETS["smoke"], ["model.d_model=96", "model.n_kv_heads=3", "model.n_heads=3"])
    assert one == other
    with pytest.raises(ConfigError, match=r"model\.n_heads"):
        config.override(PRESETS["smoke"], ["model.n_heads=3", "model.n_kv_heads=3"])


@pytest.mark.parametrize(
    "assignment",
    [
        *("train.stepz=3", "trian.steps=3", "steps=3", "model=3", "name=x", "train.steps", "", "=3", "train.=3", ".steps=3"),
        *("a.b.c=3", "model.d_head=3", "tokens_per_step=3", "folder=x", "data.__class__=3", "train.__post_init__=3"),
    ],
)
def test_an_unknown_key_is_refused_by_name_with_the_known_ones(assignment):
    with pytest.raises(ConfigError, match=r"train\.steps") as refused:
        config.override(PRESETS["smoke"], [assignment])
    assert repr(assignment) in str(refused.value)


@pytest.mark.parametrize(
    "assignment", ["train.steps=many", "train.steps=1.5", "train.compile=perhaps", "tokenizer.sweep=512,big"]
)
def test_a_value_of_another_type_is_refused_with_key_and_value(assignment):
    key, value = assignment.split("=")
    with pytest.raises(ConfigError) as refused:
        config.override(PRESETS["smoke"], [assignment])
    assert key in str(refused.value)
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("data.validation_share=0", "data.validation_share = 0"),
        ("data.validation_share=1", "data.validation_share = 1"),
        ("data.validation_share=nan", "data.validation_share = nan"),
        ("data.near_duplicate=0", "data.near_duplicate = 0"),
        ("data.near_duplicate=1.1", "data.near_duplicate = 1.1"),
        ("data.min_characters=0", "data.min_characters = 0"),
        ("tokenizer.model_type=words", "tokenizer.model_type = 'words'"),
        ("tokenizer.vocab_size=65537", "vocab_size = 65537"),
        ("tokenizer.vocab_size=10", "vocab_size = 10"),
        ("model.n_heads=5", "model.n_heads = 5"),
        ("model.n_heads=0", "model.n_heads = 0"),
        ("model.n_kv_heads=3", "model.n_kv_heads = 3"),
        ("model.d_model=12", "(3) is even"),
        ("model.dropout=1", "model.dropout = 1"),
        ("model.n_layers=0", "model.n_layers = 0"),
        ("train.micro_batch_size=5", "train.micro_batch_size = 5"),
        ("train.micro_batch_size=0", "train.micro_batch_size = 0"),
        ("train.warmup_steps=150", "train.warmup_steps = 150"),
        ("train.steps=15", "train.warmup_steps = 15"),
        ("train.learning_rate=0", "train.learning_rate = 0"),
        ("train.learning_rate=nan", "train.learning_rate = nan"),
        ("train.schedule=linear", "train.schedule = 'linear'"),
        ("train.dtype=float16", "train.dtype = 'float16'"),
    ],
)
def test_an_impossible_value_is_refused_by_name(assignment, named):
    with pytest.raises(ConfigError) as refused:
        config.override(PRESETS["smoke"], [assignment])
    assert named in str(refused.value)
    assert "must be" in str(refused.value)


def test_the_environment_chooses_and_changes_the_preset_and_arguments_have_the_last_word(monkeypatch):
    monkeypatch.setenv("BLM_PRESET", "a100")
    monkeypatch.setenv("BLM_OVERRIDES", "train.steps=900  samples=3")
    monkeypatch.setenv("BLM_ARCHIVE", "/some/where.tar.gz")
    monkeypatch.setenv("BLM_VALIDATION", "/some/file.txt")
    preset = config.load(overrides=["train.steps=800"])
    assert preset.name == "a100"
    assert (preset.train.steps, preset.samples) == (800, 3)
    assert (preset.data.archive, preset.data.validation_file) == ("/some/where.tar.gz", "/some/file.txt")
    assert config.load("cpu").name == "cpu"
    assert config.load("smoke") == config.override(PRESETS["smoke"], ["train.steps=900", "samples=3"])  # the embedded sample


def test_an_unknown_preset_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("BLM_PRESET", "huge")
    with pytest.raises(ConfigError, match=r"'huge'.*smoke.*cpu.*a100"):
        config.load()


@pytest.mark.parametrize(
    ("named", "gpu", "taken"),
    [
        ("cpu", ("A100", 80e9, True), "cpu"),
        (None, None, "smoke"),
        ("", None, "smoke"),
        (None, ("A100", 42e9, True), "a100"),
        (None, ("T4", 16e9, False), "smoke"),
        (None, ("V100", 80e9, False), "smoke"),
        (None, ("L4", 24e9, True), "smoke"),
    ],
)
def test_the_machine_chooses_the_preset_where_none_is_named_and_says_why(named, gpu, taken):
    name, why = config.choose(named, gpu)
    assert name == taken
    assert (named or (gpu and gpu[0]) or "no GPU") in why


def test_the_first_cell_says_which_preset_was_taken_why_and_how_to_take_another(monkeypatch):
    preset = config.load()
    assert preset.name == config.chosen()[0]
    said = config.introduce(preset)
    assert all(part in said for part in (f"Preset {preset.name}", config.chosen()[1], "BLM_PRESET=", "a100", "cpu"))
    monkeypatch.setenv("BLM_PRESET", "cpu")
    assert "Preset cpu: BLM_PRESET is cpu." in config.introduce(config.load())


def test_results_go_below_the_folder_that_the_environment_names_and_empty_means_unset(monkeypatch, tmp_path):
    monkeypatch.setenv("BLM_BUILD", str(tmp_path))
    assert PRESETS["cpu"].folder == tmp_path / "cpu"
    monkeypatch.setenv("BLM_BUILD", "")
    assert config.build() == ROOT / "build"
    monkeypatch.delenv("BLM_BUILD")
    assert config.build() == ROOT / "build"


def test_the_folder_of_results_is_read_in_one_place():
    readers = [path.name for path in (ROOT / "blm_core").rglob("*.py") if 'environ.get("BLM_BUILD' in path.read_text()]
    assert readers == ["config.py"]
