"""Files that are either whole or not there: written aside, then moved into place."""

import contextlib
import hashlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def written_aside(path: Path):
    """A temporary path beside `path`; it becomes `path` when the block ends well and is removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    with written_aside(path) as aside:  # half a surrogate pair, which UTF-8 cannot hold, becomes its JSON escape
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path, default=None):
    """The value in `path`; `default` where there is no such file or it is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return default


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
