"""The other side of the comparison: GPT2-XL and any causal model of transformers, and recorded completions.

transformers is imported here and nowhere else, and only when such a model is loaded.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from blm_core.config import Preset
from blm_core.scoring import story_bits


class UnavailableError(RuntimeError):
    """Something the comparison needs is not there; the message says how to get it."""


class TransformersModel:
    """A causal model loaded through transformers, with its own tokenizer."""

    def __init__(self, name: str, device: str = "auto", dtype: torch.dtype = torch.float32):
        """Load `name`, a hub name or a local folder. Raises UnavailableError."""
        self.name = name
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(self.name)
            self.model = AutoModelForCausalLM.from_pretrained(self.name, torch_dtype=dtype).eval()
        except (ImportError, OSError, ValueError) as error:
            raise UnavailableError(
                f"{self.name} cannot be loaded ({str(error).splitlines()[0]}). It needs the package transformers and either "
                "a connection to the hub or BLM_GPT2XL set to a folder with the model."
            ) from error
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.model.to(self.device)
        self.start = self.tokenizer.bos_token_id
        self.seq_len = int(getattr(self.model.config, "max_position_embeddings", 1024))

    def story_bits(self, stories: list[str]) -> np.ndarray:
        """Bits of each story behind the start token, as `scoring.story_bits` counts them."""
        bits = np.zeros(len(stories))
        for start in tqdm(range(0, len(stories), 20), desc=f"scoring with {self.name}", unit="x20 stories"):
            part = slice(start, start + 20)
            encoded = [np.array([self.start, *self.tokenizer.encode(story)]) for story in stories[part]]
            bits[part] = story_bits(lambda tokens: self.model(tokens).logits, encoded, self.seq_len, self.device)
        return bits

    def complete(self, prompts: list[str], max_tokens: int, temperature: float, top_p: float, seed: int) -> list[str]:
        """One sampled completion of each prompt, up to its end-of-text symbol."""
        torch.manual_seed(seed)
        completions = []
        for prompt in tqdm(prompts, desc=f"completing with {self.name}", unit="prompt"):
            tokens = torch.tensor([self.tokenizer.encode(prompt)], device=self.device)
            with torch.no_grad():
                out = self.model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=min(max_tokens, self.seq_len - tokens.shape[1]),
                    do_sample=True,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=0,
                    pad_token_id=self.tokenizer.eos_token_id,
                )
            completions.append(self.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True))
        return completions


def opponent(preset: Preset) -> TransformersModel:
    """The model to compare with: `BLM_GPT2XL`, or what the preset names. Raises UnavailableError."""
    name = os.environ.get("BLM_GPT2XL") or preset.opponent
    if not name:
        raise UnavailableError(f"The preset {preset.name} loads no foreign weights. Set BLM_GPT2XL to a folder or a hub name.")
    return TransformersModel(name)


def recorded(path: str | Path = "") -> list[dict]:
    """Completions recorded as JSON lines with `prompt` and `completion` (default: the file `BLM_RECORDED`).

    Records without both, such as whole texts, are left out. Raises UnavailableError, or ValueError naming a broken line.
    """
    path = str(path) or os.environ.get("BLM_RECORDED", "")
    if not Path(path).is_file():
        raise UnavailableError(
            f"no recorded completions ({path or 'BLM_RECORDED is not set'}). Set BLM_RECORDED to a JSON-lines file with "
            "`prompt` and `completion`."
        )
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not valid JSON ({error}); was the file cut off?") from error
        if record.get("prompt") and record.get("completion"):
            records.append(record)
    return records
