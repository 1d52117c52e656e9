"""What is committed: notebooks, report, environments, README and code agree, and modules import in one direction."""

import ast
import graphlib
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

CHECKED = "NBVAL_CHECK_OUTPUT"
README = (ROOT / "README.md").read_text()
REPORT = (ROOT / "report.qmd").read_text()
PATHS = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "blm_core").rglob("*.py")}
MODULES = sorted(name for name in PATHS if not name.endswith("__init__"))
NEEDED = {"torch", "numpy", "sentencepiece", "requests", "tqdm", "blm_core"}


def code_cells(name: str) -> list[dict]:
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_was_executed_once_from_top_to_bottom_or_not_at_all_and_shows_no_foreign_text_error_or_folder(name):
    cells = code_cells(name)
    assert "print(config.introduce(preset))" in cells[0]["source"]
    counts = [cell["execution_count"] for cell in cells]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))
    checked = [cell for cell in cells if CHECKED in cell["source"]]
    assert checked
    assert all(cell["outputs"] for cell in checked if cell["execution_count"])
    tagged = [cell for cell in cells if SOURCE_TEXT in cell["metadata"].get("tags", [])]
    assert tagged or name not in ("01_data", "05_compare_gpt2xl")  # these two show some
    assert not [cell for cell in tagged if cell["outputs"] or cell in checked]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not re.search(r"(?<![\w./-])/(?:home|root|tmp|work|Users|mnt)/", json.dumps(outputs))


def test_report_embeds_labelled_cells_recorded_variables_and_known_citations():
    listed = yaml.safe_load((ROOT / "_quarto.yml").read_text())["manuscript"]["notebooks"]
    assert [entry["notebook"] for entry in listed] == [f"notebooks/{name}.ipynb" for name in NOTEBOOKS]
    embedded = re.findall(r"{{<\s*embed\s+notebooks/(\w+).ipynb#(\S+?)\s*(?:echo=\w+\s*)?>}}", REPORT)
    assert len(embedded) == REPORT.count("{{< embed")
    sources = [(name, cell["source"]) for name in NOTEBOOKS for cell in code_cells(name)]
    known = [(name, label) for name, text in sources for label in re.findall(r"^#\|\s*label:\s*(\S+)", text, re.MULTILINE)]
    assert set(embedded) <= set(known)
    assert len({label for _, label in known}) == len(known)
    recorded = yaml.safe_load((ROOT / "_variables.yml").read_text())
    used = set(re.findall(r"{{<\s*var\s+([\w.-]+)\s*>}}", REPORT))
    assert set() < used <= {f"{section}.{name}" for section, values in recorded.items() for name in values}
    cited = set(re.findall(r"(?<![\w`])@((?!fig-|tbl-|lst-|sec-|eq-)[A-Za-z][\w:-]*\w)", re.sub(r"{{<.*?>}}", "", REPORT)))
    assert cited <= set(re.findall(r"^@\w+{\s*([^,\s]+)", (ROOT / "references.bib").read_text(), re.MULTILINE))


def test_environments_hold_every_package_that_the_project_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(*extras: str) -> set[str]:
        entries = project["dependencies"] + [entry for extra in extras for entry in project["optional-dependencies"][extra]]
        return {re.match(r"[\w-]+", entry)[0] for entry in entries}

    conda = {re.match(r"[\w-]+", entry)[0] for entry in yaml.safe_load((ROOT / "env.yaml").read_text())["dependencies"]}
    assert names("tracking", "comparison") - {"torch"} <= conda
    for file, torch in (("constraints.txt", "2.13.0"), ("constraints-graded.txt", "2.1.2")):
        lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
        versions = dict(line.lower().replace("_", "-").split("==") for line in lines)
        assert names("comparison", "notebooks", "dev") <= set(versions)
        assert versions["torch"] == torch


def test_readme_names_commands_and_targets_that_exist_every_environment_variable_and_presets_as_they_are():
    for module in ("blm_core", "blm_core.evidence"):
        command = [sys.executable, "-m", module, "--help"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        known = re.search(r"{([\w,-]+)}", shown)[1].split(",")
        assert set(re.findall(rf"python -m {module} ([a-z]\w*)", README)) <= set(known)
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", README)) <= set(targets)
    code = "\n".join(path.read_text() for path in (ROOT / "blm_core").rglob("*.py"))
    assert set(re.findall(r"\bBLM_[A-Z0-9_]+\b", code)) <= set(re.findall(r"`(BLM_[A-Z0-9_]+)`", README))
    for preset in config.PRESETS.values():
        row = re.search(rf"^\| `{preset.name}` \|.*$", README, re.MULTILINE)[0]
        size = f"{parameter_counts(preset.model)['total'] / 1e6:.2f} M"
        tokens = f"{preset.train.steps * preset.tokens_per_step / 1e6:,.1f} M"
        assert [cell.strip() for cell in row.split("|")[3:6]] == [size, f"{preset.tokens_per_step:,}", tokens]


def imports(module: str) -> dict[str, bool]:
    """The full names that a module imports, each with whether it does so outside of functions."""
    tree, found = ast.parse(PATHS[module].read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            parent = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found = {f"{parent}{alias.name}": node in tree.body for alias in node.names} | found
    return found


def test_modules_import_in_one_direction_and_the_core_its_five_packages_wandb_on_request_and_no_evidence():
    inner = {}
    for module in MODULES:
        names = imports(module)
        inner[module] = {known for name in names for known in MODULES if f"{name}.".startswith(f"{known}.")}
        if not module.startswith("blm_core.evidence"):
            foreign = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names | NEEDED}
            assert foreign <= {"wandb"}, module
            assert not names.get("wandb"), module
            assert not [name for name in inner[module] if name.startswith("blm_core.evidence")], module
    assert sorted(graphlib.TopologicalSorter(inner).static_order()) == MODULES  # raises CycleError, naming the circle
