"""What is committed: notebooks, report, environments and README agree with each other and with the code."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from blm_core import config
from blm_core.config import ROOT
from blm_core.evidence.publish import NOTEBOOKS, SOURCE_TEXT
from blm_core.model import parameter_counts

LABEL = re.compile(r"^#\|\s*label:\s*(\S+)", re.MULTILINE)
EMBED = re.compile(r"{{<\s*embed\s+(\S+?)#(\S+?)\s*(?:echo=\w+\s*)?>}}")
VARIABLE = re.compile(r"{{<\s*var\s+([\w.-]+)\s*>}}")
CHECKED = "NBVAL_CHECK_OUTPUT"

NOTEBOOK_CELLS = {name: json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"] for name in NOTEBOOKS}
CODE_CELLS = {name: [cell for cell in cells if cell["cell_type"] == "code"] for name, cells in NOTEBOOK_CELLS.items()}
README = (ROOT / "README.md").read_text()
REPORT = ROOT / "report.qmd"
with_report = pytest.mark.skipif(not REPORT.exists(), reason="report.qmd is not written yet")
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def source(cell: dict) -> str:
    return "".join(cell["source"])


def labels(name: str) -> list[str]:
    return [label for cell in CODE_CELLS[name] for label in LABEL.findall(source(cell))]


@every_notebook
def test_source_text_is_not_in_committed_outputs(name):
    tagged = [cell for cell in CODE_CELLS[name] if SOURCE_TEXT in cell["metadata"].get("tags", [])]
    assert all(cell["outputs"] == [] for cell in tagged)


def test_notebooks_show_source_text_only_where_it_is_tagged():
    assert any(SOURCE_TEXT in cell["metadata"].get("tags", []) for cell in CODE_CELLS["01_data"])
    assert any(SOURCE_TEXT in cell["metadata"].get("tags", []) for cell in CODE_CELLS["05_compare_gpt2xl"])


@every_notebook
def test_notebook_is_unexecuted_or_was_executed_once_from_top_to_bottom(name):
    counts = [cell["execution_count"] for cell in CODE_CELLS[name]]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))


@every_notebook
def test_notebook_outputs_hold_no_error_and_no_folder_of_the_machine_they_were_made_on(name):
    outputs = [output for cell in CODE_CELLS[name] for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not re.search(r"(?<![\w./-])/(?:home|root|tmp|work|Users|mnt)/", json.dumps(outputs))


@every_notebook
def test_the_first_code_cell_says_which_preset_was_taken_and_why(name):
    assert "print(config.introduce(preset))" in source(CODE_CELLS[name][0])


@every_notebook
def test_notebook_has_cells_whose_output_is_compared(name):
    checked = [cell for cell in CODE_CELLS[name] if CHECKED in source(cell)]
    assert checked
    assert all(cell["outputs"] for cell in checked if cell["execution_count"])


@every_notebook
def test_compared_cells_do_not_show_source_text(name):
    assert not [c for c in CODE_CELLS[name] if CHECKED in source(c) and SOURCE_TEXT in c["metadata"].get("tags", [])]


def test_labels_are_unique_across_notebooks():
    everywhere = [label for name in NOTEBOOKS for label in labels(name)]
    assert sorted(everywhere) == sorted(set(everywhere))


def test_quarto_project_lists_all_notebooks_and_no_other():
    listed = yaml.safe_load((ROOT / "_quarto.yml").read_text())["manuscript"]["notebooks"]
    assert [entry["notebook"] for entry in listed] == [f"notebooks/{name}.ipynb" for name in NOTEBOOKS]


@with_report
def test_report_embeds_labelled_cells():
    embedded = EMBED.findall(REPORT.read_text())
    assert len(embedded) == REPORT.read_text().count("{{< embed")
    known = {(f"notebooks/{name}.ipynb", label) for name in NOTEBOOKS for label in labels(name)}
    assert set(embedded) - known == set()


@with_report
def test_report_takes_its_numbers_from_recorded_variables():
    recorded = yaml.safe_load((ROOT / "_variables.yml").read_text())
    used = set(VARIABLE.findall(REPORT.read_text()))
    assert len(used) > 0
    assert used - {f"{section}.{name}" for section, values in recorded.items() for name in values} == set()


@with_report
def test_report_cites_works_that_are_in_the_bibliography():
    text = re.sub(r"{{<.*?>}}", "", REPORT.read_text())
    cited = set(re.findall(r"(?<![\w`])@((?!fig-|tbl-|lst-|sec-|eq-)[A-Za-z][\w:-]*\w)", text))
    known = set(re.findall(r"^@\w+{\s*([^,\s]+)", (ROOT / "references.bib").read_text(), re.MULTILINE))
    assert cited - known == set()


def test_conda_environment_holds_the_pins_without_which_it_does_not_run():
    environment = yaml.safe_load((ROOT / "env.yaml").read_text())
    assert environment["name"] == "b"
    assert environment["channels"] == ["pytorch", "nvidia", "conda-forge"]
    pins = {"python=3.11", "pytorch=2.1.*", "pytorch-cuda=12.1", "numpy<2", "mkl<2024.1", "transformers<4.50"}
    assert pins <= set(environment["dependencies"])


def test_conda_environment_holds_every_package_that_blm_core_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]}
    extras = [entry for extra in ("tracking", "comparison") for entry in project["optional-dependencies"][extra]]
    wanted |= {re.match(r"[\w-]+", requirement)[0] for requirement in extras}
    packages = {re.match(r"[\w-]+", entry)[0] for entry in yaml.safe_load((ROOT / "env.yaml").read_text())["dependencies"]}
    assert wanted - {"torch"} <= packages


@pytest.mark.parametrize(("file", "torch"), [("constraints.txt", "2.13.0"), ("constraints-graded.txt", "2.1.2")])
def test_pip_environments_name_exact_versions(file, torch):
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    versions = dict(line.split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = project["dependencies"] + [
        name for extra in ("comparison", "notebooks", "dev") for name in project["optional-dependencies"][extra]
    ]
    assert {re.match(r"[\w-]+", name)[0] for name in installed} <= {name.lower().replace("_", "-") for name in versions}
    assert versions["torch"] == torch
    if torch.startswith("2.1."):
        assert versions["numpy"].startswith("1.")


@pytest.mark.parametrize("module", ["blm_core", "blm_core.evidence"])
def test_readme_names_commands_that_exist(module):
    commands = set(re.findall(rf"python -m {module} ([a-z]\w*)", README))
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    assert commands
    assert commands <= set(re.search(r"{([\w,-]+)}", shown)[1].split(","))


def test_readme_names_targets_that_exist():
    targets = set(re.findall(r"\bmake ([a-z][\w-]*)", README))
    known = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"run", "test", "test-graded", "publish", "report"} <= targets <= known


def test_readme_explains_every_environment_variable():
    code = "\n".join(path.read_text() for path in (ROOT / "blm_core").rglob("*.py"))
    assert set(re.findall(r"\bBLM_[A-Z0-9_]+\b", code)) <= set(re.findall(r"`(BLM_[A-Z0-9_]+)`", README))


@pytest.mark.parametrize("name", config.PRESETS)
def test_readme_states_presets_as_they_are_configured(name):
    preset = config.PRESETS[name]
    row = re.search(rf"^\| `{name}` \|.*$", README, re.MULTILINE)[0]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    tokens = preset.train.steps * preset.tokens_per_step
    size = f"{parameter_counts(preset.model)['total'] / 1e6:.2f} M"
    assert cells[2:5] == [size, f"{preset.tokens_per_step:,}", f"{tokens / 1e6:,.1f} M"]
