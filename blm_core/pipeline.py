"""The steps of the chain for one preset, each finding what the step before it left in the preset's folder.

build/<preset>/data       stories, split          01_data
build/<preset>/tokenizer  the vocabulary          02_tokenizer
build/<preset>/tokens     encoded stories         02_tokenizer
build/<preset>/teachers   runs of its teachers    04_train, where the preset has some
build/<preset>/run        the training run        04_train
"""

import contextlib
import fcntl
import os

from blm_core import data, train
from blm_core import tokens as shards
from blm_core.config import ConfigError, Preset
from blm_core.tokenizer import Tokenizer


@contextlib.contextmanager
def _alone(preset: Preset):
    """One process prepares at a time; the others, of `torchrun` or of a second notebook, wait and find its work."""
    preset.folder.mkdir(parents=True, exist_ok=True)
    with open(preset.folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stories(preset: Preset) -> dict:
    """Clean and split the archive; its manifest."""
    with _alone(preset):
        return data.prepare(preset.data, preset.folder / "data")


def tokenizer(preset: Preset) -> Tokenizer:
    """The vocabulary, after `stories`."""
    stories(preset)
    with _alone(preset):
        return shards.prepare_tokenizer(preset.tokenizer, preset.folder / "data", preset.folder / "tokenizer")


def tokens(preset: Preset) -> dict:
    """Encoded stories, after `tokenizer`; their manifest."""
    vocabulary, share = tokenizer(preset), preset.tokenizer.blank_line_share
    with _alone(preset):
        return shards.encode_splits(preset.folder / "data", vocabulary, preset.folder / "tokens", share)


def run(preset: Preset) -> dict:
    """The training run, after `tokens` and those of its teachers; its summary.

    Raises ConfigError where several processes share a preset with teachers: they would need one group of processes a run.
    """
    if preset.teachers and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(f"the preset {preset.name} has teachers, which one process trains: start it without torchrun.")
    tokens(preset)
    encoded, vocabulary = preset.folder / "tokens", tokenizer(preset)
    teachers = [preset.folder / "teachers" / str(number) for number in range(len(preset.teachers))]
    for number, folder in enumerate(teachers):
        train.train(preset.teacher(number), encoded, vocabulary, folder)
    return train.train(preset, encoded, vocabulary, preset.folder / "run", teachers=teachers)
