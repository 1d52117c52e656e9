"""Files on disk are the old one or the new one, never half of either."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_core.files import read_json, read_json_lines, sha256, text_sha256, write_json, write_json_lines

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.lists(TEXT))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("write_json(path, 'new' * 1000)", "File too large"),
        ("with written_aside(path) as aside:\n    aside.write_text('half')\n    1 / 0", "ZeroDivisionError"),
        ("with written_aside(path) as aside:\n    aside.write_text('half')\n    os.kill(os.getpid(), 9)", ""),
    ],
    ids=["quota", "error", "kill"],
)
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path, with_quota, code, why):
    write_json(tmp_path / "file", "old")
    imports = "import os; from blm_core.files import write_json, written_aside\npath = sys.argv[1]\n"
    run = with_quota(1000, imports + code, tmp_path / "file")
    assert run.returncode != 0
    assert why in run.stderr
    assert read_json(tmp_path / "file") == "old"
    assert not why or [path.name for path in tmp_path.iterdir()] == ["file"]  # a kill leaves the temporary file


@settings(deadline=None)
@given(value=VALUES)
def test_a_value_is_read_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    write_json_lines(path, [value] * 2)
    assert list(read_json_lines(path)) == [value] * 2
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest() == text_sha256(path.read_text())


@pytest.mark.parametrize("content", [b"", b'{"half": ', b"\xff\xfe"])
def test_a_missing_or_broken_file_gives_the_default(tmp_path, content):
    (tmp_path / "broken.json").write_bytes(content)
    for name in ("broken.json", "missing.json"):
        assert (read_json(tmp_path / name), read_json(tmp_path / name, {})) == (None, {})


def test_a_broken_line_is_named_and_an_empty_one_passed_over(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    lines = read_json_lines(tmp_path / "lines.jsonl")
    assert [next(lines), next(lines)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 4 is not valid JSON"):
        next(lines)
