"""Publishing: what is committed of an executed preset, what never is, and the model card."""

import base64
import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blm_core.__main__ import main
from blm_core.checkpoint import load_model, save_model
from blm_core.config import ROOT, ModelConfig, Preset
from blm_core.evidence import publish
from blm_core.evidence.publish import NOTEBOOKS, PROMPT, SAMPLES, PublishError
from blm_core.files import read_json, write_json
from blm_core.generate import Sampling, complete
from blm_core.model import LanguageModel

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
SVG = "<svg xmlns='http://www.w3.org/2000/svg'/>"
FILES = ("config.json", "metrics.jsonl", "summary.json")
HEADS = [{"name": "a head", "layer": 1, "head": 2, "what": "It looks at something."}]
RECORDED = {
    "data": {"train_stories": "1,234", "train_megabytes": "5.6"},
    "tokenizer": {"pieces": "512"},
    "model": {"parameters": "7,890", "layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "context": 64},
    "train": {"tokens": "9 M", "steps": "10", "epochs": "1.1", "minutes": "12"}
    | {"device": "a machine", "torch": "2", "dtype": "float32"},
    "compare": {"bits_per_byte": "3.210", "stories": "456", "split": "official", "low": "3.100", "high": "3.300"},
}


def code(source: str, count: int | None, *outputs: dict, tags: tuple = ()) -> dict:
    metadata = {"tags": list(tags), "execution": {"iopub.execute_input": "a time"}}
    return {"cell_type": "code", "source": [source], "execution_count": count, "metadata": metadata, "outputs": list(outputs)}


def stream(name: str, text: str) -> dict:
    return {"output_type": "stream", "name": name, "text": [text]}


def picture(**data) -> dict:
    return {"output_type": "display_data", "data": data, "metadata": {}}


def notebook(name: str) -> dict:
    """An executed notebook with one cell of each kind."""
    cells = [
        {"cell_type": "markdown", "source": ["# Prose"], "metadata": {}},
        code("print(number)", 1, stream("stdout", f"a number in {ROOT}/a/b"), stream("stderr", "a bar")),
        code("show(story)", 2, stream("stdout", "someone's story"), tags=("source-text",)),
        code("show(own)", 3, stream("stdout", "what this run wrote"), tags=("source-text", "own-run")),
        code(f"#| label: fig-{name}-vector\nplot()", 4, picture(**{"image/svg+xml": [SVG], "image/png": "unused"})),
        code(f"#| label: fig-{name}-pixels\nplot()", 5, picture(**{"image/png": base64.b64encode(PNG).decode()})),
        code("plot()", 6, picture(**{"image/svg+xml": [SVG]})),
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def preset(tmp_path, smoke, tokenizer, monkeypatch) -> Preset:
    """A preset whose folder holds all that can be published, a real model among it."""
    monkeypatch.setenv("BLM_BUILD", str(tmp_path / "build"))
    made = replace(smoke, name="made")
    for name in NOTEBOOKS:
        write_json(made.folder / "notebooks" / f"{name}.ipynb", notebook(name))
    for name in FILES:
        write_json(made.folder / "run" / name, {"file": name})
    config = ModelConfig(vocab_size=len(tokenizer), n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, seq_len=64)
    save_model(made.folder / "run" / "model", LanguageModel(config, seed=1), tokenizer)
    write_json(made.folder / "heads.json", HEADS)
    for section, values in RECORDED.items():
        publish.record(made, section, **values)
    return made


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "project"


def test_source_text_progress_bars_and_this_machine_are_cleared_and_everything_else_stays(preset, root):
    before = {name: read_json(preset.folder / "notebooks" / f"{name}.ipynb") for name in NOTEBOOKS}
    publish.publish(preset, root)
    for name in NOTEBOOKS:
        text = (root / "notebooks" / f"{name}.ipynb").read_text()
        assert not [found for found in ("someone's story", "a bar", "a time", str(ROOT)) if found in text]
        assert "a number in a/b" in text
        assert "what this run wrote" in text
        assert text.count(SVG) == 2
        assert read_json(preset.folder / "notebooks" / f"{name}.ipynb") == before[name]  # the reader's own copy stays


def test_figures_run_model_and_heads_are_put_where_they_are_committed_and_old_figures_go(preset, root):
    (root / "figures").mkdir(parents=True)
    (root / "figures" / "fig-old.svg").write_text(SVG)
    publish.publish(preset, root)
    expected = {f"fig-{name}-{kind}" for name in NOTEBOOKS for kind in ("vector.svg", "pixels.png")}
    assert {path.name for path in (root / "figures").iterdir()} == expected | {"heads.json", "story.md"}
    assert (root / "figures" / "fig-01_data-vector.svg").read_text() == SVG
    assert (root / "figures" / "fig-01_data-pixels.png").read_bytes() == PNG
    assert read_json(root / "figures" / "heads.json") == HEADS
    assert sorted(path.name for path in (root / "runs" / "made").iterdir()) == sorted(FILES)
    model, _ = load_model(root / "release")
    assert model.config.d_model == 16


def test_the_card_states_what_was_recorded_and_the_model_wrote_its_samples(preset, root):
    publish.publish(preset, root)
    card = (root / "release" / "README.md").read_text()
    for value in ("7,890", "1,234 stories", "5.6 MB", "3.210 bits per byte", "456 stories (official)", "[3.100, 3.300]"):
        assert value in card
    written = complete(*load_model(root / "release"), [PROMPT] * SAMPLES, Sampling())
    for number, text in enumerate(written, 1):
        assert f"{number}. {' '.join((PROMPT + text).split())}" in card
    assert "{" not in card
    (story,) = re.findall('<div id="blm-still">(.*)</div>', (root / "figures" / "story.md").read_text(), re.DOTALL)
    assert "Once" in re.sub("<.*?>", "", story)


def test_the_example_of_the_released_card_runs_as_it_is_printed(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    (example,) = re.findall("```python\n(.*?)```", (ROOT / "release" / "README.md").read_text(), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "the card's example", "exec"), {})
    assert f"{PROMPT}" in printed.getvalue()
    assert len(printed.getvalue().split()) > 50


def test_scores_that_evaluate_printed_stand_in_the_card(preset, tmp_path, capsys):
    (tmp_path / "held.txt").write_text("A goat sat on a cart.\n<|endoftext|>\nIt rained.\n<|endoftext|>\n")
    model = str(preset.folder / "run" / "model")
    assert main(["evaluate", "--model", model, "--text", str(tmp_path / "held.txt"), "--json"]) == 0
    (tmp_path / "evaluate.jsonl").write_text(capsys.readouterr().out)
    (line,) = publish.evaluations(tmp_path / "evaluate.jsonl")
    assert line.startswith("held.txt ")
    assert line.endswith("], 2 stories")


def unexecuted(made: dict) -> None:
    made["cells"][-1]["execution_count"] = None


def out_of_order(made: dict) -> None:
    made["cells"][1]["execution_count"] = 7


def failed(made: dict) -> None:
    made["cells"][-1]["outputs"] = [{"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}]


@pytest.mark.parametrize("spoil", [unexecuted, out_of_order, failed])
def test_a_notebook_that_was_not_executed_from_top_to_bottom_is_refused(preset, root, spoil):
    path = preset.folder / "notebooks" / "06_inside.ipynb"
    made = read_json(path)
    spoil(made)
    write_json(path, made)
    with pytest.raises(PublishError, match=r"06_inside\.ipynb was not executed"):
        publish.publish(preset, root)
    assert not root.exists()


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("notebooks/03_model.ipynb", "03_model"),
        ("results.json", "no results"),
        ("heads.json", "run 06_inside"),
        ("run/summary.json", "summary.json"),
        ("run/model/config.json", "model/config.json"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_published(preset, root, missing, named):
    (preset.folder / missing).unlink()
    with pytest.raises(PublishError, match=named):
        publish.publish(preset, root)
    assert not root.exists()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text() | st.sampled_from(["yes", "1e3", "a: b # c", "\x7f\x85\u2028\ufeff", "\U0001f98a é", "line\nline"]))
def test_any_recorded_text_is_the_same_after_a_yaml_reader(smoke, tmp_path, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLM_BUILD", str(tmp_path))
        publish.record(smoke, "samples", story="an older one")
        publish.record(smoke, "samples", story=text, layers=3)
        publish.write_variables(smoke, tmp_path)
    found = yaml.safe_load((tmp_path / "_variables.yml").read_text(encoding="utf-8"))
    assert found == {"samples": {"story": text, "layers": "3"}}


def test_a_table_has_one_line_per_row_text_left_and_numbers_right():
    table = publish.markdown_table(("kind", "count", "story"), [("a|b", 3, "once"), ("c", "1.5 [1, 2]", "2 cats")])
    assert table.splitlines()[1] == "| :---- | ----------: | :------ |"
    assert table.splitlines()[2:] == ["| a\\|b | 3 | once |", "| c | 1.5 [1, 2] | 2 cats |"]
