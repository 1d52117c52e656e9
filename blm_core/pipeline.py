"""The steps of the chain for one preset, each finding what the step before it left in the preset's folder.

build/<preset>/data       stories, split          01_data
build/<preset>/tokenizer  the vocabulary          02_tokenizer
build/<preset>/tokens     encoded stories         02_tokenizer
build/<preset>/run        the training run        04_train
"""

from blm_core import data, shards, train
from blm_core.config import Preset
from blm_core.tokenizer import Tokenizer


def stories(preset: Preset) -> dict:
    """Clean and split the archive; its manifest."""
    return data.prepare(preset.data, preset.folder / "data")


def tokenizer(preset: Preset) -> Tokenizer:
    """The vocabulary, after `stories`."""
    manifest = stories(preset)
    return shards.prepare_tokenizer(
        preset.tokenizer, preset.folder / "data", preset.folder / "tokenizer", manifest["split_hash"]
    )


def tokens(preset: Preset) -> dict:
    """Encoded stories, after `tokenizer`; their manifest."""
    return shards.encode_splits(
        preset.folder / "data", tokenizer(preset), preset.folder / "tokens", preset.tokenizer.blank_line_share
    )


def run(preset: Preset) -> dict:
    """The training run, after `tokens`; its summary."""
    tokens(preset)
    return train.train(preset, preset.folder / "tokens", tokenizer(preset), preset.folder / "run")
