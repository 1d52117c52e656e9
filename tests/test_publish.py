"""Publishing: what is committed of an executed preset, and what never is."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blm_core.config import ROOT, Preset
from blm_core.evidence import publish
from blm_core.evidence.publish import NOTEBOOKS, PublishError
from blm_core.files import read_json, write_json

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
SVG = "<svg xmlns='http://www.w3.org/2000/svg'/>"
FILES = ("config.json", "metrics.jsonl", "summary.json")


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
        code(f"#| label: fig-{name}-vector\nplot()", 3, picture(**{"image/svg+xml": [SVG], "image/png": "unused"})),
        code(f"#| label: fig-{name}-pixels\nplot()", 4, picture(**{"image/png": base64.b64encode(PNG).decode()})),
        code("plot()", 5, picture(**{"image/svg+xml": [SVG]})),
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def preset(tmp_path, smoke, monkeypatch) -> Preset:
    """A preset whose folder holds all that can be published."""
    monkeypatch.setenv("BLM_BUILD", str(tmp_path / "build"))
    made = replace(smoke, name="made")
    for name in NOTEBOOKS:
        write_json(made.folder / "notebooks" / f"{name}.ipynb", notebook(name))
    for name in FILES:
        write_json(made.folder / "run" / name, {"file": name})
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        write_json(made.folder / "run" / "model" / name, {"file": name})
    publish.record(made, "model", parameters="1,000")
    return made


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "project"


def outputs(root: Path, name: str) -> list[list[dict]]:
    cells = read_json(root / "notebooks" / f"{name}.ipynb")["cells"]
    return [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_source_text_progress_bars_and_this_machine_are_cleared_and_everything_else_stays(preset, root, name):
    publish.publish(preset, root)
    number, story, *pictures = outputs(root, name)
    assert ["".join(output["text"]) for output in number] == ["a number in a/b"]
    assert story == []
    assert all(len(each) == 1 for each in pictures)
    text = (root / "notebooks" / f"{name}.ipynb").read_text()
    assert "someone's story" not in text
    assert "a bar" not in text
    assert "a time" not in text


def test_what_the_reader_has_executed_is_left_as_it_was(preset, root):
    before = {name: read_json(preset.folder / "notebooks" / f"{name}.ipynb") for name in NOTEBOOKS}
    publish.publish(preset, root)
    assert {name: read_json(preset.folder / "notebooks" / f"{name}.ipynb") for name in NOTEBOOKS} == before


def test_labelled_figures_are_saved_as_drawings_where_there_is_one_and_old_ones_go(preset, root):
    (root / "figures").mkdir(parents=True)
    (root / "figures" / "fig-old.svg").write_text(SVG)
    publish.publish(preset, root)
    expected = {f"fig-{name}-{kind}" for name in NOTEBOOKS for kind in ("vector.svg", "pixels.png")}
    assert {path.name for path in (root / "figures").iterdir()} == expected
    assert (root / "figures" / "fig-01_data-vector.svg").read_text() == SVG
    assert (root / "figures" / "fig-01_data-pixels.png").read_bytes() == PNG


def test_run_and_model_are_put_where_they_are_committed(preset, root):
    publish.publish(preset, root)
    assert sorted(path.name for path in (root / "runs" / "made").iterdir()) == sorted(FILES)
    assert sorted(path.name for path in (root / "release").iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert read_json(root / "runs" / "made" / "config.json") == {"file": "config.json"}


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def unexecuted(made: dict) -> None:
    made["cells"][-1]["execution_count"] = None


def out_of_order(made: dict) -> None:
    made["cells"][1]["execution_count"] = 7


def failed(made: dict) -> None:
    made["cells"][-1]["outputs"] = [{"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}]


@pytest.mark.parametrize("name", ["01_data", "05_compare_gpt2xl"])
@pytest.mark.parametrize("spoil", [unexecuted, out_of_order, failed])
def test_a_notebook_that_was_not_executed_from_top_to_bottom_is_refused(preset, root, name, spoil):
    path = preset.folder / "notebooks" / f"{name}.ipynb"
    made = read_json(path)
    spoil(made)
    write_json(path, made)
    with pytest.raises(PublishError, match=rf"{name}\.ipynb was not executed"):
        publish.publish(preset, root)
    assert not files(root)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("notebooks/03_model.ipynb", "03_model"),
        ("results.json", "no results"),
        ("run/summary.json", "summary.json"),
        ("run/model/config.json", "model/config.json"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_published(preset, root, missing, named):
    (preset.folder / missing).unlink()
    with pytest.raises(PublishError, match=named):
        publish.publish(preset, root)
    assert not files(root)


def test_recorded_values_are_those_of_the_variables(preset, tmp_path):
    publish.record(preset, "model", parameters="2,000", layers=3)
    publish.record(preset, "data", kept="99.5 %")
    publish.write_variables(preset, tmp_path)
    found = yaml.safe_load((tmp_path / "_variables.yml").read_text(encoding="utf-8"))
    assert found == {"model": {"parameters": "2,000", "layers": "3"}, "data": {"kept": "99.5 %"}}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_is_the_same_after_a_yaml_reader(preset, tmp_path, text):
    publish.record(preset, "samples", story=text)
    publish.write_variables(preset, tmp_path)
    found = yaml.safe_load((tmp_path / "_variables.yml").read_text(encoding="utf-8"))
    assert found["samples"]["story"] == text


@pytest.mark.parametrize("text", ["yes", "1e3", "a: b # c", '"', "\\", "line\nline", "\x7f\x85\u2028\ufeff", "\U0001f98a é"])
def test_text_that_yaml_could_take_for_something_else_stays_text(preset, tmp_path, text):
    publish.record(preset, "samples", story=text)
    publish.write_variables(preset, tmp_path)
    assert yaml.safe_load((tmp_path / "_variables.yml").read_text(encoding="utf-8"))["samples"]["story"] == text


def test_a_table_has_one_line_per_row_and_numbers_to_the_right():
    assert publish.markdown_table(("kind", "count"), [("a|b", 3)]) == "| kind | count |\n| ---- | -----: |\n| a\\|b | 3 |"


def test_a_figure_in_an_output_is_a_file_that_json_can_hold(preset, root):
    publish.publish(preset, root)
    for name in NOTEBOOKS:
        json.loads((root / "notebooks" / f"{name}.ipynb").read_text())
