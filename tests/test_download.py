"""Downloads against a real server on the loopback interface, which misbehaves as each test says."""

import contextlib
import hashlib
import itertools
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from blm_core import files as download
from blm_core.files import ArchiveError, DownloadError, fetch, unpack

MIB = 1 << 20
BODY = random.Random(1).randbytes(5 * MIB // 2)
OTHER = random.Random(2).randbytes(5 * MIB // 2)
SHA = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append({"path": self.path, "at": time.monotonic(), **{k.lower(): v for k, v in self.headers.items()}})
        self.server.look()
        answers = self.server.answers
        with contextlib.suppress(ConnectionError):
            answers[min(len(self.server.asked), len(answers)) - 1](self)

    def begin(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """Gives its `answers` one per request, the last one again and again, and remembers what it was `asked`."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.answers, self.asked, self.targets, self.parts = folder, [], [], [], []
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.address}/stories.tar.gz"

    def look(self) -> None:
        """Note what lies in the client's folder while it waits for us."""
        part = self.folder / "stories.tar.gz.part"
        self.targets.append((self.folder / "stories.tar.gz").exists())
        self.parts.append(part.stat().st_size if part.exists() else 0)

    @property
    def ranges(self) -> list:
        return [asked.get("range") for asked in self.asked]


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
        request.begin(206 if span else 200, length | part | {k.replace("_", "-"): v for k, v in headers.items()})
        middle = (start + len(body)) // 2
        request.wfile.write(body[start:middle])
        request.server.look()
        request.wfile.write(body[middle:])

    return answer


def cut(at: int, body=BODY, stated=None, etag='"one"', reset=False, **headers):
    """Announce the whole body (or `stated` bytes), send it up to `at` and drop the connection."""

    def answer(request):
        stated_headers = {"Content-Length": stated or len(body), "ETag": etag}
        request.begin(200, stated_headers | {k.replace("_", "-"): v for k, v in headers.items()})
        request.wfile.write(body[:at])
        if reset:
            time.sleep(0.2)  # let the client read what was sent; a reset discards what it has not
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()

    return answer


def status(code: int, **headers):
    return lambda request: request.begin(code, {k.replace("_", "-"): v for k, v in headers.items()} | {"Content-Length": 0})


def redirected(then, **headers):
    """A redirect, as the hub gives one, that states size and checksum of the file it leads to."""

    def answer(request):
        if request.path.startswith("/real/"):
            return then(request)
        request.server.asked.pop()  # one request, told twice
        request.begin(302, {"Location": "/real" + request.path, "Content-Length": 0} | headers)

    return answer


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def nothing_but(folder, *names) -> bool:
    return {path.name for path in folder.iterdir()} == set(names)


def test_a_file_arrives_whole_and_stands_in_its_place_only_then(server, tmp_path):
    server.answers = [whole()]
    path = fetch(server.url, tmp_path)
    assert path == tmp_path / "stories.tar.gz"
    assert path.read_bytes() == BODY
    assert server.targets == [False, False]  # asked for, and half of it sent
    assert nothing_but(tmp_path, "stories.tar.gz", "stories.tar.gz.source")


def test_a_second_fetch_makes_no_request(server, tmp_path):
    server.answers = [whole()]
    assert fetch(server.url, tmp_path) == fetch(server.url, tmp_path)
    assert len(server.asked) == 1


def test_a_file_of_the_same_name_from_another_address_is_downloaded_anew(server, tmp_path):
    server.answers = [lambda request: whole(OTHER if "/other/" in request.path else BODY)(request)]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert fetch(f"{server.address}/other/stories.tar.gz", tmp_path).read_bytes() == OTHER
    assert fetch(server.url, tmp_path).read_bytes() == BODY


def test_a_query_is_not_part_of_the_file_name(server, tmp_path):
    server.answers = [whole()]
    assert fetch(server.url + "?download=true", tmp_path).name == "stories.tar.gz"


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_broken_download_is_resumed_where_it_ended(server, tmp_path, reset):
    server.answers = [cut(9 * MIB // 4, reset=reset), whole()]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.parts[1] >= MIB
    assert server.ranges == [None, f"bytes={server.parts[1]}-"]
    assert server.asked[1]["if-range"] == '"one"'
    assert not any(server.targets)


def test_a_later_run_resumes_what_an_earlier_one_left(server, tmp_path):
    server.answers = [cut(9 * MIB // 4), status(500)]
    with pytest.raises(DownloadError):
        fetch(server.url, tmp_path)
    left = (tmp_path / "stories.tar.gz.part").read_bytes()
    assert left
    assert BODY.startswith(left)
    server.answers = [whole()]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.ranges[-1] == f"bytes={len(left)}-"


def test_a_server_without_an_etag_is_asked_to_resume_by_date(server, tmp_path):
    date = "Wed, 01 Jan 2025 00:00:00 GMT"
    dated = whole(if_range=False, etag="", Last_Modified=date)  # an empty ETag is as good as none
    server.answers = [cut(9 * MIB // 4, etag='W/"weak"', Last_Modified=date), dated]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.asked[1]["if-range"] == date


def test_a_file_without_a_version_is_never_joined_from_two_downloads(server, tmp_path):
    server.answers = [cut(9 * MIB // 4, body=OTHER, etag='W/"weak"'), whole(if_range=False)]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.ranges == [None, None]


def test_a_server_that_ignores_ranges_sends_the_file_again_from_the_start(server, tmp_path):
    server.answers = [cut(9 * MIB // 4), whole(ranges=False)]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.ranges[1]


@pytest.mark.parametrize("if_range", [True, False], ids=["heeds If-Range", "ignores If-Range"])
def test_a_file_that_changed_between_attempts_is_not_joined_to_the_old_one(server, tmp_path, if_range):
    server.answers = [cut(9 * MIB // 4), whole(OTHER, etag='"two"', if_range=if_range)]
    assert fetch(server.url, tmp_path).read_bytes() == OTHER


def test_a_part_that_starts_elsewhere_than_asked_is_not_joined(server, tmp_path):
    def elsewhere(request):
        request.begin(206, {"ETag": '"one"', "Content-Range": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"})
        request.wfile.write(BODY)

    server.answers = [cut(9 * MIB // 4), elsewhere, whole()]
    assert fetch(server.url, tmp_path).read_bytes() == BODY


def test_a_length_that_is_stated_too_long_is_never_taken_for_the_whole(server, tmp_path):
    server.answers = [cut(len(BODY), stated=len(BODY) + 1000)]
    with pytest.raises(DownloadError, match="BLM_ARCHIVE"):
        fetch(server.url, tmp_path)
    assert not any(server.targets)
    assert not (tmp_path / "stories.tar.gz").exists()


def test_a_length_that_is_stated_too_short_once_is_made_up_for_by_another_request(server, tmp_path):
    short = redirected(cut(len(BODY), stated=MIB), **{"x-linked-size": len(BODY)})
    server.answers = [short, redirected(whole(), **{"x-linked-size": len(BODY)})]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.ranges == [None, f"bytes={MIB}-"]


def test_a_length_that_is_always_stated_too_short_is_refused(server, tmp_path):
    server.answers = [redirected(cut(len(BODY), stated=MIB), **{"x-linked-size": len(BODY)})]
    with pytest.raises(DownloadError, match=f"{MIB} of {len(BODY)} bytes arrived"):
        fetch(server.url, tmp_path)
    assert not (tmp_path / "stories.tar.gz").exists()


def test_an_archive_cut_short_by_a_server_that_states_nothing_else_is_not_unpacked(server, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data00.json").write_text(json.dumps([OTHER.hex()]))
    packed = download.pack_sample(tmp_path / "in", tmp_path / "packed.tar.gz").read_bytes()
    server.answers = [cut(len(packed), body=packed, stated=len(packed) // 2)]
    with pytest.raises(ArchiveError):
        unpack(fetch(server.url, tmp_path), tmp_path / "shards")


@pytest.mark.parametrize("code", [403, 404])
@pytest.mark.parametrize("variable", ["BLM_ARCHIVE", "BLM_VALIDATION"])
def test_a_file_that_is_not_there_is_reported_at_once_with_the_variable_to_set(server, tmp_path, code, variable):
    server.answers = [status(code)]
    with pytest.raises(DownloadError, match=f"{code}.*{variable}"):
        fetch(server.url, tmp_path, variable)
    assert len(server.asked) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, tmp_path, code):
    server.answers = [status(code), status(code, Retry_After="Wed, 01 Jan 2025 00:00:00 GMT"), whole()]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert len(server.asked) == 3


def test_a_server_is_given_the_time_that_it_asks_for(server, tmp_path):
    server.answers = [status(429, Retry_After=1), whole()]
    fetch(server.url, tmp_path)
    assert server.asked[1]["at"] - server.asked[0]["at"] >= 1


def test_each_pause_between_attempts_is_twice_the_last(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.1)
    server.answers = [status(500), status(500), status(500), whole()]
    fetch(server.url, tmp_path)
    times = [asked["at"] for asked in server.asked]
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert all(pause >= wanted for pause, wanted in zip(pauses, [0.1, 0.2, 0.4], strict=True))


def test_a_server_that_always_fails_is_given_up_and_what_arrived_is_kept(server, tmp_path):
    server.answers = [cut(9 * MIB // 4), status(500)]
    with pytest.raises(DownloadError, match=r"HTTP status 500.*BLM_VALIDATION"):
        fetch(server.url, tmp_path, "BLM_VALIDATION")
    assert len(server.asked) == download.ATTEMPTS
    assert nothing_but(tmp_path, "stories.tar.gz.part", "stories.tar.gz.part.json")


def test_a_file_with_the_checksum_that_a_redirect_states_is_accepted(server, tmp_path):
    server.answers = [redirected(whole(), **{"x-linked-etag": f'"{SHA}"', "x-linked-size": len(BODY)})]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("stated", "why"),
    [({"x-linked-etag": f'"{SHA}"'}, "sha256"), ({"x-linked-size": len(BODY) - 1}, f"of {len(BODY) - 1} bytes")],
)
def test_a_file_other_than_the_redirect_states_never_appears(server, tmp_path, stated, why):
    server.answers = [redirected(whole(OTHER), **stated)]
    with pytest.raises(DownloadError, match=why):
        fetch(server.url, tmp_path)
    assert not any(server.targets)
    assert not list(tmp_path.glob("stories.tar.gz"))


def test_a_file_that_was_damaged_on_the_way_is_downloaded_again(server, tmp_path):
    damaged = BODY[:MIB] + b"?" + BODY[MIB + 1 :]
    assert damaged != BODY
    answers = [whole(damaged), whole()]
    server.answers = [redirected(answer, **{"x-linked-etag": f'"{SHA}"'}) for answer in answers]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.ranges == [None, None]


def test_a_resumed_file_is_checked_against_the_checksum_as_a_whole(server, tmp_path):
    stated = {"x-linked-etag": f'"{SHA}"', "x-linked-size": len(BODY)}
    joined = [cut(9 * MIB // 4, body=OTHER), whole(), whole()]  # the same ETag for two files
    server.answers = [redirected(answer, **stated) for answer in joined]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert len(server.asked) == 3


def test_a_complete_part_is_accepted_when_the_server_has_nothing_to_add(server, tmp_path):
    body = BODY[: 2 * MIB]
    server.answers = [cut(len(body), body=body, stated=len(body) + 9, x_linked_size=len(body)), whole(body)]
    assert fetch(server.url, tmp_path).read_bytes() == body
    assert server.ranges == [None, f"bytes={len(body)}-"]


def test_a_part_longer_than_the_servers_new_file_is_thrown_away(server, tmp_path):
    server.answers = [cut(9 * MIB // 4), whole(OTHER[:MIB], etag='"two"', if_range=False)]
    assert fetch(server.url, tmp_path).read_bytes() == OTHER[:MIB]
    assert server.ranges[-1] is None


def test_a_server_that_refuses_even_the_whole_file_as_a_range_is_given_up(server, tmp_path):
    server.answers = [status(416)]
    with pytest.raises(DownloadError, match="BLM_ARCHIVE"):
        fetch(server.url, tmp_path)


def test_a_part_that_nobody_asked_for_is_not_taken_for_the_whole(server, tmp_path):
    def part(request):
        request.begin(206, {"ETag": '"one"', "Content-Length": MIB, "Content-Range": f"bytes 0-{MIB - 1}/{len(BODY)}"})
        request.wfile.write(BODY[:MIB])

    server.answers = [part, whole()]
    assert fetch(server.url, tmp_path).read_bytes() == BODY


def test_redirects_without_end_are_reported_with_the_variable_to_set(server, tmp_path):
    server.answers = [status(302, Location="/stories.tar.gz")]
    with pytest.raises(DownloadError, match="BLM_ARCHIVE"):
        fetch(server.url, tmp_path)


def test_a_server_that_does_not_listen_is_reported_with_the_variable_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match="BLM_ARCHIVE"):
        fetch(f"http://127.0.0.1:{port}/stories.tar.gz", tmp_path / "data")
    assert nothing_but(tmp_path / "data")


def test_a_server_that_hangs_up_before_answering_is_asked_again(server, tmp_path):
    server.answers = [lambda request: None, whole()]
    assert fetch(server.url, tmp_path).read_bytes() == BODY


def test_a_local_file_is_used_where_it_lies(tmp_path, monkeypatch):
    (tmp_path / "mine.tar.gz").write_bytes(b"mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch(str(tmp_path / "mine.tar.gz"), tmp_path / "data") == tmp_path / "mine.tar.gz"
    assert fetch("~/mine.tar.gz", tmp_path / "data") == tmp_path / "mine.tar.gz"
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("variable", ["BLM_ARCHIVE", "BLM_VALIDATION"])
@pytest.mark.parametrize("source", ["nowhere.tar.gz", ".", "ftp://127.0.0.1/stories.tar.gz"])
def test_what_is_neither_a_file_nor_an_address_is_reported_with_the_variable_to_set(tmp_path, source, variable):
    with pytest.raises(DownloadError, match=rf"{source}.*{variable}"):
        fetch(source, tmp_path, variable)


def test_a_quota_that_is_used_up_is_reported_and_the_download_goes_on_when_it_is_lifted(server, tmp_path):
    server.answers = [whole()]
    limited = (
        "import resource, signal, sys; from blm_core.files import fetch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({MIB}, {MIB}))\n"
        "fetch(sys.argv[1], sys.argv[2])\n"
    )
    run = subprocess.run([sys.executable, "-c", limited, server.url, tmp_path], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("blm_core.download.DownloadError")
    assert "cannot be written: File too large" in run.stderr
    assert len(server.asked) == 1  # asking again would not make room
    assert nothing_but(tmp_path, "stories.tar.gz.part", "stories.tar.gz.part.json")
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.ranges[-1] == f"bytes={MIB}-"


def test_a_full_disk_is_reported_each_time_and_the_download_goes_on_when_there_is_room(server, small_disk):
    server.answers = [whole()]
    for _ in range(2):  # the second run finds no room even for its first byte
        with pytest.raises(DownloadError, match="cannot be written: No space left on device"):
            fetch(server.url, small_disk)
        assert not list(small_disk.glob("stories.tar.gz"))
    assert len(server.asked) == 2
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert fetch(server.url, small_disk).read_bytes() == BODY
    assert server.ranges[-1] is not None
