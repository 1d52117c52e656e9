"""Models under comparison, behind one small interface: bits of stories, log-probability of a continuation, completions.

- `BLM`: a model folder of this project; `TransformersModel`: any causal model of transformers, GPT2-XL first;
  `Recorded`: completions from a JSON-lines file, which can be rated and measured, not scored.
- Every text stands behind the model's start token, in scoring as in sampling, and both kinds of model draw their tokens
  through `generate.next_tokens`: what is compared is never the decoding.
- What a model has scored or written goes into JSON-lines files that are continued after a break (`record`, `score_stories`).

transformers is imported here and nowhere else, and only when such a model is loaded.
"""

import hashlib
import math
import os
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from blm_core.checkpoint import load_model
from blm_core.config import Preset
from blm_core.evaluate import mean_interval, paired_interval, ratio_interval, story_bits, verdict
from blm_core.evidence.prompts import Prompt
from blm_core.evidence.recording import RecordingError, append_lines, read_lines, resume, versions
from blm_core.files import sha256
from blm_core.generate import Sampling, next_tokens, sample_numbers, sample_tokens, uniforms
from blm_core.tokenizer import Tokenizer, TokenizerError

SAMPLING = Sampling(temperature=0.8, top_k=0, top_p=0.95, max_tokens=200, seed=1)  # for every model, unless said otherwise
GPT2_XL = {"n_embd": 1600, "n_layer": 48, "n_head": 25}  # the rest of GPT-2's configuration is transformers' default
LONGEST_CONTEXT = 2048  # tokens: stories are shorter, and a batch of logits has to fit into memory
# GPT2-XL on TinyStories text, lower-cased and joined, as another solution of this homework reports it.
PUBLISHED = {"perplexity": 5.29, "tokens": 123_110, "characters": 500_000}


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
    def draw(self, prompts: list[list[int]], sampling: Sampling, numbers: list[int] | None = None) -> list[list[int]]:
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

    def complete(self, prompts: list[str], sampling: Sampling = SAMPLING, n: int = 1) -> list[list[Completion]]:
        """`n` sampled completions of each prompt.

        Raises ValueError for a prompt that leaves no room in the context.
        """
        for prompt in prompts:
            if not self.has_room(prompt):
                raise ValueError(f"the prompt {prompt[:40]!r} … leaves no room in the context of {self.name} ({self.seq_len}).")
        encoded = [tokens for prompt in prompts for tokens in [self.encode(prompt)] * n]
        done = []
        numbers = sample_numbers(encoded)
        for start in range(0, len(encoded), self.batch_size):
            part = slice(start, start + self.batch_size)
            drawn = self.draw(encoded[part], sampling, numbers[part])
            done += [self._completion(tokens, sampling.max_tokens) for tokens in drawn]
        return [done[start : start + n] for start in range(0, len(done), n)]

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

    def draw(self, prompts: list[list[int]], sampling: Sampling, numbers: list[int] | None = None) -> list[list[int]]:
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
    def draw(self, prompts: list[list[int]], sampling: Sampling, numbers: list[int] | None = None) -> list[list[int]]:
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
        uniform = uniforms(prompts, numbers or sample_numbers(prompts), sampling.seed, room).to(self.device)
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


class Recorded:
    """Completions that a model gave elsewhere: rated and measured as they are, never scored."""

    def __init__(self, path: str | Path = "", model: str = ""):
        """The completions of `model` in a JSON-lines file (default: `BLM_RECORDED`); it may be left out where only one wrote.

        Raises UnavailableError, or RecordingError naming a broken line.
        """
        self.records = recorded(path)
        names = sorted({str(record.get("model", "not stated")) for record in self.records})
        if model:
            self.records = [record for record in self.records if record.get("model") == model]
        if not self.records or (len(names) > 1 and not model):
            raise UnavailableError(f"{path or 'BLM_RECORDED'} holds completions of {names or 'no model'}; name one of them.")
        self.name = model or names[0]
        self.revision = ", ".join(sorted({str(record.get("revision", "not stated")) for record in self.records}))
        self._of: dict[str, list[Completion]] = {}
        for record in self.records:
            completion = Completion(record["completion"], record.get("tokens", 0), record.get("stopped", "not stated"))
            self._of.setdefault(record["prompt"], []).append(completion)

    @property
    def prompts(self) -> list[str]:
        """The prompts that were answered, each once."""
        return list(self._of)

    def complete(self, prompts: list[str], sampling: Sampling | None = None, n: int = 1) -> list[list[Completion]]:
        """The first `n` recorded completions of each prompt, whatever `sampling`: the file says how they were drawn.

        Raises UnavailableError where a prompt was not answered that often.
        """
        for prompt in prompts:
            have = len(self._of.get(prompt, []))
            if have < n:
                raise UnavailableError(f"{have} of {n} completions of {prompt[:40]!r} … by {self.name} were recorded.")
        return [self._of[prompt][:n] for prompt in prompts]

    def story_bits(self, stories: list[str]) -> np.ndarray:
        raise UnavailableError(
            f"{self.name} is here as recorded text, which can be rated and measured but not scored: load its weights instead."
        )

    def logprob(self, prompts: list[str], continuations: list[str]) -> np.ndarray:
        return self.story_bits([])


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


def recorded(path: str | Path = "") -> list[dict]:
    """Completions recorded as JSON lines with `prompt` and `completion` (default: the file `BLM_RECORDED`).

    Records without both, such as whole texts, are left out. Raises UnavailableError, or RecordingError naming a broken line.
    """
    path = str(path) or os.environ.get("BLM_RECORDED", "")
    if not Path(path).is_file():
        raise UnavailableError(
            f"no recorded completions ({path or 'BLM_RECORDED is not set'}). Set BLM_RECORDED to a JSON-lines file with "
            "`prompt` and `completion`."
        )
    records = read_lines(Path(path))
    return [record for record in records if record.get("prompt") and record.get("completion") is not None]


def record(
    model: ComparedModel, prompts: list[Prompt], out: Path, sampling: Sampling = SAMPLING, samples: int = 3
) -> list[dict]:
    """Completions 0 … samples - 1 of each prompt, read from `out` where it has them, else sampled and added to it.

    One JSON line each: id, group, prompt, sample, completion, tokens, stopped, model, revision, dtype, sampling, seed (of
    its batch), seconds (its share of the batch), device, time, versions. Written batch by batch, so that a break costs one
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
            first, number = batch[0]
            digest = hashlib.sha256(f"{sampling.seed} {first.id} {number}".encode()).digest()
            seed = int.from_bytes(digest[:4], "big")  # another one for every batch, also after a break
            began = time.perf_counter()
            completions = model.complete([prompt.text for prompt, _ in batch], replace(sampling, seed=seed))
            seconds = (time.perf_counter() - began) / len(batch)
            lines = [
                {"id": prompt.id, "group": prompt.group, "prompt": prompt.text, "sample": sample}
                | {"completion": completion.text, "tokens": completion.tokens, "stopped": completion.stopped}
                | {**settings, "seed": seed, "seconds": round(seconds, 4), "device": model.device.type}
                | {"time": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
                for (prompt, sample), (completion,) in zip(batch, completions, strict=True)
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


def scored_elsewhere(path: Path, stories: list[str]) -> tuple[np.ndarray, list[int], str]:
    """Bits that `score_stories` left in `path`, the indices of the `stories` that they belong to, and the model's name.

    Raises UnavailableError where the file is missing or knows none of the stories.
    """
    lines = read_lines(Path(path)) if Path(path).is_file() else []
    done = {line["story"]: line["bits"] for line in lines}
    known = [i for i, story in enumerate(stories) if story_id(story) in done]
    if not known:
        raise UnavailableError(f"{path} holds the bits of none of these {len(stories)} stories. Run the command `score`.")
    return np.array([done[story_id(stories[i])] for i in known]), known, lines[0]["model"]


def story_id(story: str) -> str:
    """A hash of the exact text."""
    return hashlib.sha256(story.encode()).hexdigest()[:16]


def bits_line(stories: list[str], ours: ArrayLike, theirs: ArrayLike | None = None) -> dict:
    """Line 1: bits per byte of both models on the same stories, scored alone, with 95 % bootstrap intervals over stories.

    `ours` and `theirs` are bits per story (n,). Without `theirs` the verdict is "not run". `wins` is the share of stories on
    which ours needs fewer bits; a tie counts as half.
    """
    sizes = np.array([len(story.encode()) for story in stories])
    ours = np.asarray(ours, dtype=np.float64)
    line = {"stories": len(stories), "bytes": int(sizes.sum()), "ours": ratio_interval(ours, sizes)}
    if theirs is None:
        return line | {"theirs": None, "difference": None, "wins": None, "verdict": "not run"}
    theirs = np.asarray(theirs, dtype=np.float64)
    difference = paired_interval(ours, theirs, sizes)
    return line | {
        "theirs": ratio_interval(theirs, sizes),
        "difference": difference,
        "wins": mean_interval((ours < theirs) + 0.5 * (ours == theirs)),
        "verdict": verdict(difference.low, difference.high, better="lower"),
    }


def published_bits_per_character() -> float:
    """GPT2-XL's published perplexity per token as bits per character: a rough mark, its text was lower-cased and joined."""
    return math.log2(PUBLISHED["perplexity"]) * PUBLISHED["tokens"] / PUBLISHED["characters"]


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
