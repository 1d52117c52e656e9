"""Models and training states on disk: read elsewhere, read back, and refused when they are anything else."""

import json
import os
import pickle
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from blm_core.checkpoint import CheckpointError, load_model, load_state, read_tensors, save_model, save_state, write_tensors
from blm_core.config import ModelConfig
from blm_core.generate import Sampling, complete
from blm_core.model import LanguageModel
from blm_core.tokenizer import train

SHAPES = {
    "grouped heads": {"n_heads": 4, "n_kv_heads": 2},
    "one key head": {"n_heads": 4, "n_kv_heads": 1, "norm_eps": 1e-3},
    "another base": {"n_heads": 2, "n_kv_heads": 2, "rope_base": 300.0},
}


def build(tokenizer, **changes) -> LanguageModel:
    shape = {"n_layers": 2, "d_model": 32, "d_ff": 48, "seq_len": 32, "init_std": 0.2} | SHAPES["grouped heads"] | changes
    return LanguageModel(ModelConfig(len(tokenizer), **shape), seed=1).eval()


@pytest.fixture
def saved(tokenizer, tmp_path) -> Path:
    save_model(tmp_path / "model", build(tokenizer), tokenizer)
    return tmp_path / "model"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "é": torch.randn(2, 1, 3, generator=generator),
    }


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and found[name].equal(expected[name]) for name in expected
    )


def test_a_saved_model_is_loaded_as_it_was_up_to_bfloat16_and_saved_again_without_a_change(saved, tokenizer, tmp_path):
    model, vocabulary = load_model(saved)
    original = build(tokenizer)
    assert model.config == original.config
    assert not model.training
    assert vocabulary.hash == tokenizer.hash
    assert same(model.state_dict(), {name: weight.bfloat16().float() for name, weight in original.state_dict().items()})
    save_model(tmp_path / "again", model, vocabulary)
    first, again = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (saved, tmp_path / "again"))
    assert again == first
    assert first.keys() >= {"config.json", "model.safetensors", "tokenizer.model"}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_transformers_loads_the_folder_and_computes_the_same_logits_and_the_same_text(tokenizer, tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path, build(tokenizer, **shape), tokenizer)
    ours, _ = load_model(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
    assert type(theirs) is transformers.LlamaForCausalLM
    tokens = torch.randint(len(tokenizer), (3, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits.float(), rtol=1e-4, atol=1e-4)
    start = torch.tensor([[tokenizer.eot, *tokenizer.encode("Once a goat saw")]])
    written = theirs.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=15, do_sample=False)
    text = tokenizer.decode(written[0, start.shape[1] :].tolist())
    assert complete(ours, tokenizer, ["Once a goat saw"], Sampling(temperature=0, max_tokens=15)) == [text]
    assert text


def test_what_we_write_the_safetensors_package_reads_and_the_other_way_round(tensors, tmp_path):
    write_tensors(tmp_path / "ours.safetensors", tensors)
    assert same(safetensors.torch.load_file(tmp_path / "ours.safetensors"), tensors)
    assert same(read_tensors(tmp_path / "ours.safetensors"), tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "theirs.safetensors", metadata={"made": "elsewhere"})
    assert same(read_tensors(tmp_path / "theirs.safetensors"), tensors)


def test_every_cut_of_a_tensor_file_is_refused(tensors, tmp_path):
    write_tensors(tmp_path / "whole", tensors)
    whole = (tmp_path / "whole").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cut is not a whole safetensors file"):
            read_tensors(tmp_path / "cut")


def tensor_file(header, body: bytes = bytes(16)) -> bytes:
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 100,
        b"\xff" * 100,
        b"PK\x03\x04 a zip archive",
        pickle.dumps({"weights": [1.0]}),
        *map(tensor_file, ([], 7, "text", {"a": None}, {"a": {"dtype": "F32", "shape": [2, 2]}})),
        *(tensor_file({"a": ENTRY | {"dtype": dtype}}) for dtype in ("F16", ["F32"])),
        *(tensor_file({"a": ENTRY | {"shape": shape}}) for shape in ([2, 3], [2, -1], [2**80], "22")),
        *(tensor_file({"a": ENTRY | {"data_offsets": ends}}) for ends in ([0], [-16, None], [0, 2**80])),
        tensor_file({"a": ENTRY}, bytes(20)),
    ],
    ids=lambda content: repr(content[8:60]),
)
def test_what_is_no_tensor_file_is_refused_by_name(content, tmp_path):
    (tmp_path / "foreign.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors is not a whole safetensors file"):
        read_tensors(tmp_path / "foreign.safetensors")


def test_tensors_of_other_types_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="float16"):
        write_tensors(tmp_path / "half", {"a": torch.zeros(2, dtype=torch.float16)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [None, 0.5], ids=["missing", "half"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_folder_with_a_file_that_is_missing_or_cut_off_is_refused_with_its_name(saved, name, share):
    content = (saved / name).read_bytes()
    (saved / name).unlink()
    if share:
        (saved / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_model(saved)


@pytest.mark.parametrize(
    "change",
    [
        *({"hidden_size": size} for size in (64, "wide", None)),
        *({"num_hidden_layers": layers} for layers in (1, 3)),
        *({"num_attention_heads": heads} for heads in (0, 5)),
        {"vocab_size": 300},
        {"max_position_embeddings": -1},
        *("[]", "7", "null", '{"model_type": "gpt2", "n_embd": 1600}', "not JSON"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_or_is_foreign_is_refused(saved, change):
    found = (saved / "config.json").read_text()
    (saved / "config.json").write_text(change if isinstance(change, str) else json.dumps(json.loads(found) | change))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(saved)


@pytest.mark.parametrize("change", [{"lm_head.weight": torch.zeros(2, 2)}, {"model.norm.weight": torch.ones(31)}], ids=str)
def test_the_weights_of_another_architecture_are_refused(saved, change):
    write_tensors(saved / "model.safetensors", read_tensors(saved / "model.safetensors") | change)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json"):
        load_model(saved)


def test_the_vocabulary_of_another_model_is_refused(saved):
    train((f"Story {n}: a hen, a fox and {n} eggs." for n in range(30)), saved / "tokenizer.model", 300)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model .* it has 300 pieces"):
        load_model(saved)


def test_a_model_that_no_llama_checkpoint_can_hold_is_not_saved(tokenizer, tmp_path):
    for change in ({"norm": "layer"}, {"position": "learned"}, {"feed_forward": "gelu"}):
        model = LanguageModel(replace(build(tokenizer).config, **change), seed=1)
        with pytest.raises(CheckpointError, match="Llama"):
            save_model(tmp_path / "model", model, tokenizer)
    assert not (tmp_path / "model").exists()


def state(model: LanguageModel) -> dict:
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.arange(20)[None]
    model(tokens, tokens).backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "pending": [(1.5, 0.25)]}


def test_a_training_state_comes_back_whole(tokenizer, tmp_path):
    assert load_state(tmp_path / "checkpoint.pt") is None
    expected = state(build(tokenizer))
    save_state(tmp_path / "checkpoint.pt", expected)
    found = load_state(tmp_path / "checkpoint.pt")
    assert same(found["model"], expected["model"])
    assert found["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for i, kept in expected["optimizer"]["state"].items():
        assert same(found["optimizer"]["state"][i], kept)
    assert (found["step"], [tuple(pair) for pair in found["pending"]]) == (7, [(1.5, 0.25)])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("write", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap))], ids=["zip", "pickle"])
def test_a_state_that_holds_code_is_refused_and_the_code_does_not_run(tmp_path, write):
    write({"step": Trap(tmp_path / "sprung")}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is not a training state that can be trusted"):
        load_state(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_half_a_state_is_refused(tokenizer, tmp_path, share):
    save_state(tmp_path / "checkpoint.pt", state(build(tokenizer)))
    content = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        load_state(tmp_path / "checkpoint.pt")


def test_a_state_that_cannot_be_written_leaves_the_one_before_untouched(tmp_path):
    save_state(tmp_path / "checkpoint.pt", {"step": 1})
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        save_state(tmp_path / "checkpoint.pt", {"step": 2, "weights": torch.zeros(1000), "not data": lambda: None})
    assert load_state(tmp_path / "checkpoint.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
