"""What many tests share: the smoke preset, prepared once, and a model small enough to build in each test."""

import os

import pytest

from blm_core import config, pipeline
from blm_core.config import ModelConfig, Preset
from blm_core.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Preset:
    """The preset `smoke` with its stories, vocabulary and tokens made below a folder of this test session."""
    for name in ("BLM_PRESET", "BLM_OVERRIDES", "BLM_ARCHIVE", "BLM_VALIDATION"):
        os.environ.pop(name, None)
    os.environ["BLM_BUILD"] = str(tmp_path_factory.mktemp("build"))
    preset = config.load("smoke")
    pipeline.tokens(preset)
    return preset


@pytest.fixture(scope="session")
def tokenizer(smoke) -> Tokenizer:
    return pipeline.tokenizer(smoke)


@pytest.fixture
def tiny() -> ModelConfig:
    return ModelConfig(vocab_size=300, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=32)
