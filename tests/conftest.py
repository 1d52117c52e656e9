"""What many tests share: the smoke preset, prepared once, and a model small enough to build in each test."""

import os
import subprocess

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
