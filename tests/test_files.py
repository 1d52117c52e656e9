"""Files on disk are the old one or the new one, never half of either."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_core.files import read_json, read_json_lines, sha256, text_sha256, write_json, write_json_lines

CHARACTERS = st.characters(exclude_categories=["Cs"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(CHARACTERS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(CHARACTERS), inner, max_size=4),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("code", "why", "left"),
    [
        ("write_json(path, 'new' * 1000)", "File too large", ["file"]),
        ("with written_aside(path) as aside:\n    aside.write_text('half')\n    1 / 0", "ZeroDivisionError", ["file"]),
        ("with written_aside(path) as aside:\n    aside.write_text('half')\n    os.kill(os.getpid(), 9)", "", None),
    ],
    ids=["quota", "error", "kill"],
)
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path, with_quota, code, why, left):
    write_json(tmp_path / "file", "old")
    imports = "import os; from blm_core.files import write_json, written_aside\npath = sys.argv[1]\n"
    run = with_quota(1000, imports + code, tmp_path / "file")
    assert run.returncode != 0
    assert why in run.stderr
    assert read_json(tmp_path / "file") == "old"
    assert left in (None, [path.name for path in tmp_path.iterdir()])  # a kill leaves the temporary file


@settings(deadline=None)
@given(value=VALUES)
def test_a_value_is_read_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    write_json_lines(path, [{"value": value}] * 2)
    assert list(read_json_lines(path)) == [{"value": value}] * 2


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


def test_a_broken_line_is_named_and_an_empty_one_passed_over(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    lines = read_json_lines(tmp_path / "lines.jsonl")
    assert [next(lines), next(lines)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 4 is not valid JSON"):
        next(lines)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 1])
def test_the_checksum_is_that_of_the_whole_file_and_of_a_text(tmp_path, size):
    (tmp_path / "file").write_text("é" * size, encoding="utf-8")
    assert sha256(tmp_path / "file") == text_sha256("é" * size) == hashlib.sha256(("é" * size).encode()).hexdigest()
