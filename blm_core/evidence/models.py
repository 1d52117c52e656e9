"""Models under comparison, behind one small interface: bits of stories, and completions of prompts.

- `BLM`: a model folder of this project; `TransformersModel`: any causal model of transformers, GPT2-XL first.
- Every text stands behind the model's start token. Both kinds of model draw tokens through `generate.next_tokens`, so that
  a sample depends on the seed, its number and its prompt alone.
- What a model has scored or written goes into JSON-lines files that are `continued` after a break (`record`, `score_stories`).

transformers is imported only when such a model is loaded.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import torch
from tqdm import tqdm

from blm_core import __version__, evaluate, generate
from blm_core.checkpoint import load_model
from blm_core.config import Preset
from blm_core.files import read_json, read_json_lines, sha256, text_sha256
from blm_core.generate import Sampling, next_tokens, sample_numbers, uniforms
from blm_core.hardware import find_device

GPT2_XL = {"n_embd": 1600, "n_layer": 48, "n_head": 25}  # the rest of GPT-2's configuration is transformers' default
GPT2_XL_PARAMETERS = 1_557_611_200  # counted on that configuration, the tied embedding once
LONGEST_CONTEXT = 2048  # tokens: stories are shorter, and a batch of logits has to fit into memory
PROMPTS = Path(__file__).with_name("prompts.json")
# GPT2-XL on TinyStories text: lower-cased and joined (ex7remum/TinyStoriesLM), and the mean perplexity of 500 single stories in
# their own case (kkorolev1/deep-learning-2), which bounds their bits from above, by Jensen's inequality.
PUBLISHED = {"perplexity": 5.2897, "tokens": 123_110, "characters": 500_000, "mean_perplexity": 6.7053}


class UnavailableError(RuntimeError):
    """Something the comparison needs is not there; the message says how to get it."""


class ComparedModel:
    """A model that scores and completes, in float32. `revision` names its weights.

    Each kind has `encode`, the tokens of a text behind the start token, `logits_of`, logits (B, T, V) of tokens (B, T), and
    `complete_batch`, what is written behind each prompt. It raises ValueError for a prompt that leaves no room in the context.
    """

    name: str
    revision: str
    device: torch.device
    seq_len: int
    batch_size = 16  # completions at a time
    batch_tokens = 8192  # scored at a time

    def settings(self) -> dict:
        return {"model": self.name, "revision": self.revision}

    def story_bits(self, stories: list[str]) -> np.ndarray:
        """Bits of each story behind the start token, each scored alone, as `evaluate.story_bits` counts them (n,)."""
        encoded = [np.array(self.encode(story)) for story in stories]
        return evaluate.story_bits(self.logits_of, encoded, self.seq_len, self.device, self.batch_tokens)

    def complete(self, prompts: list[str], sampling: Sampling, numbers: list[int] | None = None) -> list[str]:
        """One completion of each prompt; `numbers` says which sample of its prompt each is (default: in the order given)."""
        numbers, done = numbers or sample_numbers(prompts), []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            done += self.complete_batch(prompts[part], sampling, numbers[part])
        return done


class BLM(ComparedModel):
    """A model of this project."""

    name = "BLM"

    def __init__(self, folder: str | Path, device: str = "auto"):
        """Load the model in `folder`. Raises CheckpointError."""
        self.model, self.tokenizer = load_model(Path(folder), find_device(device))
        self.device, self.seq_len = self.model.device, self.model.config.seq_len
        self.revision = sha256(Path(folder) / "model.safetensors")[:16]

    def encode(self, text: str) -> list[int]:
        return [self.tokenizer.eot, *self.tokenizer.encode(text)]

    def logits_of(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)

    def complete_batch(self, prompts: list[str], sampling: Sampling, numbers: list[int]) -> list[str]:
        return generate.complete(self.model, self.tokenizer, prompts, sampling, numbers)


class TransformersModel(ComparedModel):
    """A causal model loaded through transformers, with its own tokenizer."""

    batch_tokens = 2048  # a vocabulary of 50,257 makes logits of 0.4 GB from them

    def __init__(self, name: str, device: str = "auto"):
        """Load `name`, a hub name or a local folder. Raises UnavailableError."""
        folder = Path(name).expanduser()
        local = folder.is_dir()
        source, where = folder if local else name, {"local_files_only": local or not _hub_answers()}
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

            self.tokenizer = AutoTokenizer.from_pretrained(source, clean_up_tokenization_spaces=False, **where)
            self.model = AutoModelForCausalLM.from_pretrained(source, **where).eval()
        except (ImportError, OSError, ValueError) as error:
            raise UnavailableError(
                f"{name} cannot be loaded ({str(error).splitlines()[0]}). It needs the package transformers and either "
                "a connection to the hub or BLM_GPT2XL set to a folder with the model."
            ) from error
        self.name = folder.resolve().name if local else name
        self.device = find_device(device)
        self.model.to(self.device, torch.float32)
        self.model.generation_config = GenerationConfig()  # its own settings of sampling are not used
        weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        self.revision = text_sha256("".join(map(sha256, weights)))[:16] if local else self.model.config._commit_hash
        self.end = self.tokenizer.eos_token_id
        self.start = self.end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        self.seq_len = min(self.model.config.max_position_embeddings, LONGEST_CONTEXT)

    def encode(self, text: str) -> list[int]:
        return [self.start, *self.tokenizer.encode(text, add_special_tokens=False, verbose=False)]

    def logits_of(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits

    def complete_batch(self, prompts: list[str], sampling: Sampling, numbers: list[int]) -> list[str]:
        """Prompts stand to the right of a masked padding; the longest of a batch leaves the room that all have."""
        encoded = [self.encode(prompt) for prompt in prompts]
        longest = max(map(len, encoded))
        room = self.seq_len - longest
        if room < 1:
            raise ValueError(f"a prompt of {longest} tokens leaves no room in the context of {self.name}, {self.seq_len}.")
        padding = [longest - len(tokens) for tokens in encoded]
        inputs = torch.tensor([[self.end] * n + tokens for n, tokens in zip(padding, encoded, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        uniform = uniforms(encoded, numbers, sampling.seed, room).to(self.device)

        def only_the_drawn(seen: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            chosen = next_tokens(logits, sampling, uniform[:, seen.shape[1] - longest])
            return torch.full_like(logits, -math.inf).scatter(1, chosen[:, None], 0.0)

        written = self.model.generate(
            inputs.to(self.device),
            attention_mask=mask.to(self.device),
            logits_processor=[only_the_drawn],
            max_new_tokens=min(sampling.max_tokens or room, room),
            do_sample=False,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        rows = [[*row, self.end] for row in written[:, longest:].tolist()]
        return [self.tokenizer.decode(row[: row.index(self.end)]) for row in rows]


def load(name: str | Path, device: str = "auto") -> ComparedModel:
    """A model of this project in the folder `name`, else what transformers loads under that name. Raises as those two do."""
    ours = (Path(name) / "tokenizer.model").is_file()
    return BLM(name, device) if ours else TransformersModel(str(name), device)


def opponent(preset: Preset) -> TransformersModel:
    """The model to compare with: `BLM_GPT2XL`, or what the preset names. Raises UnavailableError."""
    name = os.environ.get("BLM_GPT2XL") or preset.opponent
    if not name:
        raise UnavailableError(f"The preset {preset.name} loads no foreign weights. Set BLM_GPT2XL to a folder or a hub name.")
    return TransformersModel(name)


def random_gpt2(architecture: dict, device: str | torch.device = "cpu") -> torch.nn.Module:
    """GPT-2 with random weights, such as `random_gpt2(GPT2_XL)`: as large and as fast as the real one, and it knows nothing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**architecture)).eval().to(device)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = [name for name in ("torch", "numpy", "sentencepiece", "transformers") if name in sys.modules]
    return {"blm_core": __version__, "python": sys.version.split()[0], **{name: version(name) for name in packages}}


def _hub_answers() -> bool:
    """Whether it is worth to ask the hub: transformers tries for a minute before it gives up."""
    try:
        requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)
        return True
    except requests.RequestException:
        return False


# ---- Prompts, and results in JSON-lines files


class Prompt(NamedTuple):
    """A beginning, its name, and what kind of beginning it is."""

    id: str
    group: str
    prompt: str


def read_prompts(source: str = "own") -> list[Prompt]:
    """The prompts of this project, or those of a JSON file like ours. Raises ValueError for any other file."""
    path = PROMPTS if source == "own" else Path(source)
    try:
        return [Prompt(each["id"], each["group"], each["prompt"]) for each in read_json(path)]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no JSON list of prompts, each with id, group and prompt.") from error


def record(model: ComparedModel, prompts: list[Prompt], out: Path, sampling: Sampling, samples: int = 3) -> list[dict]:
    """Completions of all prompts, `samples` times, one line of `out` each. Raises as `continued` and `complete`."""
    wanted = [prompt._asdict() | {"sample": number} for number in range(samples) for prompt in prompts]

    def make(part: slice) -> list[dict]:
        prompts, numbers = ([line[name] for line in wanted[part]] for name in ("prompt", "sample"))
        texts = model.complete(prompts, sampling, numbers)
        return [{"completion": text, "versions": versions()} for text in texts]

    return continued(out, wanted, {**model.settings(), "sampling": asdict(sampling)}, make, model.batch_size)


def score_stories(model: ComparedModel, stories: list[str], out: Path) -> np.ndarray:
    """Bits of each story, one line of `out` each, which holds hashes and no text. Raises as `continued`."""
    wanted = [{"story": text_sha256(story)[:16], "bytes": len(story.encode())} for story in stories]

    def make(part: slice) -> list[dict]:
        return [{"bits": bits} for bits in model.story_bits(stories[part]).tolist()]

    return np.array([line["bits"] for line in continued(out, wanted, model.settings(), make, at_once=100)])


def continued(out: Path, wanted: list[dict], settings: dict, make: Callable[[slice], list[dict]], at_once: int) -> list[dict]:
    """The lines that `wanted` asks for, in that order: `out` has the first of them, `make` adds the others part by part.

    Half a line, which a break left, is cut off first. Raises ValueError where `out` holds other lines or other `settings`.
    """
    lines = []
    if out.is_file():
        os.truncate(out, out.read_bytes().rfind(b"\n") + 1)
        lines = list(read_json_lines(out))
    for line, asked in zip(lines, wanted, strict=False):
        for name, value in (asked | settings).items():
            if (old := line.get(name)) != value:
                raise ValueError(f"{out} was recorded with {name} = {old!r}, now it is {value!r}. Name another file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(len(lines), len(wanted), at_once), desc=out.name):
        part = slice(start, start + at_once)
        new = [asked | made | settings for asked, made in zip(wanted[part], make(part), strict=True)]
        with open(out, "a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in new)
        lines += new
    return lines[: len(wanted)]
