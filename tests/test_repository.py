"""What is committed: notebooks, report, environments and README agree with each other and with the code."""

import json
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
REPORT = (ROOT / "report.qmd").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "env.yaml").read_text())
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def source(cell: dict) -> str:
    return "".join(cell["source"])


def labels(name: str) -> list[str]:
    return [label for cell in CODE_CELLS[name] for label in LABEL.findall(source(cell))]


def shows_source_text(cell: dict) -> bool:
    return SOURCE_TEXT in cell["metadata"].get("tags", [])


def required(*extras: str) -> set[str]:
    """The packages that blm_core needs, with those of its extras."""
    entries = PROJECT["dependencies"] + [entry for extra in extras for entry in PROJECT["optional-dependencies"][extra]]
    return {re.match(r"[\w-]+", entry)[0] for entry in entries}


@every_notebook
def test_source_text_is_in_no_committed_output_and_in_no_compared_cell(name):
    tagged = [cell for cell in CODE_CELLS[name] if shows_source_text(cell)]
    assert tagged or name not in ("01_data", "05_compare_gpt2xl")  # these two show some
    assert not [cell for cell in tagged if cell["outputs"] or CHECKED in source(cell)]


@every_notebook
def test_notebook_says_its_preset_first_and_was_executed_once_from_top_to_bottom_or_not_at_all(name):
    assert "print(config.introduce(preset))" in source(CODE_CELLS[name][0])
    counts = [cell["execution_count"] for cell in CODE_CELLS[name]]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))
    checked = [cell for cell in CODE_CELLS[name] if CHECKED in source(cell)]
    assert checked
    assert all(cell["outputs"] for cell in checked if cell["execution_count"])


@every_notebook
def test_notebook_outputs_hold_no_error_and_no_folder_of_the_machine_they_were_made_on(name):
    outputs = [output for cell in CODE_CELLS[name] for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not re.search(r"(?<![\w./-])/(?:home|root|tmp|work|Users|mnt)/", json.dumps(outputs))


def test_quarto_project_lists_all_notebooks_and_no_other():
    listed = yaml.safe_load((ROOT / "_quarto.yml").read_text())["manuscript"]["notebooks"]
    assert [entry["notebook"] for entry in listed] == [f"notebooks/{name}.ipynb" for name in NOTEBOOKS]


def test_report_embeds_labelled_cells_and_labels_are_unique_across_notebooks():
    embedded = EMBED.findall(REPORT)
    assert len(embedded) == REPORT.count("{{< embed")
    known = [(f"notebooks/{name}.ipynb", label) for name in NOTEBOOKS for label in labels(name)]
    assert set(embedded) - set(known) == set()
    assert len({label for _, label in known}) == len(known)


def test_report_takes_its_numbers_from_recorded_variables():
    recorded = yaml.safe_load((ROOT / "_variables.yml").read_text())
    used = set(VARIABLE.findall(REPORT))
    assert len(used) > 0
    assert used - {f"{section}.{name}" for section, values in recorded.items() for name in values} == set()


def test_report_cites_works_that_are_in_the_bibliography():
    cited = set(re.findall(r"(?<![\w`])@((?!fig-|tbl-|lst-|sec-|eq-)[A-Za-z][\w:-]*\w)", re.sub(r"{{<.*?>}}", "", REPORT)))
    known = set(re.findall(r"^@\w+{\s*([^,\s]+)", (ROOT / "references.bib").read_text(), re.MULTILINE))
    assert cited - known == set()


def test_conda_environment_holds_its_pins_and_every_package_that_blm_core_needs():
    assert (CONDA["name"], CONDA["channels"]) == ("b", ["pytorch", "nvidia", "conda-forge"])
    pins = {"python=3.11", "pytorch=2.1.*", "pytorch-cuda=12.1", "numpy<2", "mkl<2024.1", "transformers<4.50"}
    assert pins <= set(CONDA["dependencies"])
    assert required("tracking", "comparison") - {"torch"} <= {re.match(r"[\w-]+", entry)[0] for entry in CONDA["dependencies"]}


@pytest.mark.parametrize(
    ("file", "torch", "numpy"), [("constraints.txt", "2.13.0", ""), ("constraints-graded.txt", "2.1.2", "1.")]
)
def test_pip_environments_name_exact_versions(file, torch, numpy):
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    versions = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    assert required("comparison", "notebooks", "dev") <= set(versions)
    assert versions["torch"] == torch
    assert versions["numpy"].startswith(numpy)


@pytest.mark.parametrize("module", ["blm_core", "blm_core.evidence"])
def test_readme_names_commands_that_exist(module):
    commands = set(re.findall(rf"python -m {module} ([a-z]\w*)", README))
    command = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
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
