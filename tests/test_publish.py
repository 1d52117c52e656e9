"""Publishing: what is committed of an executed preset, what never is, and the model card."""

import re
from dataclasses import replace

import pytest
import yaml
from tiny_models import save_blm

from blm_core.checkpoint import load_model
from blm_core.config import ROOT, Preset
from blm_core.evidence import publish
from blm_core.evidence.page import BEGINNING
from blm_core.evidence.publish import NOTEBOOKS, RUN_FILES, SAMPLES, PublishError
from blm_core.files import read_json, write_json
from blm_core.generate import Sampling, complete

SVG = "<svg xmlns='http://www.w3.org/2000/svg'/>"
STATED = re.findall(r"{(\w+)\[(\w+)\]}", publish.CARD)  # section and name of what the card takes from the results
ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}


def code(source: str, count: int, output: dict, *tags: str) -> dict:
    metadata = {"tags": list(tags), "execution": {"iopub.execute_input": "a time"}}
    return {"cell_type": "code", "source": [source], "execution_count": count, "metadata": metadata, "outputs": [output]}


def printed(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": [text]}


def picture(**data) -> dict:
    return {"output_type": "display_data", "data": data, "metadata": {}}


def notebook(name: str) -> dict:
    """An executed notebook with one cell of each kind."""
    cells = [
        {"cell_type": "markdown", "source": ["# Prose"], "metadata": {}},
        code("print(number)", 1, printed(f"a number in {ROOT}/a/b")),
        code("wait()", 2, printed("a bar", "stderr")),
        code("show(story)", 3, printed("someone's story"), "source-text"),
        code(f"#| label: fig-{name}-vector\nplot()", 4, picture(**{"image/svg+xml": [SVG], "image/png": "unused"})),
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def preset(tmp_path, smoke, tokenizer, monkeypatch) -> Preset:
    """A preset whose folder holds all that can be published, a real model among it."""
    monkeypatch.setenv("BLM_BUILD", str(tmp_path / "build"))
    made = replace(smoke, name="made")
    for name in NOTEBOOKS:
        write_json(made.folder / "notebooks" / f"{name}.ipynb", notebook(name))
    for run in ("run", "teachers/1"):
        for name in RUN_FILES:
            write_json(made.folder / run / name, {"file": name})
    save_blm(made.folder / "run" / "model", tokenizer)
    write_json(made.folder / "heads.json", ["a head"])
    for section, name in STATED:
        publish.record(made, section, **{name: f"{section}'s {name}"})
    return made


def test_source_text_progress_bars_and_this_machine_are_cleared_and_all_else_is_put_where_it_is_committed(preset, tmp_path):
    root = tmp_path / "project"
    figures, release, run = (root / name for name in ("figures", "release", "runs/made"))
    write_json(figures / "fig-old.svg", "of an earlier run")
    publish.publish(preset, root)
    for name in NOTEBOOKS:
        text = (root / "notebooks" / f"{name}.ipynb").read_text()
        assert not [found for found in ("someone's story", "a bar", "a time", str(ROOT)) if found in text]
        assert not [kept for kept in ("a number in a/b", SVG) if kept not in text]
        assert read_json(preset.folder / "notebooks" / f"{name}.ipynb") == notebook(name)  # the reader's own copy stays
    expected = {f"fig-{name}-vector.svg" for name in NOTEBOOKS}
    assert {path.name for path in figures.iterdir()} == expected | {"heads.json", "story.md"}
    assert (figures / "fig-01_data-vector.svg").read_text() == SVG
    kept = {f"{folder}{name}" for folder in ("", "teachers/1/") for name in RUN_FILES}
    assert {str(path.relative_to(run)) for path in run.rglob("*.json*")} == kept
    # The card states what was recorded, and the published model wrote its samples.
    card = (release / "README.md").read_text()
    assert not [f"{section}'s {name}" for section, name in STATED if f"{section}'s {name}" not in card]
    for number, text in enumerate(complete(*load_model(release), [BEGINNING] * SAMPLES, Sampling()), 1):
        assert f"{number}. {' '.join((BEGINNING + text).split())}" in card


def test_the_example_of_the_released_card_runs_as_it_is_printed(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    (example,) = re.findall("```python\n(.*?)```", (ROOT / "release" / "README.md").read_text(), re.DOTALL)
    exec(compile(example, "the card's example", "exec"), {})
    written = capsys.readouterr().out
    assert BEGINNING in written
    assert len(written.split()) > 50


def test_what_is_missing_or_was_not_executed_to_its_end_is_named_and_nothing_is_published(preset, tmp_path):
    def refused(file: str) -> None:
        with pytest.raises(PublishError, match=file):
            publish.publish(preset, tmp_path / "project")
        assert not (tmp_path / "project").exists()

    for spoilt in ({"execution_count": 9}, {"outputs": [ERROR]}):
        made = notebook("06_inside")
        made["cells"][-1] |= spoilt
        write_json(preset.folder / "notebooks" / "06_inside.ipynb", made)
        refused("06_inside.ipynb was not executed")
    for file in ("heads.json", "run/model/config.json", "notebooks/03_model.ipynb"):
        (preset.folder / file).unlink()
        refused(file)


def test_any_recorded_text_is_the_same_after_a_yaml_reader(preset, tmp_path):
    texts = ["yes", "1e3", "a: b # c", "\x7f\x85\u2028\ufeff", "\U0001f98a é", "line\nline", "long " * 100]
    publish.record(preset, "samples", text4="an older one")
    publish.record(preset, "samples", layers=3, **{f"text{number}": text for number, text in enumerate(texts)})
    publish.write_variables(preset, tmp_path)
    found = yaml.safe_load((tmp_path / "_variables.yml").read_text(encoding="utf-8"))
    assert found["samples"] == {"layers": "3", **{f"text{number}": text for number, text in enumerate(texts)}}


def test_a_table_has_one_line_per_row_text_left_and_numbers_right():
    table = publish.markdown_table(("kind", "count", "story"), [("a|b", 3, "once"), ("c", "1.5 [1, 2]", "2 cats")])
    assert table.splitlines()[1:] == [
        "| :---- | ----------: | :------ |",
        "| a\\|b | 3 | once |",
        "| c | 1.5 [1, 2] | 2 cats |",
    ]
