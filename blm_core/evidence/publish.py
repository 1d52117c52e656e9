"""From an executed preset to what is committed: notebooks, figures, variables, run, release and its model card.

- Notebooks call `record`; the report's prose takes every measured number from these records, through `_variables.yml`.
- Outputs of cells tagged `source-text` show other people's text and are cleared before anything is published.
"""

import math
import re
import shutil
from pathlib import Path

from blm_core.checkpoint import load_model
from blm_core.config import ROOT, Preset
from blm_core.evidence.export import export_transformers
from blm_core.evidence.page import BEGINNING, write_story
from blm_core.files import read_json, write_json
from blm_core.generate import Sampling, complete
from blm_core.model import LanguageModel
from blm_core.tokenizer import Tokenizer

NOTEBOOKS = ("01_data", "02_tokenizer", "03_model", "04_train", "05_compare_gpt2xl", "06_inside")
SOURCE_TEXT = "source-text"
RUN_FILES = ("config.json", "metrics.jsonl", "summary.json")
WIDEST_CELL = 40  # characters; longer cells are broken
SAMPLES = 10
# What stands to the right in a table.
NUMBER = re.compile(r"[-+]?\d[\d.,]*( ?[%MB]| points)?( \[.*\])?|not \w+|")
LABEL = re.compile(r"#\|\s*label:\s*(fig-[\w-]+)")
CARD = """---
language: en
license: cdla-sharing-1.0
library_name: transformers
pipeline_tag: text-generation
---

# BLM, a boutique language model

A decoder of the Llama family with {model[parameters]} parameters that writes short stories for small children, trained from
scratch with the preset `{preset.name}` of the project that this folder belongs to.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("release"), AutoModelForCausalLM.from_pretrained("release")
print(tokenizer.decode(model.generate(**tokenizer("{prompt}", return_tensors="pt"), max_new_tokens=200)[0]))
```

**Data.** {data[train_stories]} stories, {data[train_megabytes]} MB, of the TinyStories data set (Eldan and Li 2023; by its card
under CDLA-Sharing-1.0), cleaned and split as `notebooks/01_data.ipynb` shows. Validation stories were never trained on.

**Recipe.** {model[layers]} layers of width {model[width]}, {model[heads]} query heads on {model[kv_heads]} key/value heads,
context {model[context]}, {tokenizer[pieces]} pieces. {train[tokens]} tokens in {train[steps]} steps ({train[epochs]} epochs),
{optimizer}, learning rate {preset.train.learning_rate:g}, weight decay {preset.train.weight_decay:g},
dropout {preset.model.dropout:g}; {train[minutes]} minutes on {train[device]}, PyTorch {train[torch]}, {train[dtype]}.
{taught}All settings: `runs/{preset.name}/config.json`.

**Scores.** {compare[bits_per_byte]} bits per byte on {compare[stories]} stories ({compare[split]}), each scored alone, 95 %
bootstrap interval over stories [{compare[low]}, {compare[high]}]. `notebooks/05_compare_gpt2xl.ipynb` compares it with GPT2-XL.

**Limits.** It knows the world of its stories and nothing else: no facts, no instructions, no other language, nothing longer
than its context. It loses track of who holds what, and its endings can come from nowhere. Nobody has checked what it may say
that a child should not read.

**Samples, not picked.** The first ten after "{prompt}" with temperature {sampling.temperature:g}, top-p {sampling.top_p:g} and
seed {sampling.seed}:

{written}
"""


class PublishError(RuntimeError):
    """A preset that is not ready to be published."""


def record(preset: Preset, section: str, /, **values: str) -> None:
    """Keep `values`, formatted as the report shall print them, as `section.name` for the prose."""
    path = preset.folder / "results.json"
    results = read_json(path, {})
    results.setdefault(section, {}).update({name: str(value) for name, value in values.items()})
    write_json(path, results)


def markdown_table(header: tuple, rows: list[tuple]) -> str:
    """A table in Markdown, which Quarto sets natively in HTML and PDF: columns of numbers to the right, others to the left.

    Where the table is wider than the page, columns share it like the dashes below the header: by their longest cell.
    """
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in (header, *rows)]
    dashes = []
    for number, column in enumerate(zip(*lines, strict=True)):
        width = "-" * min(max(3, *map(len, column)), WIDEST_CELL)
        right = number and rows and all(map(NUMBER.fullmatch, column[1:]))
        dashes.append(f"{width}:" if right else f":{width}")
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], dashes, *lines[1:]))


def write_variables(preset: Preset, folder: Path) -> None:
    """Everything recorded, as `folder/_variables.yml`. Raises PublishError where nothing was."""
    import yaml

    results = read_json(preset.folder / "results.json")
    if not results:
        raise PublishError(f"{preset.folder} holds no results; run the notebooks first.")
    lines = [f"# Written by the notebooks with the preset {preset.name}."]
    for section, values in sorted(results.items()):
        lines.append(f"{section}:")
        for name, value in sorted(values.items()):  # in quotes, as other readers of YAML may take a bare 1e3 for a number
            quoted = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf)
            lines.append(f"  {name}: {quoted.strip()}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_variables.yml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def publish(preset: Preset, root: Path = ROOT) -> None:
    """Move what the executed notebooks of `preset` made into the project below `root`, and write what is made from it.

    Raises PublishError, before anything is changed, where a notebook was not executed to its end or the run is not finished.
    """
    made, figures, release = preset.folder, root / "figures", root / "release"
    runs = [f"run/{name}" for name in (*RUN_FILES, "model/config.json")]
    for name in (*(f"notebooks/{name}.ipynb" for name in NOTEBOOKS), *runs, "heads.json"):
        if not (made / name).is_file():
            raise PublishError(f"{made / name} is missing; run the notebooks first.")
    notebooks = {name: _executed(made / "notebooks" / f"{name}.ipynb") for name in NOTEBOOKS}
    write_variables(preset, root)
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir()
    for name, notebook in notebooks.items():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                clear_for_publication(cell)
                _save_figure(cell, figures)
        write_json(root / "notebooks" / f"{name}.ipynb", notebook)
    kept = root / "runs" / preset.name
    for run, target in ((made / "run", kept), *((path, kept / "teachers" / path.name) for path in made.glob("teachers/*"))):
        target.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            shutil.copyfile(run / name, target / name)
    shutil.copyfile(made / "heads.json", figures / "heads.json")
    shutil.copytree(made / "run" / "model", release, dirs_exist_ok=True)
    export_transformers(release)
    write_story(release, figures / "story.md")
    (release / "README.md").write_text(model_card(preset, *load_model(release)), encoding="utf-8")


def clear_for_publication(cell: dict) -> None:
    """Clear a code cell's outputs where they show source text, and always progress bars, times and this machine's paths."""
    if SOURCE_TEXT in cell["metadata"].get("tags", []):
        cell["outputs"] = []
    cell["outputs"] = [out for out in cell["outputs"] if out.get("name") != "stderr"]
    for output in cell["outputs"]:
        if "text" in output:
            output["text"] = "".join(output["text"]).replace(f"{ROOT}/", "")
    cell["metadata"].pop("execution", None)


def _executed(path: Path) -> dict:
    notebook = read_json(path)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    errors = [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    if errors or [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        raise PublishError(f"{path} was not executed from top to bottom without errors.")
    return notebook


def _save_figure(cell: dict, folder: Path) -> None:
    label = LABEL.search("".join(cell["source"]))
    for output in cell["outputs"] if label else []:
        if svg := output.get("data", {}).get("image/svg+xml"):
            (folder / f"{label[1]}.svg").write_text("".join(svg), encoding="utf-8")


def model_card(preset: Preset, model: LanguageModel, tokenizer: Tokenizer) -> str:
    """The card in Markdown, from what the notebooks of `preset` have recorded; `model` writes the samples."""
    texts, taught = complete(model, tokenizer, [BEGINNING] * SAMPLES, Sampling()), ""
    if preset.teachers:
        taught = f"{len(preset.teachers)} larger models were trained first; "
        taught += f"{preset.train.teacher_weight:.0%} of the loss asks for their mean prediction, the rest for the text. "
    return CARD.format(
        **read_json(preset.folder / "results.json"),
        preset=preset,
        prompt=BEGINNING,
        taught=taught,
        optimizer="Muon and AdamW" if preset.train.optimizer == "muon" else "AdamW",
        sampling=Sampling(),
        written="\n".join(f"{number}. {' '.join(f'{BEGINNING}{text}'.split())}" for number, text in enumerate(texts, 1)),
    )
