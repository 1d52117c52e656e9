"""What blm_core imports: the core little and never the evidence, and no module in a circle."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import blm_core

PACKAGE = Path(blm_core.__file__).parent
PATHS = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
PATHS = {name: path for name, path in PATHS.items() if not name.endswith("__init__")}
CORE = sorted(name for name in PATHS if not name.startswith("evidence."))
NEEDED = {"torch", "numpy", "sentencepiece", "requests", "tqdm"}
ON_REQUEST = {"tensorboard", "wandb"}  # inside functions only


def imports(path: Path) -> list[tuple[str, bool]]:
    """The full names that a file imports, each with whether it does so inside a function."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not followed by this test"
            found.extend((f"{node.module}.{alias.name}", inside) for alias in node.names)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return [(name.replace("torch.utils.tensorboard", "tensorboard"), inside) for name, inside in found]


def own(module: str) -> set[str]:
    """The modules of blm_core that `module` imports."""
    names = [name.removeprefix("blm_core.") for name, _ in imports(PATHS[module]) if name.startswith("blm_core.")]
    return {known for name in names for known in PATHS if name == known or name.startswith(known + ".")}


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_its_five_packages_trackers_on_request_and_no_evidence(module):
    assert not [name for name in own(module) if name.startswith("evidence.")]
    for name, inside in imports(PATHS[module]):
        package = name.split(".")[0]
        known = package in sys.stdlib_module_names | NEEDED | {"blm_core"}
        assert known or (inside and package in ON_REQUEST), f"{module} imports {name}"


def test_modules_import_in_one_direction():
    order = graphlib.TopologicalSorter({module: own(module) for module in PATHS}).static_order()
    assert sorted(order) == sorted(PATHS)  # raises CycleError, naming the circle
