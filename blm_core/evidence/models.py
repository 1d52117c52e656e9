"""Models under comparison, behind one small interface: bits of stories, log-probability of a continuation, completions.

- `BLM`: a model folder of this project; `TransformersModel`: any causal model of transformers, GPT2-XL first.
- Every text stands behind the model's start token, in scoring as in sampling. Both kinds of model draw their tokens through
  `generate.next_tokens`, and a sample depends on the seed, its number and its prompt alone.
- What a model has scored or written goes into JSON-lines files that are continued after a break (`record`, `score_stories`).

transformers is imported here and nowhere else, and only when such a model is loaded.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import requests
import torch
from tqdm import tqdm

from blm_core import __version__
from blm_core.checkpoint import load_model
from blm_core.config import HUB, Preset, build
from blm_core.evaluate import story_bits
from blm_core.files import fetch, read_json_lines, sha256, text_sha256
from blm_core.generate import Sampling, next_tokens, sample_numbers, sample_tokens, uniforms

SAMPLING = Sampling(temperature=0.8, top_k=0, top_p=0.95, max_tokens=200, seed=1)  # for every model, unless said otherwise
GPT2_XL = {"n_embd": 1600, "n_layer": 48, "n_head": 25}  # the rest of GPT-2's configuration is transformers' default
GPT2_XL_PARAMETERS = 1_557_611_200  # counted on that configuration, the tied embedding once
LONGEST_CONTEXT = 2048  # tokens: stories are shorter, and a batch of logits has to fit into memory
# GPT2-XL on TinyStories text: lower-cased and joined (ex7remum/TinyStoriesLM), and the mean perplexity of 500 single stories in
# their own case (kkorolev1/deep-learning-2).
PUBLISHED = {"perplexity": 5.2897, "tokens": 123_110, "characters": 500_000, "mean_perplexity": 6.7053}


class UnavailableError(RuntimeError):
    """Something the comparison needs is not there; the message says how to get it."""


class Completion(NamedTuple):
    """What a model wrote behind a prompt: `tokens` of it, and whether "end of text", "max_tokens" or the "context" ended it."""

    text: str
    tokens: int
    stopped: str


class ComparedModel(ABC):
    """A model that scores and completes. `revision` names its weights."""

    name: str
    revision: str
    device: torch.device
    dtype: str
    tokenizer: Any  # of this project or of transformers: both encode and decode
    seq_len: int
    start: int  # the token that every text stands behind
    end: int  # the token that ends a text
    batch_size = 16  # completions at a time
    batch_tokens = 8192  # scored at a time
    plainly: ClassVar[dict] = {}  # what the tokenizer is told so that it adds nothing to a text

    @abstractmethod
    def logits_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of tokens (B, T)."""

    @abstractmethod
    def draw(self, prompts: list[list[int]], sampling: Sampling, numbers: list[int]) -> list[list[int]]:
        """New tokens behind each of the encoded `prompts`; what follows an end token is not looked at."""

    def encode(self, text: str) -> list[int]:
        """The tokens of `text` behind the start token."""
        return [self.start, *self.tokenizer.encode(text, **self.plainly)]

    def settings(self) -> dict:
        return {"model": self.name, "revision": self.revision, "dtype": self.dtype}

    def story_bits(self, stories: list[str]) -> np.ndarray:
        """Bits of each story behind the start token, each scored alone, as `evaluate.story_bits` counts them (n,)."""
        bits = np.zeros(len(stories))
        for start in tqdm(range(0, len(stories), 20), desc=f"scoring with {self.name}", unit="x20 texts", leave=False):
            part = slice(start, start + 20)
            encoded = [np.array(self.encode(story)) for story in stories[part]]
            bits[part] = story_bits(self.logits_of, encoded, self.seq_len, self.device, self.batch_tokens)
        return bits

    def logprob(self, prompts: list[str], continuations: list[str]) -> np.ndarray:
        """log P(continuation | prompt) in nats, summed over the continuation (n,).

        Defined as log P(prompt + continuation) - log P(prompt), each text tokenized as a whole. Where a token reaches across
        the boundary, the value is still one number for the same bytes in every model, but no longer bound to be negative.
        Raises ValueError where a joined text does not fit into the context; nothing is cut.
        """
        joined = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
        for text in joined:
            if not self.fits(text):
                raise ValueError(f"{text[:40]!r} … does not fit into the context of {self.name} ({self.seq_len}).")
        texts = list(dict.fromkeys([*joined, *prompts]))  # several continuations share one prompt
        bits = dict(zip(texts, self.story_bits(texts), strict=True))
        return np.array([(bits[prompt] - bits[text]) * math.log(2) for prompt, text in zip(prompts, joined, strict=True)])

    def fits(self, text: str) -> bool:
        """Whether the whole of `text` is scored in one context: its last token is predicted, not read."""
        return len(self.encode(text)) <= self.seq_len + 1

    def complete(self, prompts: list[str], sampling: Sampling = SAMPLING, numbers: list[int] | None = None) -> list[Completion]:
        """One completion of each prompt; `numbers` says which sample of its prompt each is (default: in the order given).

        Raises ValueError for a prompt that leaves no room in the context.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        for prompt, tokens in zip(prompts, encoded, strict=True):
            if len(tokens) >= self.seq_len:
                raise ValueError(f"the prompt {prompt[:40]!r} … leaves no room in the context of {self.name} ({self.seq_len}).")
        numbers, done = numbers or sample_numbers(encoded), []
        for start in range(0, len(encoded), self.batch_size):
            part = slice(start, start + self.batch_size)
            drawn = self.draw(encoded[part], sampling, numbers[part])
            done += [self._completion(tokens, sampling.max_tokens) for tokens in drawn]
        return done

    def _completion(self, tokens: list[int], max_tokens: int) -> Completion:
        tokens = tokens[: max_tokens or None]
        stopped = "max_tokens" if len(tokens) == max_tokens else "context"
        if self.end in tokens:
            tokens, stopped = tokens[: tokens.index(self.end)], "end of text"
        return Completion(self.tokenizer.decode(tokens), len(tokens), stopped)


class BLM(ComparedModel):
    """A model of this project, in float32."""

    dtype = "float32"

    def __init__(self, folder: str | Path, device: str = "auto"):
        """Load the model in `folder`. Raises CheckpointError."""
        self.name, self.device = "BLM", _device(device)
        self.model, self.tokenizer = load_model(Path(folder), str(self.device))
        self.revision = sha256(Path(folder) / "model.safetensors")[:16]
        self.seq_len, self.start, self.end = self.model.config.seq_len, self.tokenizer.eot, self.tokenizer.eot

    def logits_of(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)

    def draw(self, prompts: list[list[int]], sampling: Sampling, numbers: list[int]) -> list[list[int]]:
        rows = torch.stack(list(sample_tokens(self.model, prompts, sampling, self.end, numbers)), 1).tolist()
        shortest = min(map(len, prompts))
        return [row[len(prompt) - shortest :] for prompt, row in zip(prompts, rows, strict=True)]


class TransformersModel(ComparedModel):
    """A causal model loaded through transformers, with its own tokenizer."""

    batch_tokens = 2048  # a vocabulary of 50,257 makes logits of 0.4 GB from them
    plainly: ClassVar[dict] = {"add_special_tokens": False, "verbose": False}

    def __init__(self, name: str, device: str = "auto", dtype: torch.dtype = torch.float32):
        """Load `name`, a hub name or a local folder. Raises UnavailableError."""
        folder = Path(name).expanduser()
        local = folder.is_dir()
        source, where = folder if local else name, {"local_files_only": local or not _hub_answers()}
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
            from transformers import __version__ as release

            precision = {"dtype" if int(release.split(".")[0]) >= 5 else "torch_dtype": dtype}
            self.tokenizer = AutoTokenizer.from_pretrained(source, clean_up_tokenization_spaces=False, **where)
            self.model = AutoModelForCausalLM.from_pretrained(source, **precision, **where).eval()
        except (ImportError, OSError, ValueError) as error:
            raise UnavailableError(
                f"{name} cannot be loaded ({str(error).splitlines()[0]}). It needs the package transformers and either "
                "a connection to the hub or BLM_GPT2XL set to a folder with the model."
            ) from error
        self.name = folder.resolve().name if local else name
        self.device, self.dtype = _device(device), str(dtype).removeprefix("torch.")
        self.model.to(self.device).generation_config = GenerationConfig()  # its own settings of sampling are not used
        self.revision = _weights_hash(folder) if local else self.model.config._commit_hash
        self.end = self.tokenizer.eos_token_id
        self.start = self.end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        self.seq_len = min(self.model.config.max_position_embeddings, LONGEST_CONTEXT)

    def logits_of(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits

    def draw(self, prompts: list[list[int]], sampling: Sampling, numbers: list[int]) -> list[list[int]]:
        """Prompts stand to the right of a masked padding; the longest of a batch leaves the room that all have."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        tokens = torch.tensor([[self.end] * n + prompt for n, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        room = self.seq_len - longest
        uniform = uniforms(prompts, numbers, sampling.seed, room).to(self.device)

        def only_the_drawn(seen: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            chosen = next_tokens(logits, sampling, uniform[:, seen.shape[1] - longest])
            return torch.full_like(logits, -math.inf).scatter(1, chosen[:, None], 0.0)

        written = self.model.generate(
            tokens.to(self.device),
            attention_mask=mask.to(self.device),
            logits_processor=[only_the_drawn],
            max_new_tokens=min(sampling.max_tokens or room, room),
            do_sample=False,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        return written[:, longest:].tolist()


def load(name: str | Path, device: str = "auto", dtype: torch.dtype = torch.float32) -> ComparedModel:
    """A model of this project in the folder `name`, else what transformers loads under that name. Raises as those two do."""
    ours = (Path(name) / "tokenizer.model").is_file()
    return BLM(name, device) if ours else TransformersModel(str(name), device, dtype)


def opponent(preset: Preset) -> TransformersModel:
    """The model to compare with: `BLM_GPT2XL`, or what the preset names. Raises UnavailableError."""
    name = os.environ.get("BLM_GPT2XL") or preset.opponent
    if not name:
        raise UnavailableError(f"The preset {preset.name} loads no foreign weights. Set BLM_GPT2XL to a folder or a hub name.")
    return TransformersModel(name)


def random_gpt2(architecture: dict, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.nn.Module:
    """GPT-2 with random weights, such as `random_gpt2(GPT2_XL)`: as large and as fast as the real one, and it knows nothing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**architecture)).eval().to(device, dtype)


def record(
    model: ComparedModel, prompts: list[Prompt], out: Path, sampling: Sampling = SAMPLING, samples: int = 3
) -> list[dict]:
    """Completions 0 … samples - 1 of each prompt, read from `out` where it has them, else sampled and added to it.

    One JSON line each; `seconds` is its share of the batch. A break costs one batch at most. Raises RecordingError where `out`
    was made with other settings or other prompts of the same name, and ValueError as `complete`.
    """
    settings = {**model.settings(), "sampling": asdict(sampling)}
    done = {(line["id"], line["sample"]): line for line in resume(out, settings)}
    texts = {prompt.id: prompt.text for prompt in prompts}
    other = {name for (name, _), line in done.items() if texts.get(name, line["prompt"]) != line["prompt"]}
    if other:
        raise RecordingError(f"{out} holds another prompt under the id {min(other)}. Name another file.")
    work = [(prompt, sample) for prompt in prompts for sample in range(samples) if (prompt.id, sample) not in done]
    for start in tqdm(range(0, len(work), model.batch_size), desc=f"recording {model.name}", unit="batch", disable=not work):
        batch = work[start : start + model.batch_size]
        began = time.perf_counter()
        completions = model.complete([prompt.text for prompt, _ in batch], sampling, [number for _, number in batch])
        seconds = (time.perf_counter() - began) / len(batch)
        lines = [
            {"id": prompt.id, "group": prompt.group, "prompt": prompt.text, "sample": sample}
            | {"completion": written.text, "tokens": written.tokens, "stopped": written.stopped, **settings}
            | {"seconds": round(seconds, 4), "device": model.device.type}
            | {"time": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
            for (prompt, sample), written in zip(batch, completions, strict=True)
        ]
        append_lines(out, lines)
        done |= {(line["id"], line["sample"]): line for line in lines}
    return [done[prompt.id, sample] for prompt in prompts for sample in range(samples)]


def score_stories(model: ComparedModel, stories: list[str], out: Path) -> np.ndarray:
    """Bits of each story, read from `out` where it has them, else scored and added to it; `out` holds hashes, no text.

    Raises RecordingError where it was made with another model.
    """
    settings = model.settings()
    done = {line["story"]: line["bits"] for line in resume(out, settings)}
    missing = [story for story in dict.fromkeys(stories) if story_id(story) not in done]
    for start in range(0, len(missing), 100):
        part = missing[start : start + 100]
        lines = [
            {"story": story_id(story), "bits": float(bits), "bytes": len(story.encode()), **settings}
            for story, bits in zip(part, model.story_bits(part), strict=True)
        ]
        append_lines(out, lines)
        done |= {line["story"]: line["bits"] for line in lines}
    return np.array([done[story_id(story)] for story in stories])


def story_id(story: str) -> str:
    """A hash of the exact text."""
    return text_sha256(story)[:16]


def published_bits() -> tuple[float, float]:
    """GPT2-XL's two published marks in bits per byte; the second is an upper bound, by Jensen's inequality."""
    per_token = PUBLISHED["tokens"] / PUBLISHED["characters"]
    return math.log2(PUBLISHED["perplexity"]) * per_token, math.log2(PUBLISHED["mean_perplexity"]) * per_token


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _hub_answers() -> bool:
    """Whether it is worth to ask the hub: transformers tries for a minute before it gives up."""
    try:
        requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)
    except requests.RequestException:
        return False
    return True


def _weights_hash(folder: Path) -> str:
    """A name for the weights in a local folder."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return text_sha256("".join(sha256(path) for path in weights))[:16]


# ---- Files that are continued after a break


class RecordingError(ValueError):
    """A file of recorded results that is broken, or that was made with other settings."""


def read_lines(path: Path) -> list[dict]:
    """The records of a JSON-lines file. Raises RecordingError naming a broken line."""
    try:
        return list(read_json_lines(path))
    except ValueError as error:
        raise RecordingError(f"{error}; was the file cut off?") from error


def append_lines(path: Path, lines: list[dict]) -> None:
    """Add records to a JSON-lines file, on the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def resume(path: Path, settings: dict) -> list[dict]:
    """The records of a JSON-lines file that is to be continued; none where there is no file yet.

    What stands behind the last newline is the half of a record that a break left: it is cut off with a warning, and made
    again. Raises RecordingError for a broken line elsewhere, and for a setting that differs from `settings`, by name.
    """
    if not path.is_file():
        return []
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        half = f"{len(raw) - whole} bytes of a half-written record"
        warnings.warn(f"{path} ended in {half}; they were cut off and will be made again.", stacklevel=3)
        os.truncate(path, whole)
    records = read_lines(path)
    for name, wanted in settings.items():
        other = next((line.get(name) for line in records if line.get(name) != wanted), wanted)
        if other != wanted:
            raise RecordingError(f"{path} was recorded with {name} = {other!r}, now it is {wanted!r}. Name another file.")
    return records


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ["torch", "numpy", "sentencepiece"] + ["transformers"] * ("transformers" in sys.modules)
    return {"blm_core": __version__, "python": sys.version.split()[0], **{name: version(name) for name in packages}}


# ---- Prompts

OWN = Path(__file__).with_name("prompts.json")
AUTHORS_URL = HUB + "Evaluation%20prompts.yaml"


class PromptError(ValueError):
    """A file of prompts that cannot be read as one."""


@dataclass(frozen=True)
class Prompt:
    """A beginning, its name, and what kind of beginning it is."""

    id: str
    group: str
    text: str


def read_prompts(source: str | Path = "own") -> list[Prompt]:
    """The prompts of `source`: "own", "authors", or a file (.json as ours, .yaml as the authors').

    Raises PromptError for a file that holds anything else, DownloadError for the network.
    """
    path = OWN if source == "own" else Path(source)
    if source == "authors":
        address = os.environ.get("BLM_AUTHORS_PROMPTS") or AUTHORS_URL
        path = fetch(address, build() / "prompts", "BLM_AUTHORS_PROMPTS")
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            texts = yaml.safe_load(path.read_text(encoding="utf-8"))
            prompts = [Prompt(f"authors-{number:02d}", "story", text) for number, text in enumerate(texts, 1)]
        else:
            prompts = [Prompt(each["id"], each["group"], each["prompt"]) for each in json.loads(path.read_text("utf-8"))]
        whole = all(prompt.text.strip() for prompt in prompts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PromptError(f"{path} cannot be read as prompts, each with id, group and prompt: {error!r}") from error
    if not prompts or len({prompt.id for prompt in prompts}) < len(prompts) or not whole:
        raise PromptError(f"{path} holds {len(prompts)} prompts; there must be some, none empty, each with an id of its own.")
    return prompts
