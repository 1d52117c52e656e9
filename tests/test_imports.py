"""What blm_core imports: nothing foreign where data is prepared, trained on or sampled from, and no module in a circle."""

import ast
import graphlib
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import blm_core

PACKAGE = Path(blm_core.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
EVERYWHERE = {"torch", "numpy", "sentencepiece", "requests", "matplotlib", "tqdm"}
ON_REQUEST = {"tensorboard", "wandb"}
# These may use transformers, too.
COMPARISON = {
    "bench",
    "bench_ratios",
    "compare",
    "cost",
    "endings",
    "inside",
    "judge",
    "memory",
    "plan",
    "prompts",
    "sheets",
    "text_measures",
}
ABOVE_ALL = {"__main__", "publish"}  # they call every part


class Import(NamedTuple):
    name: str  # of the module, in full
    in_function: bool


def imports(path: Path) -> list[Import]:
    """All imports in a file, wherever they stand, torch's door to tensorboard under the name of tensorboard."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "blm_core" + (f".{node.module}" if node.module else "") if node.level else node.module
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            names = []
        for name in names:
            found.append(Import(name.replace("torch.utils.tensorboard", "tensorboard"), in_function))
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def own(module: str) -> set[str]:
    """The modules of blm_core that `module` imports."""
    names = [item.name.split(".") for item in imports(PACKAGE / f"{module}.py")]
    return {name[1] for name in names if name[0] == "blm_core" and len(name) > 1 and name[1] in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_part_of_the_work_may_use(module):
    foreign = [item for item in imports(PACKAGE / f"{module}.py") if item.name.split(".")[0] != "blm_core"]
    foreign = [item for item in foreign if item.name.split(".")[0] not in sys.stdlib_module_names | EVERYWHERE]
    allowed = ON_REQUEST | ({"transformers"} if module in COMPARISON else set())
    assert {item.name.split(".")[0] for item in foreign} <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_only_when_asked_for(module):
    optional = [item for item in imports(PACKAGE / f"{module}.py") if item.name.split(".")[0] in ON_REQUEST | {"transformers"}]
    assert all(item.in_function for item in optional)


@pytest.mark.parametrize("module", sorted(set(MODULES) - COMPARISON - ABOVE_ALL))
def test_training_side_does_not_import_the_comparison(module):
    assert own(module).isdisjoint(COMPARISON | ABOVE_ALL)


def test_modules_import_in_one_direction():
    order = graphlib.TopologicalSorter({module: own(module) for module in MODULES}).static_order()
    assert sorted(order) == MODULES  # raises CycleError, naming the circle


def test_the_walk_sees_imports_of_every_form(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        "import json, os.path as p\nfrom . import data\nfrom .model import LanguageModel\n"
        "def f():\n    if p:\n        from torch.utils.tensorboard import SummaryWriter\n"
    )
    names = ["json", "os.path", "blm_core.data", "blm_core.model.LanguageModel", "tensorboard.SummaryWriter"]
    assert imports(path) == [Import(name, name.startswith("tensorboard")) for name in names]
