"""Files: written whole or not at all, downloaded, unpacked.

- A file is written beside its place and moved into it, so that a reader finds the old one or the new one.
- Downloads are streamed, resumed by HTTP range, retried with back-off, and moved into place only when they are whole.
- Archives are untrusted: only `dataNN.json` files are taken out of them.
"""

import contextlib
import errno
import hashlib
import json
import lzma
import os
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import requests
from tqdm import tqdm

PAUSES = (0, 2, 8, 30, 60)  # seconds before each attempt
TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte
SHARD = re.compile(r"data[0-9]+\.json")


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
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, default=None):
    """The value in `path`; `default` where there is no such file or it is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return default


def found(path: Path, made_from: dict) -> dict | None:
    """The JSON notes in `path` if they say that they were `made_from` these inputs, else None: then it must be made again."""
    notes = read_json(path)
    return notes if notes and notes["made_from"] == made_from else None


def read_json_lines(path: Path) -> Iterator[dict]:
    """The values in a file of one JSON value a line, without its empty lines. Raises ValueError that names a broken one."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON ({error}); was the file cut off?") from error


def write_json_lines(path: Path, values) -> None:
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value) + "\n")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class DownloadError(RuntimeError):
    """A file that could not be brought here."""


class ArchiveError(RuntimeError):
    """An archive that cannot be used."""


def fetch(source: str, folder: Path, variable: str = "BLM_ARCHIVE") -> Path:
    """The file named by `source`, a URL or a local path; a URL is downloaded into `folder` once.

    `variable` is the environment variable that names another source, for the errors. Raises DownloadError.
    """
    path = os.path.expanduser(source)
    if os.path.isfile(path):  # which, unlike pathlib, answers for an address of any length
        return Path(path)
    if not source.startswith(("http://", "https://")):
        raise DownloadError(f"{source} is neither a file nor an http(s) address. Set {variable} to one of them.")
    target = Path(folder) / source.split("?")[0].rstrip("/").rsplit("/", 1)[-1]
    note = target.with_name(f"{target.name}.source")
    if target.exists() and read_json(note, {}).get("url") == source:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    for pause in PAUSES:
        time.sleep(pause)
        try:
            return _download(source, target, note)
        except requests.RequestException as error:
            reason = error
            if error.response is not None and error.response.status_code in (401, 403, 404):
                break  # another attempt would not change it
        except OSError as error:
            raise DownloadError(f"{target} cannot be written: {error}. Free some space and run this again.") from error
    raise DownloadError(
        f"{source} could not be downloaded: {reason}. Run this again, which continues where it stopped, "
        f"or set {variable} to another URL or to a local file."
    )


def _download(url: str, target: Path, note: Path) -> Path:
    """One attempt: continue `target.part` where it ends, check size and checksum, and move it into place."""
    part, known = target.with_name(f"{target.name}.part"), read_json(note, {})
    have = part.stat().st_size if part.exists() and known.get("url") == url and known["version"] else 0
    if not have or have != known["size"]:  # else only the check was missing
        resume = {"Range": f"bytes={have}-", "If-Range": known["version"]} if have else {}
        with requests.get(url, headers={"Accept-Encoding": "identity", **resume}, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416:  # nothing follows this part, so it is of another file
                part.unlink(missing_ok=True)
            response.raise_for_status()
            if not have or response.status_code != 206:
                for old in (target, part):  # before the note stops being about them
                    old.unlink(missing_ok=True)
                known, have = {"url": url, **_stated(response)}, 0
                write_json(note, known)
            bar = {"total": known["size"], "initial": have, "desc": target.name}
            with open(part, "ab") as file, tqdm.wrapattr(file, "write", **bar) as out:
                for block in response.iter_content(1 << 20):
                    out.write(block)
    size = part.stat().st_size
    if known["size"] in (None, size) and known["sha256"] in (None, sha256(part)):
        return part.replace(target)
    if size >= (known["size"] or 0):  # what is too short is continued
        part.unlink()
    raise requests.ConnectionError(f"{size} bytes arrived that are not the file as the server describes it: {known}")


def _stated(response: requests.Response) -> dict:
    """What the server says of the file. The hub states size and sha256 on the redirect that leads to it."""
    own, redirects = response.headers, {}
    for redirect in response.history:
        redirects |= {name.lower(): value for name, value in redirect.headers.items()}
    size = redirects.get("x-linked-size") or own.get("Content-Length")
    tag, digest = own.get("ETag", "W/"), redirects.get("x-linked-etag", "").strip('W/"')
    return {
        "version": own.get("Last-Modified") if tag.startswith("W/") else tag,  # If-Range takes strong ones only
        "size": int(size) if size else None,
        "sha256": digest if re.fullmatch("[0-9a-f]{64}", digest) else None,
    }


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Take the regular files named `dataNN.json` out of `archive` into a new `folder`, all or none; their sorted paths.

    Everything else in the archive is passed over. Raises ArchiveError for a damaged archive and one without such files.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=f"unpacking {archive.name}", unit="file"):
                name = Path(member.name).name
                if SHARD.fullmatch(name) and member.isreg() and not member.issparse():
                    with tar.extractfile(member) as read, open(folder / name, "xb") as write:
                        shutil.copyfileobj(read, write)
            tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header for the end; reading on checks gzip's checksum too
            while rest := tar.fileobj.read(1 << 20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("what follows the last readable member is damaged")
        if not any(folder.iterdir()):
            raise tarfile.ReadError("it holds no file named like data00.json")
    except (tarfile.TarError, EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        shutil.rmtree(folder)
        full = getattr(error, "errno", None) == errno.ENOSPC
        way_out = "Free some space." if full else "If it was downloaded, delete it to have it downloaded again."
        raise ArchiveError(f"{archive} cannot be unpacked into {folder}: {error}. {way_out}") from error
    return sorted(folder.iterdir())
