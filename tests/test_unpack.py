"""Archives are untrusted: only shards are taken out of them, all or none."""

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from blm_core.files import ArchiveError, unpack


def member(name: str, body: bytes = b"[]", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, body


def packed(path: Path, *members, mode="w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, body in members:
            archive.addfile(info, io.BytesIO(body))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PASSED_OVER = [
    *(member(name) for name in ("README", "data.json", "data00.json.bak", "xdata00.json", "../../.bashrc")),
    member("data90.json", b"", type=tarfile.DIRTYPE),
    member("data91.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    member("data92.json", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    member("data93.json", b"", type=tarfile.FIFOTYPE),
    member("data94.json", b"", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}),
]
ANYWHERE = ["data01.json", "./data00.json", "stories/data02.json", "/data03.json", "a/../../data04.json"]


def test_regular_files_named_like_shards_are_taken_out_into_the_folder_and_nothing_else_is(tmp_path):
    archive = packed(tmp_path / "a.tar.gz", *PASSED_OVER[:5], *map(member, ANYWHERE), *PASSED_OVER[5:])
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "data77.json").write_text("what a killed run left")
    paths = unpack(archive, tmp_path / "shards")
    assert paths == [tmp_path / "shards" / f"data0{i}.json" for i in range(5)]
    assert tree(tmp_path) == {"a.tar.gz": archive.read_bytes()} | {f"shards/data0{i}.json": b"[]" for i in range(5)}


def refused(archive: Path, why: str = "") -> None:
    with pytest.raises(ArchiveError, match=rf"(?s)a\.tar\.gz cannot be unpacked.*{why}.*delete it"):
        unpack(archive, archive.parent / "shards")
    assert list(tree(archive.parent)) == ["a.tar.gz"]


def test_what_is_no_whole_archive_or_damaged_is_refused_and_the_way_out_is_named(tmp_path):
    rng, archive = random.Random(1), tmp_path / "a.tar.gz"
    sound = packed(archive, *(member(f"data0{i}.json", rng.randbytes(9000)) for i in range(3))).read_bytes()
    cut = [sound[: int(len(sound) * share)] for share in (0, 0.01, 0.5, 0.9999)]
    damaged = [bytearray(sound) for _ in range(30)]
    for content in damaged:
        content[rng.randrange(20, len(sound))] ^= 1 << rng.randrange(8)
    packed_tighter = bytearray(packed(archive, member("data00.json", rng.randbytes(9000)), mode="w:xz").read_bytes())
    packed_tighter[5000] ^= 1
    for content in [packed_tighter, b"<html>Please log in</html>", gzip.compress(b"no archive"), *cut, *damaged]:
        archive.write_bytes(content)
        refused(archive)


def test_a_damaged_header_is_not_taken_for_the_end_of_the_archive(tmp_path):
    archive = packed(tmp_path / "a.tar.gz", member("data00.json"), member("data01.json"), mode="w")
    body = bytearray(archive.read_bytes())
    body[2 * 512] ^= 1  # the second header follows one header and one block of data
    archive.write_bytes(body)
    refused(archive, "damaged")


def test_an_archive_without_shards_or_with_one_twice_is_refused(tmp_path):
    refused(packed(tmp_path / "a.tar.gz", member("README")), r"no file named like data00\.json")
    refused(packed(tmp_path / "a.tar.gz", member("data00.json"), member("again/data00.json")), "File exists")
