"""Archives are untrusted: only shards are taken out of them, all or none."""

import gzip
import io
import random
import signal
import tarfile
from pathlib import Path

import pytest

from blm_core.data import SAMPLE_FOLDER
from blm_core.files import ArchiveError, pack_sample, unpack


def file(name: str, body: bytes = b"[]", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, body


def other(name: str, kind: bytes, **fields) -> tuple[tarfile.TarInfo, bytes]:
    return file(name, b"", type=kind, **fields)


def packed(path: Path, *members, mode="w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, body in members:
            archive.addfile(info, io.BytesIO(body))
    return path


GOOD = [file("data00.json", b"[1]"), file("data01.json", b"[2]")]
REFUSED = {
    "absolute path": file("/data02.json"),
    "parent folder in the middle": file("a/../../data02.json"),
    "parent folder of another file": file("../../.bashrc"),
    "folder outside": other("../out", tarfile.DIRTYPE),
    "symbolic link": other("data02.json", tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link outside": other("data02.json", tarfile.LNKTYPE, linkname="/etc/passwd"),
    "character device": other("data02.json", tarfile.CHRTYPE, devmajor=1, devminor=5),
    "fifo": other("data02.json", tarfile.FIFOTYPE),
    "sparse file": file("data02.json", b"", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}),
    "malformed sparse file": file("data02.json", b"[" * 600, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("first", [True, False], ids=["before the shards", "after the shards"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_malicious_member_refuses_the_archive_and_what_an_earlier_one_gave_stays(tmp_path, kind, first):
    shards = tmp_path / "in" / "side" / "shards"
    unpack(packed(tmp_path / "good.tar.gz", *GOOD), shards)
    new = [file("data00.json", b"[3]"), file("data01.json", b"[4]")]
    packed(tmp_path / "bad.tar.gz", *([REFUSED[kind], *new] if first else [*new, REFUSED[kind]]))
    before = tree(tmp_path)
    with pytest.raises(ArchiveError, match=r"bad\.tar\.gz"):
        unpack(tmp_path / "bad.tar.gz", shards)
    assert tree(tmp_path) == before
    assert tree(shards) == {"data00.json": b"[1]", "data01.json": b"[2]"}


def test_only_shards_are_taken_out_in_the_order_of_their_numbers_beyond_99_too(tmp_path):
    names = ["README", "data.json", "data00.json.bak", "xdata00.json", "sub/data05.json", "DATA01.json", "data00.jsonl"]
    shards = [f"data{i:02}.json" for i in (100, 2, 99, 0, 101, 10)]
    archive = packed(tmp_path / "a.tar.gz", *map(file, [*names, *shards]), other("data09.json", tarfile.DIRTYPE))
    paths = unpack(archive, tmp_path / "shards")
    assert [path.name for path in paths] == [f"data{i:02}.json" for i in (0, 2, 10, 99, 100, 101)]
    assert len(tree(tmp_path / "shards")) == len(paths)


@pytest.mark.parametrize("members", [[], [file("README"), file("stories/data00.json")]], ids=["empty", "none"])
def test_an_archive_without_shards_is_refused(tmp_path, members):
    with pytest.raises(ArchiveError, match=r"no member named like data00\.json"):
        unpack(packed(tmp_path / "a.tar.gz", *members), tmp_path / "shards")
    assert list(tree(tmp_path)) == ["a.tar.gz"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return pack_sample(SAMPLE_FOLDER, tmp_path_factory.mktemp("sample") / "sample.tar.gz")


@pytest.mark.parametrize(
    "content", [b"<html>Please log in</html>", gzip.compress(b"no archive"), 0, 0.01, 0.5, 0.9999], ids=str
)
def test_what_is_no_whole_archive_is_refused_and_the_way_out_is_named(tmp_path, sound, content):
    body = sound.read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(content if isinstance(content, bytes) else body[: int(len(body) * content)])
    with pytest.raises(ArchiveError, match=r"(?s)a\.tar\.gz cannot be unpacked.*delete it"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "shards")
    assert list(tree(tmp_path)) == ["a.tar.gz"]


def test_a_damaged_gzip_is_never_taken_for_a_sound_one(tmp_path, sound):
    body, rng = sound.read_bytes(), random.Random(1)
    for _ in range(30):
        damaged = bytearray(body)
        damaged[rng.randrange(20, len(body))] ^= 1 << rng.randrange(8)
        (tmp_path / "a.tar.gz").write_bytes(damaged)
        with pytest.raises(ArchiveError, match="cannot be unpacked"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "shards")
    assert list(tree(tmp_path)) == ["a.tar.gz"]


def test_a_damaged_header_is_not_taken_for_the_end_of_the_archive(tmp_path):
    archive = packed(tmp_path / "a.tar", *GOOD, mode="w")
    body = bytearray(archive.read_bytes())
    body[2 * 512] ^= 1  # the second header follows one header and one block of data
    archive.write_bytes(body)
    with pytest.raises(ArchiveError, match="damaged"):
        unpack(archive, tmp_path / "shards")


UNPACK = "from pathlib import Path; from blm_core.files import unpack; unpack(Path(sys.argv[1]), Path(sys.argv[2]))"


def test_a_full_quota_is_reported_and_leaves_nothing(tmp_path, sound, with_quota):
    run = with_quota(1000, UNPACK, sound, tmp_path / "shards")
    assert run.stderr.strip().splitlines()[-1].startswith("blm_core.files.ArchiveError")
    assert "File too large" in run.stderr
    assert "delete it" not in run.stderr  # the archive is not at fault
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared_away(tmp_path, sound, with_quota):
    assert with_quota(1000, UNPACK, sound, tmp_path / "shards", beyond="SIG_DFL").returncode == -signal.SIGXFSZ
    assert list(tmp_path.iterdir()) != []
    assert len(unpack(sound, tmp_path / "shards")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_the_packed_sample_is_the_same_every_time_and_unpacks_to_the_sample(tmp_path, sound):
    again = pack_sample(SAMPLE_FOLDER, tmp_path / "sample.tar.gz")
    assert again.read_bytes() == sound.read_bytes()
    unpack(again, tmp_path / "shards")
    assert tree(tmp_path / "shards") == tree(SAMPLE_FOLDER)
