"""Downloads against a real server on the loopback interface, which misbehaves as each test says."""

import hashlib
import itertools
import random
import socket
import struct
import time

import pytest

from blm_core import files
from blm_core.files import DownloadError, fetch

MIB = 1 << 20
BODY = random.Random(1).randbytes(5 * MIB // 2)
OTHER = random.Random(2).randbytes(5 * MIB // 2)
SHA = hashlib.sha256(BODY).hexdigest()
NAME = "stories.tar.gz"


def whole(body=BODY, etag='"one"', ranges=True, if_range=True, **headers):
    """A sound server's answer; it can be told to ignore Range or If-Range."""

    def answer(request):
        span = request.headers.get("Range") if ranges else None
        if span and if_range and request.headers.get("If-Range") != etag:
            span = None
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        if span and start >= len(body):
            return request.begin(416, {"Content-Range": f"bytes */{len(body)}"})
        part = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if span else {}
        length = {"Content-Length": len(body) - start, "ETag": etag}
        request.begin(206 if span else 200, length | part | headers)
        middle = (start + len(body)) // 2
        request.wfile.write(body[start:middle])
        assert not request.server.target.exists()  # a file stands in its place only when it is whole
        request.wfile.write(body[middle:])

    return answer


def cut(at: int, body=BODY, stated=None, etag='"one"', reset=False, **headers):
    """Announce the whole body (or `stated` bytes), send it up to `at` and drop the connection."""

    def answer(request):
        request.begin(200, {"Content-Length": stated or len(body), "ETag": etag} | headers)
        request.wfile.write(body[:at])
        if reset:
            time.sleep(0.2)  # let the client read what was sent; a reset discards what it has not
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()

    return answer


def status(code: int, **headers):
    return lambda request: request.begin(code, headers | {"Content-Length": 0})


def redirected(then, **headers):
    """A redirect, as the hub gives one, that states size and checksum of the file it leads to."""

    def answer(request):
        if request.path.startswith("/real/"):
            return then(request)
        request.server.asked.pop()  # one request, told twice
        request.begin(302, {"Location": "/real" + request.path, "Content-Length": 0} | headers)

    return answer


@pytest.fixture
def server(loopback, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BACKOFF", 0.001)
    loopback.url, loopback.target = f"{loopback.address}/{NAME}", tmp_path / NAME
    return loopback


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def part(first: int, end: int):
    """Bytes `first` to `end` of the file, whatever was asked for."""

    def answer(request):
        span = {"Content-Length": end - first, "Content-Range": f"bytes {first}-{end - 1}/{len(BODY)}"}
        request.begin(206, {"ETag": '"one"'} | span)
        request.wfile.write(BODY[first:end])

    return answer


CUT = 9 * MIB // 4
DATE = "Wed, 01 Jan 2025 00:00:00 GMT"
WEAK = {"etag": 'W/"weak"'}
DATED = WEAK | {"Last-Modified": DATE}
STATED = {"x-linked-etag": f'"{SHA}"', "x-linked-size": len(BODY)}
SIZE = {"x-linked-size": len(BODY)}
DAMAGED = BODY[:MIB] + bytes([BODY[MIB] ^ 1]) + BODY[MIB + 1 :]
# What the server does, and whether each request of ours asks to resume (a range) or starts anew.
FAULTS = {
    "the connection is closed": ([cut(CUT), whole()], [False, True]),
    "the connection is reset": ([cut(CUT, reset=True), whole()], [False, True]),
    "no answer at all": ([lambda request: None, whole()], [False, False]),
    "a busy server": ([status(429), status(503, **{"Retry-After": DATE}), status(500), whole()], [False] * 4),
    "a date instead of an ETag": ([cut(CUT, **DATED), whole(if_range=False, **DATED)], [False, True]),
    "no version to resume by": ([cut(CUT, body=OTHER, **WEAK), whole(if_range=False)], [False, False]),
    "ranges are ignored": ([cut(CUT), whole(ranges=False)], [False, True]),
    "the file changed": ([cut(CUT, body=OTHER, etag='"old"'), whole()], [False, True]),
    "the file changed, If-Range is ignored": (
        [cut(CUT, body=OTHER, etag='"old"'), whole(if_range=False)],
        [False, True, False],
    ),
    "another part than was asked for": ([cut(CUT), part(0, len(BODY)), whole()], [False, True, False]),
    "a part that nobody asked for": ([part(0, MIB), whole()], [False, False]),
    "a length stated too short": (
        [redirected(cut(len(BODY), stated=MIB), **SIZE), redirected(whole(), **SIZE)],
        [False, True],
    ),
    "damage on the way": ([redirected(whole(DAMAGED), **STATED), redirected(whole(), **STATED)], [False, False]),
    "two files under one ETag": (
        [redirected(answer, **STATED) for answer in (cut(CUT, body=OTHER), whole(), whole())],
        [False, True, False],
    ),
    "nothing": ([redirected(whole(), **STATED)], [False]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_arrives_whole_in_spite_of(server, tmp_path, fault):
    server.answers, resumes = FAULTS[fault]
    assert fetch(server.url, tmp_path) == tmp_path / NAME
    assert (tmp_path / NAME).read_bytes() == BODY
    assert [bool(asked) for asked in server.ranges] == resumes
    assert names(tmp_path) == {NAME, f"{NAME}.source"}
    fetch(server.url, tmp_path)  # finds it
    assert len(server.asked) == len(resumes)


def test_a_later_run_resumes_what_a_failed_one_left(server, tmp_path):
    server.answers = [cut(CUT), status(500)]
    with pytest.raises(DownloadError, match=r"HTTP status 500.*BLM_VALIDATION"):
        fetch(server.url, tmp_path, "BLM_VALIDATION")
    assert len(server.asked) == files.ATTEMPTS
    assert names(tmp_path) == {f"{NAME}.part", f"{NAME}.source"}
    left = (tmp_path / f"{NAME}.part").read_bytes()
    assert left
    assert BODY.startswith(left)
    server.answers = [whole()]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert (server.ranges[-1], server.asked[-1]["if-range"]) == (f"bytes={len(left)}-", '"one"')


def test_a_complete_part_is_not_asked_for_again(server, tmp_path):
    server.answers = [whole()]
    fetch(server.url, tmp_path).rename(tmp_path / f"{NAME}.part")  # as a kill between the two leaves it
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert len(server.asked) == 1


def test_a_part_longer_than_the_servers_new_file_is_thrown_away(server, tmp_path):
    server.answers = [cut(CUT), whole(OTHER[:MIB], etag='"two"', if_range=False)]
    assert fetch(server.url, tmp_path).read_bytes() == OTHER[:MIB]


@pytest.mark.parametrize(
    ("answer", "why", "once"),
    [
        (status(403), "403.*BLM_ARCHIVE", True),
        (status(404), "404.*BLM_ARCHIVE", True),
        (status(416), "BLM_ARCHIVE", False),
        (status(302, Location=f"/{NAME}"), "BLM_ARCHIVE", False),
        (cut(len(BODY), stated=len(BODY) + 1000), "BLM_ARCHIVE", False),
        (redirected(cut(len(BODY), stated=MIB), **SIZE), f"{MIB} of {len(BODY)} bytes arrived", False),
        (redirected(whole(OTHER), **STATED), "sha256", False),
        (redirected(whole(), **{"x-linked-size": len(BODY) - 1}), f"of {len(BODY) - 1} bytes", False),
    ],
    ids=["forbidden", "missing", "no range", "redirects", "too long", "too short", "another file", "another size"],
)
def test_a_file_that_cannot_be_had_whole_is_refused_with_the_reason(server, tmp_path, answer, why, once):
    server.answers = [answer]
    with pytest.raises(DownloadError, match=why):
        fetch(server.url, tmp_path)
    assert not (tmp_path / NAME).exists()
    assert len(server.asked) == 1 or not once


def test_a_file_of_the_same_name_from_another_address_is_downloaded_anew_and_a_query_is_no_name(server, tmp_path):
    server.answers = [lambda request: whole(OTHER if "/other/" in request.path else BODY)(request)]
    server.target = tmp_path / "never"
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert fetch(f"{server.address}/other/{NAME}?download=true", tmp_path).read_bytes() == OTHER
    assert names(tmp_path) == {NAME, f"{NAME}.source"}


def test_pauses_double_and_a_server_is_given_the_time_that_it_asks_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BACKOFF", 0.1)
    server.answers = [status(500), status(500), status(429, **{"Retry-After": 1}), whole()]
    fetch(server.url, tmp_path)
    pauses = [b["at"] - a["at"] for a, b in itertools.pairwise(server.asked)]
    assert all(pause >= wanted for pause, wanted in zip(pauses, [0.1, 0.2, 1], strict=True))


def test_a_server_that_does_not_listen_is_reported_even_where_the_address_is_too_long_for_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BACKOFF", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "http://127.0.0.1:{}/{}?signature={}".format(free.getsockname()[1], NAME, "a" * 400)
    with pytest.raises(DownloadError, match="BLM_ARCHIVE"):
        fetch(address, tmp_path / "data")
    assert names(tmp_path / "data") == set()


@pytest.mark.parametrize("source", ["{}/mine.tar.gz", "~/mine.tar.gz"])
def test_a_local_file_is_used_where_it_lies(tmp_path, monkeypatch, source):
    (tmp_path / "mine.tar.gz").write_bytes(b"mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch(source.format(tmp_path), tmp_path / "data") == tmp_path / "mine.tar.gz"
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("source", ["nowhere.tar.gz", ".", "ftp://127.0.0.1/stories.tar.gz"])
def test_what_is_neither_a_file_nor_an_address_is_reported_with_the_variable_to_set(tmp_path, source):
    with pytest.raises(DownloadError, match=rf"{source}.*BLM_VALIDATION"):
        fetch(source, tmp_path, "BLM_VALIDATION")


def test_a_quota_that_is_used_up_is_reported_and_the_download_goes_on_when_it_is_lifted(server, tmp_path, with_quota):
    server.answers = [whole()]
    run = with_quota(MIB, "from blm_core.files import fetch; fetch(*sys.argv[1:])", server.url, tmp_path)
    assert "DownloadError" in run.stderr.strip().splitlines()[-1]
    assert "cannot be written: File too large" in run.stderr
    assert len(server.asked) == 1  # asking again would not make room
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.ranges[-1] == f"bytes={MIB}-"
