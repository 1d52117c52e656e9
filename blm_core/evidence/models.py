"""Models under comparison, behind one small interface: bits of stories, log-probability of a continuation, completions.

- `BLM`: a model folder of this project; `TransformersModel`: any causal model of transformers, GPT2-XL first.
- Every text stands behind the model's start token, in scoring as in sampling. Both kinds of model draw their tokens through
  `generate.next_tokens`, and a sample depends on the seed, its number and its prompt alone.
- What a model has scored or written goes into JSON-lines files that are continued after a break (`record`, `score_stories`).

transformers is imported here and nowhere else, and only when such a model is loaded.
"""

from __future__ import annotations

import hashlib
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
from typing import NamedTuple

import numpy as np
import requests
import torch
from tqdm import tqdm

from blm_core import __version__
from blm_core.checkpoint import load_model
from blm_core.config import HUB, Preset, build
from blm_core.evaluate import story_bits
from blm_core.files import fetch, sha256
from blm_core.generate import Sampling, next_tokens, sample_numbers, sample_tokens, uniforms
from blm_core.tokenizer import Tokenizer, TokenizerError

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
    """A model that scores and completes. `revision` names its weights, `settings` what else its answers depend on."""

    name: str
    revision: str
    device: torch.device
    dtype: str
    seq_len: int
    end: int  # the token that ends a text
    batch_size = 16  # completions at a time

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of `text` behind the start token."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`."""

    @abstractmethod
    def story_bits(self, stories: list[str]) -> np.ndarray:
        """Bits of each story behind the start token, each scored alone (len(stories),), as `scoring.story_bits` counts them."""

    @abstractmethod
    def draw(self, prompts: list[list[int]], sampling: Sampling, numbers: list[int]) -> list[list[int]]:
        """New tokens behind each of the encoded `prompts`; what follows an end token is not looked at."""

    def settings(self) -> dict:
        return {"model": self.name, "revision": self.revision, "dtype": self.dtype}

    def logprob(self, prompts: list[str], continuations: list[str]) -> np.ndarray:
        """log P(continuation | prompt) in nats, summed over the continuation (n,).

        Defined as log P(prompt + continuation) - log P(prompt), each text tokenized as a whole behind the start token.
        Where the prompt's tokens begin the joined text's, it is the sum over the tokens behind them. Where a token
        reaches across the boundary, both texts are scored with their own tokens: the value is still one number for the
        same bytes in every model, but no longer bound to be negative. Raises ValueError where a joined text does not fit
        into the context; nothing is cut.
        """
        joined = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
        for text in joined:
            if not self.fits(text):
                raise ValueError(
                    f"prompt and continuation of {len(self.encode(text))} tokens do not fit into the context of {self.name} "
                    f"({self.seq_len}): {text[:40]!r} …"
                )
        texts = list(dict.fromkeys([*joined, *prompts]))  # several continuations share one prompt
        bits = dict(zip(texts, self.story_bits(texts), strict=True))
        return np.array([(bits[prompt] - bits[text]) * math.log(2) for prompt, text in zip(prompts, joined, strict=True)])

    def fits(self, text: str) -> bool:
        """Whether the whole of `text` is scored in one context: its last token is predicted, not read."""
        return len(self.encode(text)) <= self.seq_len + 1

    def has_room(self, prompt: str) -> bool:
        """Whether the context holds the prompt and at least one token more."""
        return len(self.encode(prompt)) < self.seq_len

    def complete(self, prompts: list[str], sampling: Sampling = SAMPLING, numbers: list[int] | None = None) -> list[Completion]:
        """One completion of each prompt; `numbers` says which sample of its prompt each is (default: in the order given).

        Raises ValueError for a prompt that leaves no room in the context.
        """
        for prompt in prompts:
            if not self.has_room(prompt):
                raise ValueError(f"the prompt {prompt[:40]!r} … leaves no room in the context of {self.name} ({self.seq_len}).")
        encoded = [self.encode(prompt) for prompt in prompts]
        numbers, done = numbers or sample_numbers(encoded), []
        for start in range(0, len(encoded), self.batch_size):
            part = slice(start, start + self.batch_size)
            drawn = self.draw(encoded[part], sampling, numbers[part])
            done += [self._completion(tokens, sampling.max_tokens) for tokens in drawn]
        return done

    def _completion(self, tokens: list[int], max_tokens: int) -> Completion:
        tokens = tokens[: max_tokens or None]
        if self.end in tokens:
            tokens = tokens[: tokens.index(self.end)]
            return Completion(self.decode(tokens), len(tokens), "end of text")
        return Completion(self.decode(tokens), len(tokens), "max_tokens" if len(tokens) == max_tokens else "context")


class BLM(ComparedModel):
    """A model of this project, in float32."""

    dtype = "float32"

    def __init__(self, folder: str | Path, device: str = "auto", name: str = "BLM"):
        """Load the model in `folder`. Raises CheckpointError."""
        self.name = name
        self.device = _device(device)
        self.model, self.tokenizer = load_model(Path(folder), str(self.device))
        self.revision = sha256(Path(folder) / "model.safetensors")[:16]
        self.seq_len, self.end = self.model.config.seq_len, self.tokenizer.eot

    def encode(self, text: str) -> list[int]:
        return [self.tokenizer.eot, *self.tokenizer.encode(text)]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def story_bits(self, stories: list[str]) -> np.ndarray:
        return _in_parts(self, stories, lambda encoded: story_bits(self.model, encoded, self.seq_len, self.device))

    def draw(self, prompts: list[list[int]], sampling: Sampling, numbers: list[int]) -> list[list[int]]:
        rows = torch.stack(list(sample_tokens(self.model, prompts, sampling, self.end, numbers)), 1).tolist()
        shortest = min(map(len, prompts))
        return [row[len(prompt) - shortest :] for prompt, row in zip(prompts, rows, strict=True)]


class TransformersModel(ComparedModel):
    """A causal model loaded through transformers, with its own tokenizer."""

    def __init__(self, name: str, device: str = "auto", dtype: torch.dtype = torch.float32, revision: str | None = None):
        """Load `name`, a hub name or a local folder. Raises UnavailableError."""
        folder = Path(name).expanduser()
        local = folder.is_dir()
        self.name = folder.resolve().name if local else name
        self.device = _device(device)
        self.dtype = str(dtype).removeprefix("torch.")
        where = {"revision": revision, "local_files_only": True if local else not _hub_answers()}
        source = str(folder) if local else name
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers import __version__ as release

            precision = {"dtype" if int(release.split(".")[0]) >= 5 else "torch_dtype": dtype}
            self.tokenizer = AutoTokenizer.from_pretrained(source, **where)
            self.model = AutoModelForCausalLM.from_pretrained(source, **precision, **where).eval().to(self.device)
        except (ImportError, OSError, ValueError) as error:
            raise UnavailableError(
                f"{name} cannot be loaded ({str(error).splitlines()[0]}). It needs the package transformers and either "
                "a connection to the hub or BLM_GPT2XL set to a folder with the model."
            ) from error
        self.revision = _weights_hash(folder) if local else self.model.config._commit_hash
        self.end = self.tokenizer.eos_token_id
        self.start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.end
        context = getattr(self.model.config, "max_position_embeddings", None)
        if self.end is None or context is None:
            raise UnavailableError(f"{name} states no end-of-text token or no context length, so it cannot be compared.")
        self.seq_len = min(int(context), LONGEST_CONTEXT)

    def encode(self, text: str) -> list[int]:
        return [self.start, *self.tokenizer.encode(text, add_special_tokens=False, verbose=False)]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def story_bits(self, stories: list[str]) -> np.ndarray:
        def logits_of(tokens: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=tokens, use_cache=False).logits

        # A vocabulary of 50,257 makes logits of 0.4 GB from 2,048 tokens.
        return _in_parts(self, stories, lambda encoded: story_bits(logits_of, encoded, self.seq_len, self.device, 2048))

    @torch.no_grad()
    def draw(self, prompts: list[list[int]], sampling: Sampling, numbers: list[int]) -> list[list[int]]:
        """Prompts stand to the right of a masked padding; the longest of a batch leaves the room that all have."""
        longest = max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), self.end)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        room = self.seq_len - longest
        uniform = uniforms(prompts, numbers, sampling.seed, room).to(self.device)
        cache, drawn = None, []
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        for step in range(min(sampling.max_tokens or room, room)):
            out = self.model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            chosen = torch.where(ended, self.end, next_tokens(out.logits[:, -1].float(), sampling, uniform[:, step]))
            drawn.append(chosen)
            ended |= chosen == self.end
            if ended.all():
                break
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        return torch.stack(drawn, 1).tolist()


def load(name: str | Path, device: str = "auto", dtype: torch.dtype = torch.float32) -> ComparedModel:
    """The model `name`: a folder of this project, or what transformers loads under that name.

    Raises UnavailableError or CheckpointError.
    """
    vocabulary = Path(name) / "tokenizer.model"
    if vocabulary.is_file():
        try:
            Tokenizer(vocabulary)
        except TokenizerError:  # Llama's folders have a file of that name too
            return TransformersModel(str(name), device, dtype)
        return BLM(name, device)
    return TransformersModel(str(name), device, dtype)


def opponent(preset: Preset, device: str = "auto", dtype: torch.dtype = torch.float32) -> TransformersModel:
    """The model to compare with: `BLM_GPT2XL`, or what the preset names. Raises UnavailableError."""
    name = os.environ.get("BLM_GPT2XL") or preset.opponent
    if not name:
        raise UnavailableError(f"The preset {preset.name} loads no foreign weights. Set BLM_GPT2XL to a folder or a hub name.")
    return TransformersModel(name, device, dtype)


def random_gpt2(architecture: dict, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.nn.Module:
    """GPT-2 with random weights, such as `random_gpt2(GPT2_XL)`: as large and as fast as the real one, and it knows nothing.

    Raises UnavailableError without transformers.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise UnavailableError(f"GPT-2's architecture needs the package transformers ({error}).") from error
    return GPT2LMHeadModel(GPT2Config(**architecture)).eval().to(device, dtype)


def record(
    model: ComparedModel, prompts: list[Prompt], out: Path, sampling: Sampling = SAMPLING, samples: int = 3
) -> list[dict]:
    """Completions 0 … samples - 1 of each prompt, read from `out` where it has them, else sampled and added to it.

    One JSON line each: id, group, prompt, sample, completion, tokens, stopped, model, revision, dtype, sampling,
    seconds (its share of the batch), device, time, versions. Written batch by batch, so that a break costs one
    batch at most. Raises RecordingError where `out` was made with other settings or other prompts of the same name, and
    ValueError before anything is sampled where prompts leave no room in the context.
    """
    too_long = [prompt.id for prompt in prompts if not model.has_room(prompt.text)]
    if too_long:
        raise ValueError(
            f"{len(too_long)} of {len(prompts)} prompts leave no room in the context of {model.name} ({model.seq_len}): "
            f"{', '.join(too_long)}."
        )
    settings = {**model.settings(), "sampling": asdict(sampling)}
    done = {(r["id"], r["sample"]): r for r in resume(out, settings, ("id", "sample", "prompt", "completion"))}
    texts = {prompt.id: prompt.text for prompt in prompts}
    for (name, _), line in done.items():
        if texts.get(name, line["prompt"]) != line["prompt"]:
            raise RecordingError(f"{out} holds another prompt under the id {name}. Name another file.")
    work = [(prompt, sample) for prompt in prompts for sample in range(samples) if (prompt.id, sample) not in done]
    with tqdm(total=len(work), desc=f"recording {model.name}", unit="completion", disable=not work) as bar:
        for start in range(0, len(work), model.batch_size):
            batch = work[start : start + model.batch_size]
            began = time.perf_counter()
            completions = model.complete([prompt.text for prompt, _ in batch], sampling, [number for _, number in batch])
            seconds = (time.perf_counter() - began) / len(batch)
            lines = [
                {"id": prompt.id, "group": prompt.group, "prompt": prompt.text, "sample": sample}
                | {"completion": completion.text, "tokens": completion.tokens, "stopped": completion.stopped}
                | {**settings, "seconds": round(seconds, 4), "device": model.device.type}
                | {"time": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
                for (prompt, sample), completion in zip(batch, completions, strict=True)
            ]
            append_lines(out, lines)
            done |= {(line["id"], line["sample"]): line for line in lines}
            bar.update(len(batch))
    return [done[prompt.id, sample] for prompt in prompts for sample in range(samples)]


def score_stories(model: ComparedModel, stories: list[str], out: Path) -> np.ndarray:
    """Bits of each story, read from `out` where it has them, else scored and added to it.

    `out` holds hashes and numbers, no text: one JSON line per story with story, bits, bytes, model, revision, dtype.
    Raises RecordingError where it was made with another model.
    """
    settings = model.settings()
    done = {line["story"]: line["bits"] for line in resume(out, settings, ("story", "bits", "bytes"))}
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
    return hashlib.sha256(story.encode()).hexdigest()[:16]


def published_bits() -> tuple[float, float]:
    """GPT2-XL's two published marks in bits per byte; the second is an upper bound, by Jensen's inequality."""
    per_token = PUBLISHED["tokens"] / PUBLISHED["characters"]
    return math.log2(PUBLISHED["perplexity"]) * per_token, math.log2(PUBLISHED["mean_perplexity"]) * per_token


def _in_parts(model: ComparedModel, stories: list[str], bits_of) -> np.ndarray:
    """Bits of `stories`, twenty at a time, so that progress shows."""
    bits = np.zeros(len(stories))
    for start in tqdm(range(0, len(stories), 20), desc=f"scoring with {model.name}", unit="x20 texts", leave=False):
        part = slice(start, start + 20)
        bits[part] = bits_of([np.array(model.encode(story)) for story in stories[part]])
    return bits


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
    return hashlib.sha256("".join(sha256(path) for path in weights).encode()).hexdigest()[:16]


# ---- Files that are continued after a break


class RecordingError(ValueError):
    """A file of recorded results that is broken, or that was made with other settings."""


def read_lines(path: Path) -> list[dict]:
    """The records of a JSON-lines file. Raises RecordingError naming a broken line."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise RecordingError(f"{path}, line {number} is not valid JSON ({error}); was the file cut off?") from error
        if not isinstance(records[-1], dict):
            raise RecordingError(f"{path}, line {number} is not a record but {line[:40]!r}.")
    return records


def append_lines(path: Path, lines: list[dict]) -> None:
    """Add records to a JSON-lines file, on the disk before this returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def resume(path: Path, settings: dict, needed: tuple[str, ...]) -> list[dict]:
    """The records of a JSON-lines file that is to be continued; none where there is no file yet.

    What stands behind the last newline is the half of a record that a break left: it is cut off with a warning, and made
    again. Raises RecordingError for a broken line elsewhere, a record without the fields `needed`, and a setting that
    differs from `settings`, by name.
    """
    path = Path(path)
    if not path.is_file():
        return []
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        warnings.warn(
            f"{path} ended in {len(raw) - whole} bytes of a half-written record; they were cut off and will be made again.",
            stacklevel=3,
        )
        with open(path, "r+b") as file:
            file.truncate(whole)
    records = read_lines(path)
    for number, line in enumerate(records, 1):
        lacking = [name for name in needed if name not in line]
        if lacking:
            raise RecordingError(f"{path}, record {number} has no {', '.join(lacking)}: it was not recorded by this command.")
        found, wanted = _flat({name: line.get(name) for name in settings}), _flat(settings)
        for name in wanted | found:
            if found.get(name) != wanted.get(name):
                raise RecordingError(
                    f"{path} was recorded with {name} = {found.get(name)!r}, now it is {wanted.get(name)!r}. "
                    "Name another file, or use the same settings."
                )
    return records


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ["torch", "numpy", "sentencepiece"] + ["transformers"] * ("transformers" in sys.modules)
    return {"blm_core": __version__, "python": sys.version.split()[0], **{name: version(name) for name in packages}}


def _flat(settings: dict, before: str = "") -> dict:
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return flat


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
    """The prompts of `source`: "own", "authors", or a file (.json as ours, .jsonl of recorded completions, .yaml as theirs).

    The same text is kept once. Raises PromptError for a file that holds anything else, DownloadError for the network.
    """
    if source == "own":
        path = OWN
    elif source == "authors":
        folder = build() / "prompts"
        path = fetch(os.environ.get("BLM_AUTHORS_PROMPTS") or AUTHORS_URL, folder, "BLM_AUTHORS_PROMPTS")
    else:
        path = Path(source)
    import yaml

    raw = path.read_text(encoding="utf-8")
    try:
        if path.suffix in (".yaml", ".yml"):
            found = [
                {"id": f"authors-{number:02d}", "group": "story", "prompt": text}
                for number, text in enumerate(yaml.safe_load(raw), 1)
            ]
        elif path.suffix == ".jsonl":
            found = [record for record in map(json.loads, raw.splitlines()) if record.get("prompt")]
        else:
            found = json.loads(raw)
        prompts = [Prompt(str(r["id"]), r.get("group") or r["kind"], r["prompt"]) for r in found]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PromptError(f"{path} cannot be read as prompts, each with id, group and prompt: {error!r}") from error
    unique = list({prompt.text: prompt for prompt in reversed(prompts)}.values())[::-1]
    if not unique or len({prompt.id for prompt in unique}) < len(unique) or not all(prompt.text.strip() for prompt in unique):
        raise PromptError(f"{path} holds {len(unique)} prompts; there must be some, none empty, each with an id of its own.")
    return unique
