"""Files on disk are the old one or the new one, never half of either."""

import hashlib
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_core.files import read_json, sha256, write_json, written_aside

CHARACTERS = st.characters(exclude_categories=["Cs"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(CHARACTERS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(CHARACTERS), inner, max_size=4),
    max_leaves=10,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_error_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail_half_way():
        with written_aside(target) as aside:
            aside.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_used_up_quota_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    write_json(tmp_path / "file", "old")
    code = (
        "import resource, signal, sys; from pathlib import Path; from blm_core.files import write_json\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_json(Path(sys.argv[1]), 'new' * 1000)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], capture_output=True, text=True)
    assert "File too large" in run.stderr
    assert read_json(tmp_path / "file") == "old"
    assert names(tmp_path) == ["file"]


def test_a_kill_in_the_middle_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "file", "old")
    code = (
        "import os, signal, sys; from blm_core.files import written_aside\n"
        "with written_aside(sys.argv[1]) as aside:\n"
        "    aside.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "file"]).returncode == -9
    assert read_json(tmp_path / "file") == "old"


@settings(deadline=None)
@given(value=VALUES)
def test_a_value_is_read_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path):
    write_json(tmp_path / "value.json", {"\ud800 é": ["\udfff"]})
    assert read_json(tmp_path / "value.json") == {"\ud800 é": ["\udfff"]}
    assert "é" in (tmp_path / "value.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, b"", b'{"half": ', b"\xff\xfe", b"\0\0\0"])
def test_a_missing_or_broken_file_gives_the_default(tmp_path, content):
    if content is not None:
        (tmp_path / "value.json").write_bytes(content)
    assert read_json(tmp_path / "value.json") is None
    assert read_json(tmp_path / "value.json", {}) == {}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_the_checksum_is_that_of_the_whole_file(tmp_path, size):
    body = os.urandom(size)
    (tmp_path / "file").write_bytes(body)
    assert sha256(tmp_path / "file") == hashlib.sha256(body).hexdigest()
