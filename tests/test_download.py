"""Downloads against a real server on the loopback interface, which misbehaves as each test says."""

import hashlib
import random

import pytest

from blm_core import files
from blm_core.files import DownloadError, fetch

MIB = 1 << 20
SIZE = 5 * MIB // 2
BODY, OTHER = (random.Random(seed).randbytes(SIZE) for seed in (1, 2))
CUT = 9 * MIB // 4
NAME = "stories.tar.gz"


def sends(body=BODY, upto=None, ranges=True, announced=SIZE, **version):
    """A server's answer: what is asked of `body`, up to its byte `upto`, where the connection is dropped."""
    version = version or {"ETag": '"one"'}

    def answer(request):
        asked = request.headers.get("Range") if ranges and request.headers.get("If-Range") in version.values() else None
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if asked and start >= len(body):
            return request.begin(416, {"Content-Range": f"bytes */{len(body)}"})
        request.begin(206 if asked else 200, {"Content-Length": announced - start} | version)
        middle = (start + len(body)) // 2
        request.wfile.write(body[start : min(middle, upto or middle)])
        assert not request.server.target.exists()  # a file stands in its place only when it is whole
        request.wfile.write(body[middle:upto])

    return answer


def status(code: int):
    return lambda request: request.begin(code, {"Content-Length": 0})


def redirected(then, size=SIZE):
    """A redirect, as the hub gives one, that states size and checksum of the file it leads to."""

    def answer(request):
        if request.path.startswith("/real/"):
            return then(request)
        request.server.asked.pop()  # one request, told twice
        stated = {"X-Linked-Size": size, "X-Linked-ETag": f'"{hashlib.sha256(BODY).hexdigest()}"'}
        request.begin(302, {"Location": "/real" + request.path, "Content-Length": 0} | stated)

    return answer


@pytest.fixture
def server(loopback, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0,) * 4)
    loopback.url, loopback.target = f"{loopback.address}/{NAME}", tmp_path / NAME
    return loopback


DATE = {"Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
NONE = {"Server": "without a version"}
DAMAGED = BODY[:MIB] + bytes([BODY[MIB] ^ 1]) + BODY[MIB + 1 :]
# What the server does, and whether each request of ours asks to resume (a range) or starts anew.
FAULTS = {
    "nothing": ([redirected(sends())], [False]),
    "a dropped connection": ([sends(upto=CUT), sends()], [False, True]),
    "a busy server": ([status(429), status(503), lambda request: None, sends()], [False] * 4),
    "a date instead of an ETag": ([sends(upto=CUT, **DATE), sends(**DATE)], [False, True]),
    "a weak ETag beside a date": ([sends(upto=CUT, **DATE, ETag='W/"one"'), sends(**DATE)], [False, True]),
    "no version to resume by": ([sends(upto=CUT, **NONE), sends(**NONE)], [False, False]),
    "ranges that are ignored": ([sends(upto=CUT), sends(ranges=False)], [False, True]),
    "a changed file": ([sends(OTHER, upto=CUT, ETag='"old"'), sends()], [False, True]),
    "a length stated too short": ([redirected(sends(upto=MIB, announced=MIB)), redirected(sends())], [False, True]),
    "damage on the way": ([redirected(sends(DAMAGED)), redirected(sends())], [False, False]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_arrives_whole_in_spite_of(server, tmp_path, fault):
    server.answers, resumes = FAULTS[fault]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert [bool(asked) for asked in server.ranges] == resumes
    fetch(server.url, tmp_path)  # finds it
    assert len(server.asked) == len(resumes)


def test_a_later_run_resumes_what_a_failed_one_left_or_a_killed_one_had_nearly_moved(server, tmp_path):
    part = tmp_path / f"{NAME}.part"
    server.answers = [sends(upto=CUT), status(500)]
    with pytest.raises(DownloadError, match=r"500.*BLM_VALIDATION"):
        fetch(server.url, tmp_path, "BLM_VALIDATION")
    assert len(server.asked) == len(files.PAUSES)
    left = part.stat().st_size
    server.answers = [sends()]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert (server.ranges[-1], server.asked[-1]["if-range"]) == (f"bytes={left}-", '"one"')
    asked = len(server.asked)
    (tmp_path / NAME).rename(part)
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert len(server.asked) == asked  # it was whole


@pytest.mark.parametrize(
    ("answer", "why", "once"),
    [
        (status(404), "404.*BLM_ARCHIVE", True),
        (status(416), "416.*BLM_ARCHIVE", False),
        (redirected(sends(OTHER)), "sha256", False),
        (redirected(sends(), size=SIZE - 1), f"'size': {SIZE - 1}", False),
    ],
    ids=["missing", "no range", "another file", "another size"],
)
def test_a_file_that_cannot_be_had_whole_is_refused_with_the_reason(server, tmp_path, answer, why, once):
    server.answers = [answer]
    with pytest.raises(DownloadError, match=why):
        fetch(server.url, tmp_path)
    assert not (tmp_path / NAME).exists()
    assert (len(server.asked) == 1) == once


def test_a_file_of_the_same_name_from_another_address_is_downloaded_anew_and_a_query_is_no_name(server, tmp_path):
    server.answers = [lambda request: sends(OTHER if "/other/" in request.path else BODY)(request)]
    server.target = tmp_path / "never"
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert fetch(f"{server.address}/other/{NAME}?download=true", tmp_path) == tmp_path / NAME
    assert (tmp_path / NAME).read_bytes() == OTHER


def test_a_local_file_is_used_where_it_lies_and_what_is_not_there_is_named_with_the_variable_to_set(tmp_path, monkeypatch):
    (tmp_path / NAME).write_bytes(b"mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch(f"~/{NAME}", tmp_path / "data") == tmp_path / NAME
    for source in ("nowhere.tar.gz", ".", "ftp://127.0.0.1/a.tar.gz"):
        with pytest.raises(DownloadError, match=rf"{source}.*BLM_VALIDATION"):
            fetch(source, tmp_path, "BLM_VALIDATION")
