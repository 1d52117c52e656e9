"""What many tests share: the smoke preset, prepared once, and a model small enough to build in each test."""

import contextlib
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from blm_core import config, pipeline
from blm_core.config import ModelConfig, Preset
from blm_core.tokenizer import Tokenizer


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory):
    """No test sees the caller's settings, and none writes outside this session's folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("BLM_")]:
            patch.delenv(name)
        patch.setenv("BLM_BUILD", str(tmp_path_factory.mktemp("build")))
        yield


@pytest.fixture(scope="session")
def smoke(own_environment) -> Preset:
    """The preset `smoke` with its stories, vocabulary and tokens made."""
    preset = config.load("smoke")
    pipeline.tokens(preset)
    return preset


@pytest.fixture(scope="session")
def tokenizer(smoke) -> Tokenizer:
    return pipeline.tokenizer(smoke)


@pytest.fixture
def tiny() -> ModelConfig:
    return ModelConfig(vocab_size=300, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=32)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command to make a small disk with")
    if mounted.returncode:
        pytest.skip(f"a small disk may not be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append({"path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
        answers = self.server.answers
        with contextlib.suppress(ConnectionError):
            answers[min(len(self.server.asked), len(answers)) - 1](self)

    do_POST = do_GET

    def begin(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """Gives its `answers` one per request, the last one again and again, and remembers what it was `asked`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = [], []
        self.address = f"http://127.0.0.1:{self.server_port}"

    @property
    def ranges(self) -> list:
        return [asked.get("range") for asked in self.asked]


@pytest.fixture
def loopback(monkeypatch):
    """A real server on the loopback interface that answers as a test tells it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
