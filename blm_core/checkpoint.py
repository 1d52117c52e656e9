"""Models and training states on disk.

A model is a folder in the layout of Llama checkpoints, which transformers loads too: `config.json`, `model.safetensors`,
`tokenizer.model` and what `AutoTokenizer` and `generate` need. The safetensors format is eight bytes of header length, a JSON
header and the raw numbers; it cannot hold code.
"""

import contextlib
import json
import shutil
import struct
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from blm_core import END_OF_TEXT
from blm_core.config import ModelConfig
from blm_core.files import read_json, write_json, written_aside
from blm_core.generate import Sampling
from blm_core.model import LanguageModel
from blm_core.tokenizer import SPACE_MARK, Tokenizer, TokenizerError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
LLAMA = {  # our names: those of Llama's config.json
    "vocab_size": "vocab_size",
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "seq_len": "max_position_embeddings",
    "rope_base": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}


class CheckpointError(RuntimeError):
    """A file that is not a model or a training state of this project."""


@contextlib.contextmanager
def _refused(path: Path, why: str):
    """Whatever goes wrong in the block becomes a CheckpointError that names the file."""
    try:
        yield
    except Exception as error:  # a foreign file can raise nearly any kind
        raise CheckpointError(f"{path} {why}: {error}") from error


def llama_config(config: ModelConfig, eot: int) -> dict:
    """The architecture as the config.json of a Llama checkpoint. Raises CheckpointError for an ablation."""
    if not config.is_llama:
        raise CheckpointError(
            f"only models of the Llama family are saved; this one has {config.norm=}, {config.position=}, "
            f"{config.feed_forward=}."
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in LLAMA.items()},
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": "bfloat16",
    }


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write float32 or bfloat16 tensors as a safetensors file. Raises CheckpointError for other types."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise CheckpointError(f"{path} cannot hold {name} in {tensor.dtype}; convert it to float32 or bfloat16.")
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with written_aside(path) as aside, open(aside, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError where it is not a whole one."""
    raw = Path(path).read_bytes()
    with _refused(path, "is not a whole safetensors file of float32 or bfloat16 tensors"):
        (size,) = struct.unpack("<Q", raw[:8])
        header, body, read, tensors = json.loads(raw[8 : 8 + size]), raw[8 + size :], 0, {}
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            data = torch.frombuffer(bytearray(body[start:end]), dtype=DTYPES[entry["dtype"]])
            tensors[name] = data.view([int(side) for side in entry["shape"]])
            if start != read or min(entry["shape"], default=0) < 0 or end - start != data.numel() * data.element_size():
                raise ValueError(f"{name} of shape {entry['shape']} does not fill the bytes from {read} to {end}")
            read = end
        if read != len(body):
            raise ValueError(f"its tensors end at byte {read} of {len(body)}")
    return tensors


def save_model(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Write `model` in bfloat16, its configuration and its vocabulary into `folder`, as transformers loads them too."""
    folder, eot, sampling = Path(folder), tokenizer.eot, Sampling()
    config = llama_config(model.config, eot)  # refuses what is no Llama before anything is written
    weights = {name: weight.detach().to(torch.bfloat16) for name, weight in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", weights)
    with written_aside(folder / "tokenizer.model") as aside:
        shutil.copyfile(tokenizer.path, aside)
    write_json(folder / "config.json", config)
    defaults = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    special = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    write_json(folder / "generation_config.json", defaults | special)
    if not tokenizer.is_bpe:  # the fast tokenizers have another unigram
        return
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.seq_len,
            "model_input_names": ["input_ids", "attention_mask"],  # `generate` of transformers refuses token types
        },
    )


def load_model(folder: Path, device: str = "cpu") -> tuple[LanguageModel, Tokenizer]:
    """The model in `folder`, in float32 and ready to sample, and its vocabulary. Raises CheckpointError."""
    folder = Path(folder)
    missing = [n for n in ("config.json", "model.safetensors", "tokenizer.model") if not (folder / n).is_file()]
    if missing:
        raise CheckpointError(f"{folder} holds no model: {', '.join(missing)} not found. Train one or name another folder.")
    with _refused(folder / "config.json", "does not describe a model of this project"):
        found, types = read_json(folder / "config.json", {}), {field.name: field.type for field in fields(ModelConfig)}
        config = ModelConfig(**{ours: types[ours](found[theirs]) for ours, theirs in LLAMA.items()})
    model = LanguageModel(config)
    with _refused(folder / "model.safetensors", "does not fit its config.json"):
        model.load_state_dict(read_tensors(folder / "model.safetensors"))
    with _refused(folder / "tokenizer.model", "is not the vocabulary of this model"):
        tokenizer = Tokenizer(folder / "tokenizer.model")
        if len(tokenizer) != config.vocab_size:
            raise TokenizerError(f"it has {len(tokenizer)} pieces, config.json says {config.vocab_size}")
    return model.eval().to(device), tokenizer


def save_state(path: Path, state: dict) -> None:
    """Write a training state of tensors and plain values, whole or not at all. Raises CheckpointError on a full disk."""
    try:
        with written_aside(path) as aside, open(aside, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch hides the reason behind an error of its own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"{path} could not be written: {reason}. The checkpoint before it, if there was one, is still whole."
        ) from error


def load_state(path: Path) -> dict | None:
    """A training state, None where there is none. Raises CheckpointError for files that hold anything else."""
    if not Path(path).exists():
        return None
    with _refused(path, "is not a training state that can be trusted"):
        return torch.load(path, map_location="cpu", weights_only=True)


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """`tokenizer.json` of the tokenizers library, which gives the ids that our vocabulary gives.

    Encoding with special tokens puts `<|endoftext|>` in front. One character differs: a literal U+2581, which sentencepiece
    uses for a space, is a space there and three bytes here.
    """
    pieces = {tokenizer.piece(i): i for i in range(len(tokenizer))}
    eot = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    to_space = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokenizer.eot, "content": END_OF_TEXT, **flags, "special": True},
            {"id": pieces["\n"], "content": "\n", **flags, "special": False},
        ],
        "normalizer": from_space,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [eot, first],
            "pair": [eot, first, eot, second],
            "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [tokenizer.eot], "tokens": [END_OF_TEXT]}},
        },
        "decoder": {"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.piece(0),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": pieces,
            "merges": merges(tokenizer, pieces),
        },
    }


def merges(tokenizer: Tokenizer, pieces: dict[str, int]) -> list[str]:
    """The pairs of pieces that may be joined, best first.

    A sentencepiece BPE merges the pair whose joined piece has the best score. The fast tokenizers merge the pair of the best
    rank, so every way of joining two pieces to a third becomes a merge with the rank of the third.
    """
    found = []
    for joined in sorted(filter(tokenizer.is_normal, pieces.values()), key=tokenizer.score, reverse=True):
        piece = tokenizer.piece(joined)
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in pieces and piece[i:] in pieces]
        found += sorted(pairs, key=lambda pair: [pieces[part] for part in pair])
    return list(map(" ".join, found))
