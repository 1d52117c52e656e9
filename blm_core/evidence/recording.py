"""JSON-lines files of results that cost something: written as they come, continued after a break, never made twice."""

import json
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

from blm_core import __version__


class RecordingError(ValueError):
    """A file of recorded results that is broken, or that was made with other settings."""


def read_lines(path: Path) -> list[dict]:
    """The records of a JSON-lines file. Raises RecordingError naming a broken line."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise RecordingError(f"{path}, line {number} is not valid JSON ({error}); was the file cut off?") from error
        if not isinstance(records[-1], dict):
            raise RecordingError(f"{path}, line {number} is not a record but {line[:40]!r}.")
    return records


def append_lines(path: Path, lines: list[dict]) -> None:
    """Add records to a JSON-lines file, on the disk before this returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def resume(path: Path, settings: dict, needed: tuple[str, ...]) -> list[dict]:
    """The records of a JSON-lines file that is to be continued; none where there is no file yet.

    What stands behind the last newline is the half of a record that a break left: it is cut off with a warning, and made
    again. Raises RecordingError for a broken line elsewhere, a record without the fields `needed`, and a setting that
    differs from `settings`, by name.
    """
    path = Path(path)
    if not path.is_file():
        return []
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        warnings.warn(
            f"{path} ended in {len(raw) - whole} bytes of a half-written record; they were cut off and will be made again.",
            stacklevel=3,
        )
        with open(path, "r+b") as file:
            file.truncate(whole)
    records = read_lines(path)
    for number, line in enumerate(records, 1):
        lacking = [name for name in needed if name not in line]
        if lacking:
            raise RecordingError(f"{path}, record {number} has no {', '.join(lacking)}: it was not recorded by this command.")
        found, wanted = _flat({name: line.get(name) for name in settings}), _flat(settings)
        for name in wanted | found:
            if found.get(name) != wanted.get(name):
                raise RecordingError(
                    f"{path} was recorded with {name} = {found.get(name)!r}, now it is {wanted.get(name)!r}. "
                    "Name another file, or use the same settings."
                )
    return records


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ["torch", "numpy", "sentencepiece"] + ["transformers"] * ("transformers" in sys.modules)
    return {"blm_core": __version__, "python": sys.version.split()[0], **{name: version(name) for name in packages}}


def _flat(settings: dict, before: str = "") -> dict:
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return flat
