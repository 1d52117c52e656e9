"""Files on disk are the old one or the new one, never half of either."""

import os
import subprocess
import sys

import pytest

from blm_core.files import read_json, read_json_lines, write_json, write_json_lines


def test_a_write_that_fails_or_is_killed_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_json(path, "old")
    with pytest.raises(TypeError):
        write_json_lines(path, ["half", object()])
    assert os.listdir(tmp_path) == ["file"]
    code = "import os, sys; from blm_core.files import written_aside\n"
    code += "with written_aside(sys.argv[1]) as aside:\n    aside.write_text('half')\n    os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, path], timeout=60).returncode == -9
    assert read_json(path) == "old"


@pytest.mark.parametrize("content", [None, b"", b'{"half": ', b"\xff\xfe"])
def test_a_missing_or_broken_file_gives_the_default(tmp_path, content):
    if content is not None:
        (tmp_path / "file.json").write_bytes(content)
    assert (read_json(tmp_path / "file.json"), read_json(tmp_path / "file.json", {})) == (None, {})


def test_lines_are_read_as_written_without_empty_ones_and_a_broken_one_is_named(tmp_path):
    values, path = [{"a": "\u2028é\n"}, {"a": None}], tmp_path / "lines.jsonl"
    write_json_lines(path, values)
    with open(path, "a") as file:
        file.write('\n{"a": ')
    lines = read_json_lines(path)
    assert [next(lines), next(lines)] == values
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 4 is not valid JSON"):
        next(lines)
