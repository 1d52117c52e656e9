"""From an executed preset to what is committed: notebooks, figures, variables, run, release.

- Notebooks call `record`; the report's prose takes every measured number from these records, through `_variables.yml`.
- Outputs of cells tagged `source-text` show other people's text and are cleared before anything is published.
"""

import base64
import json
import re
import shutil
from pathlib import Path

from blm_core.config import ROOT, Preset
from blm_core.files import read_json, write_json, written_aside

NOTEBOOKS = ("01_data", "02_tokenizer", "03_model", "04_train", "05_compare_gpt2xl")
SOURCE_TEXT = "source-text"
RUN_FILES = ("config.json", "metrics.jsonl", "summary.json")
NOT_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")  # valid as they stand in JSON strings only
WIDEST_CELL = 40  # characters; longer cells are broken
LABEL = re.compile(r"#\|\s*label:\s*(fig-[\w-]+)")


class PublishError(RuntimeError):
    """A preset that is not ready to be published."""


def record(preset: Preset, section: str, /, **values: str) -> None:
    """Keep `values`, formatted as the report shall print them, as `section.name` for the prose."""
    path = preset.folder / "results.json"
    results = read_json(path, {})
    results.setdefault(section, {}).update({name: str(value) for name, value in values.items()})
    write_json(path, results)


def markdown_table(header: tuple, rows: list[tuple]) -> str:
    """A table in Markdown, which Quarto sets natively in HTML and PDF; all but the first column stand to the right.

    Where the table is wider than the page, columns share it like the dashes below the header: by their longest cell.
    """
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [min(max(map(len, column), default=3), WIDEST_CELL) for column in zip(*lines, strict=True)]
    dashes = ["-" * max(3, width) + ":" * (i > 0) for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], dashes, *lines[1:]))


def write_variables(preset: Preset, folder: Path) -> None:
    """Everything recorded, as `folder/_variables.yml`. Raises PublishError where nothing was."""
    results = read_json(preset.folder / "results.json")
    if not results:
        raise PublishError(f"{preset.folder} holds no results; run the notebooks first.")
    lines = [f"# Written by the notebooks with the preset {preset.name}."]
    for section, values in sorted(results.items()):
        lines.append(f"{section}:")
        lines += [f"  {name}: {_yaml(value)}" for name, value in sorted(values.items())]
    with written_aside(folder / "_variables.yml") as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _yaml(text: str) -> str:
    """`text` as a quoted string of YAML: one of JSON in which some more characters are escaped."""
    return NOT_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def publish(preset: Preset, root: Path = ROOT) -> None:
    """Move what the executed notebooks of `preset` made into the project below `root`.

    Raises PublishError, before anything is changed, where a notebook was not executed to its end or the run is not finished.
    """
    executed = {name: _executed(preset.folder / "notebooks" / f"{name}.ipynb") for name in NOTEBOOKS}
    run = preset.folder / "run"
    missing = [name for name in (*RUN_FILES, "model/config.json") if not (run / name).is_file()]
    if missing:
        raise PublishError(f"{run} holds no finished run: {', '.join(missing)} not found. Run 04_train first.")
    write_variables(preset, root)
    shutil.rmtree(root / "figures", ignore_errors=True)
    for name, notebook in executed.items():
        for cell in notebook["cells"]:
            clear_for_publication(cell)
            _save_figure(cell, root / "figures")
        write_json(root / "notebooks" / f"{name}.ipynb", notebook)
    for name in RUN_FILES:
        _copy(run / name, root / "runs" / preset.name / name)
    for path in sorted((run / "model").iterdir()):
        _copy(path, root / "release" / path.name)


def clear_for_publication(cell: dict) -> None:
    """Clear the outputs that show source text, and progress bars, times and this machine's paths wherever they stand."""
    if cell["cell_type"] != "code":
        return
    if SOURCE_TEXT in cell["metadata"].get("tags", []):
        cell["outputs"] = []
    cell["outputs"] = [out for out in cell["outputs"] if out.get("name") != "stderr"]
    for output in cell["outputs"]:
        if "text" in output:
            output["text"] = "".join(output["text"]).replace(f"{ROOT}/", "")
    cell["metadata"].pop("execution", None)


def _executed(path: Path) -> dict:
    notebook = read_json(path)
    if notebook is None:
        raise PublishError(f"{path} is missing; run the notebooks first.")
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    errors = [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    if errors or counts != list(range(1, len(cells) + 1)):
        raise PublishError(f"{path} was not executed from top to bottom without errors.")
    return notebook


def _save_figure(cell: dict, folder: Path) -> None:
    label = LABEL.search("".join(cell["source"]))
    for output in cell.get("outputs", []) if label else []:
        data = output.get("data", {})
        if "image/svg+xml" in data:
            with written_aside(folder / f"{label[1]}.svg") as aside:
                aside.write_text("".join(data["image/svg+xml"]), encoding="utf-8")
        elif "image/png" in data:
            with written_aside(folder / f"{label[1]}.png") as aside:
                aside.write_bytes(base64.b64decode(data["image/png"]))


def _copy(source: Path, target: Path) -> None:
    with written_aside(target) as aside:
        shutil.copyfile(source, aside)
