"""Models and training states on disk.

A model is a folder in the layout of Llama checkpoints: `config.json`, `model.safetensors` and `tokenizer.model`. A safetensors
file is eight bytes of header length, a JSON header and the raw numbers; it cannot hold code.
"""

import contextlib
import json
import shutil
import struct
from pathlib import Path

import torch
from torch import Tensor

from blm_core.config import ModelConfig
from blm_core.files import read_json, write_json, written_aside
from blm_core.model import LanguageModel
from blm_core.tokenizer import Tokenizer

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
    """Write float32 or bfloat16 tensors as a safetensors file."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
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
        header, body, tensors = json.loads(raw[8 : 8 + size]), raw[8 + size :], {}
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            numbers = torch.frombuffer(bytearray(body[start:end]), dtype=DTYPES[entry["dtype"]])
            tensors[name] = numbers.view(entry["shape"])
    return tensors


def save_model(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Write `model` in bfloat16, its configuration and its vocabulary into `folder`. Raises CheckpointError for an ablation."""
    folder = Path(folder)
    write_json(folder / "config.json", llama_config(model.config, tokenizer.eot))
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", weights)
    with written_aside(folder / "tokenizer.model") as aside:
        shutil.copyfile(tokenizer.path, aside)


def load_model(folder: Path, device: str | torch.device = "cpu") -> tuple[LanguageModel, Tokenizer]:
    """The model in `folder`, in float32 and ready to sample, and its vocabulary. Raises CheckpointError."""
    paths = [Path(folder) / name for name in ("config.json", "model.safetensors", "tokenizer.model")]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(f"{folder} holds no model: {', '.join(missing)} not found. Train one or name another folder.")
    with _refused(paths[0], "does not describe a model of this project"):
        found = read_json(paths[0], {})
        model = LanguageModel(ModelConfig(**{ours: found[theirs] for ours, theirs in LLAMA.items()}))
    with _refused(paths[1], "does not fit its config.json"):
        model.load_state_dict(read_tensors(paths[1]))
    with _refused(paths[2], "is not the vocabulary of this model"):
        tokenizer = Tokenizer(paths[2])
        if len(tokenizer) != model.config.vocab_size:
            raise ValueError(f"it has {len(tokenizer)} pieces, config.json says {model.config.vocab_size}")
    return model.eval().to(device), tokenizer


def save_state(path: Path, state: dict) -> None:
    """Write a training state of tensors and plain values, whole or not at all. Raises CheckpointError on a full disk."""
    try:
        with written_aside(path) as aside, open(aside, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch hides the reason behind an error of its own
        why = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"{path} could not be written: {why}. The checkpoint before it, if any, is still whole."
        ) from error


def load_state(path: Path) -> dict | None:
    """A training state, None where there is none. Raises CheckpointError for files that hold anything else."""
    if not Path(path).exists():
        return None
    with _refused(path, "is not a training state that can be trusted"):
        return torch.load(path, map_location="cpu", weights_only=True)
