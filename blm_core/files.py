"""Files: written whole or not at all, downloaded, unpacked.

- A file is written beside its place and moved into it, so that a reader finds the old one or the new one.
- Downloads are streamed, resumed by HTTP range, retried with back-off, and moved into place only when they are whole.
- Archives are untrusted: only `dataNN.json` files are taken out of them.
"""

import contextlib
import gzip
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

ATTEMPTS = 6
BACKOFF = 1.0  # seconds before the second attempt, doubled each time
TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte
MEMBER = re.compile(r"(?:\./)?(data[0-9]+\.json)")


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
    """An archive that is broken or that must not be unpacked."""


class _Retry(Exception):
    """This attempt failed; another may not."""

    def __init__(self, reason: str, wait: float = 0):
        super().__init__(reason)
        self.wait = wait


def is_address(source: str) -> bool:
    return re.match("https?://", source) is not None


def fetch(source: str, folder: Path, variable: str = "BLM_ARCHIVE") -> Path:
    """The file named by `source`, a URL or a local path; URLs are downloaded into `folder` once.

    `variable` is the environment variable that names another source; errors point to it. Raises DownloadError.
    """
    if not is_address(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise DownloadError(f"{source} is neither a file nor an http(s) address. Set {variable} to one of them.")
        return path
    name = source.split("?")[0].rstrip("/").rsplit("/", 1)[-1]
    target, note = Path(folder) / name, Path(folder) / f"{name}.source"
    if read_json(note, {}).get("url") == source and target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    way_out = f"Set {variable} to another URL or to a local file."
    for attempt in range(ATTEMPTS):
        try:
            return _attempt(source, target, note)
        except (_Retry, requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            reason = error
        except requests.RequestException as error:
            raise DownloadError(f"{source} cannot be had: {error}. {way_out}") from error
        except OSError as error:
            raise DownloadError(f"{target} cannot be written: {error.strerror}. Free some space and run this again.") from error
        if attempt + 1 < ATTEMPTS:
            time.sleep(max(BACKOFF * 2**attempt, getattr(reason, "wait", 0)))
    raise DownloadError(
        f"{source} could not be downloaded in {ATTEMPTS} attempts (last: {reason}). What had arrived is kept and will be "
        f"resumed. {way_out}"
    )


def _attempt(url: str, target: Path, note: Path) -> Path:
    """One try: continue `target.part` where it ends, then verify size and checksum and move it into place."""
    part, known = target.with_name(target.name + ".part"), read_json(note, {})
    have = part.stat().st_size if part.exists() and known.get("url") == url and known.get("version") else 0
    if not have or have != known["size"]:
        known = _receive(url, target, part, note, known, have)
    size = part.stat().st_size
    if known["size"] in (None, size) and known["sha256"] in (None, sha256(part)):
        return part.replace(target)
    if size >= (known["size"] or 0):  # what is too short is continued
        part.unlink()
    raise _Retry(f"{size} of {known['size']} bytes arrived; the server states the sha256 {known['sha256']}")


def _receive(url: str, target: Path, part: Path, note: Path, known: dict, have: int) -> dict:
    """Write the file, or what follows its first `have` bytes, to `part`; what the server says of it goes into `note`."""
    resume = {"Range": f"bytes={have}-", "If-Range": known["version"]} if have else {}
    with requests.get(url, headers={"Accept-Encoding": "identity", **resume}, stream=True, timeout=TIMEOUT) as response:
        status, stated = response.status_code, {"url": url, **_stated(response)}
        if status == 429 or status >= 500:
            wait = response.headers.get("Retry-After", "")
            raise _Retry(f"HTTP status {status}", wait=min(int(wait), 120) if wait.isdigit() else 0)
        if status in (206, 416):
            continued = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if not have or not continued or stated["version"] != known["version"]:
                part.unlink(missing_ok=True)
                raise _Retry("the server cannot continue the file, so it is started again")
        else:
            response.raise_for_status()
            known, have = stated, 0
            for other in (target, part):  # before the note stops being about them
                other.unlink(missing_ok=True)
            write_json(note, known)
        with (
            open(part, "ab") as file,
            tqdm.wrapattr(file, "write", total=known["size"], initial=have, desc=target.name) as out,
        ):
            for block in response.iter_content(1 << 20):
                out.write(block)
    return known


def _stated(response: requests.Response) -> dict:
    """What the server says of the file. The hub states size and sha256 of the real file on its redirect."""
    own, linked = response.headers, {}
    for answer in [*response.history, response]:
        linked |= {name.lower(): value for name, value in answer.headers.items() if name.lower().startswith("x-linked-")}
    digest = linked.get("x-linked-etag", "").strip('W/"')
    size = linked.get("x-linked-size") or own.get("Content-Length")
    tag = own.get("ETag", "W/")
    return {
        "version": own.get("Last-Modified") if tag.startswith("W/") else tag,  # If-Range takes strong validators only
        "size": int(size) if size else None,
        "sha256": digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None,
    }


def pack_sample(folder: Path, target: Path) -> Path:
    """The shards in `folder` as an archive like the official one, byte for byte the same every time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(target, "wb", compresslevel=1, mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for shard in sorted(folder.glob("data*.json")):
            info = tarfile.TarInfo(shard.name)
            info.size = shard.stat().st_size
            with open(shard, "rb") as file:
                archive.addfile(info, file)
    return target


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Take the `dataNN.json` members of `archive` out into `folder`, all or none; their sorted paths.

    Other files are passed over. Raises ArchiveError for damage, absolute paths, `..`, links, devices and sparse files.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
    try:
        aside.mkdir()
        with tarfile.open(archive) as tar, tqdm(unit="B", unit_scale=True, desc=f"unpacking {archive.name}") as bar:
            for member in tar:
                outside = member.name.startswith("/") or ".." in Path(member.name).parts
                if outside or member.issparse() or not (member.isfile() or member.isdir()):
                    why = "lies outside the archive" if outside else "is a link, device or sparse file"
                    raise ArchiveError(f"{archive} holds {member.name!r}, which {why}; it was not unpacked.")
                if member.isfile() and (match := MEMBER.fullmatch(member.name)):
                    with tar.extractfile(member) as read, open(aside / match[1], "wb") as write:
                        shutil.copyfileobj(read, write, 1 << 20)
                    bar.update(member.size)
            tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header for the end; reading on checks gzip's checksum too
            while rest := tar.fileobj.read(1 << 20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("what follows the last readable member is damaged")
        if not any(aside.iterdir()):
            raise ArchiveError(f"{archive} holds no member named like data00.json; is it the story archive?")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (tarfile.TarError, EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        damaged = getattr(error, "errno", None) is None  # else the system says why, a full disk say
        hint = " If it was downloaded, delete it to have it downloaded again." if damaged else ""
        raise ArchiveError(f"{archive} cannot be unpacked into {folder}: {error}.{hint}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sorted(folder.glob("data*.json"), key=lambda path: (len(path.name), path.name))
