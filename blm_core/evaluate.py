"""Bits per byte of any text under a model."""

from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from blm_core.bootstrap import ratio_interval
from blm_core.hardware import precision
from blm_core.model import LanguageModel
from blm_core.scoring import story_bits
from blm_core.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """What a model needs for a set of stories, each scored alone; the interval is a 95 % bootstrap over stories."""

    stories: int
    bytes: int
    tokens: int
    bits_per_byte: float
    low: float
    high: float

    def as_dict(self) -> dict:
        return asdict(self)


def score(
    model: LanguageModel, tokenizer: Tokenizer, stories: list[str], dtype: str = "float32"
) -> tuple[Score, np.ndarray, np.ndarray]:
    """The score of `stories`, and bits and bytes of each.

    Every byte of the text counts, and nothing else: the end-of-text symbol is neither scored nor counted.
    Raises ValueError where there is no story.
    """
    if not any(stories):
        raise ValueError("there is no story to score: the text is empty.")
    encoded = [np.array([tokenizer.eot, *tokenizer.encode(story)]) for story in stories]
    sizes = np.array([len(story.encode()) for story in stories])
    bits = np.zeros(len(stories))
    with precision(model.device, dtype):
        for start in tqdm(range(0, len(stories), 100), desc="scoring", unit="x100 stories"):
            part = slice(start, start + 100)
            bits[part] = story_bits(model, encoded[part], model.config.seq_len, model.device)
    value, low, high = ratio_interval(bits, sizes)
    tokens = sum(len(story) - 1 for story in encoded)
    return Score(len(stories), int(sizes.sum()), tokens, value, low, high), bits, sizes
