"""Models and training states on disk: read elsewhere, read back, and refused when they are anything else."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from blm_core.checkpoint import CheckpointError, load_model, load_state, read_tensors, save_model, save_state, write_tensors
from blm_core.config import ROOT, ModelConfig
from blm_core.generate import Sampling, complete
from blm_core.model import LanguageModel


def build(tokenizer, **changes) -> LanguageModel:
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "seq_len": 32, "init_std": 0.2}
    return LanguageModel(ModelConfig(len(tokenizer), **shape | changes), seed=1).eval()


@pytest.fixture
def saved(tokenizer, tmp_path) -> Path:
    save_model(tmp_path / "model", build(tokenizer), tokenizer)
    return tmp_path / "model"


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and found[name].equal(expected[name]) for name in expected
    )


def test_a_saved_model_is_loaded_as_it_was_up_to_bfloat16_and_saved_again_without_a_change(saved, tokenizer, tmp_path):
    model, vocabulary = load_model(saved)
    original = build(tokenizer)
    assert model.config == original.config
    assert not model.training
    assert same(model.state_dict(), {name: weight.bfloat16().float() for name, weight in original.state_dict().items()})
    save_model(tmp_path / "again", model, vocabulary)
    first, again = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (saved, tmp_path / "again"))
    assert again == first
    assert first.keys() == {"config.json", "model.safetensors", "tokenizer.model"}


def test_transformers_loads_the_folder_and_computes_the_same_logits_and_the_same_text(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path, build(tokenizer, norm_eps=1e-3, rope_base=300.0), tokenizer)
    ours, _ = load_model(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
    tokens = torch.randint(len(tokenizer), (3, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits.float(), rtol=1e-4, atol=1e-4)
    start = torch.tensor([[tokenizer.eot, *tokenizer.encode("Once a goat saw")]])
    written = theirs.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=15, do_sample=False)
    text = tokenizer.decode(written[0, start.shape[1] :].tolist())
    assert complete(ours, tokenizer, ["Once a goat saw"], Sampling(temperature=0, max_tokens=15)) == [text]


def test_the_safetensors_package_reads_our_files_and_we_read_its_but_no_cut_one(tmp_path):
    tensors = {"a.weight": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "é": torch.randn(4, 6).T}
    write_tensors(tmp_path / "ours", tensors)
    assert same(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "theirs", metadata={"made": "elsewhere"})
    assert same(read_tensors(tmp_path / "theirs"), tensors)
    whole = (tmp_path / "ours").read_bytes()
    for content in [*(whole[:size] for size in range(len(whole))), pickle.dumps(7), whole.replace(b"F32", b"F16")]:
        (tmp_path / "foreign").write_bytes(content)
        with pytest.raises(CheckpointError, match="foreign is not a whole safetensors file"):
            read_tensors(tmp_path / "foreign")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_folder_with_a_file_that_is_missing_cut_off_or_of_another_model_is_refused_with_its_name(saved, name):
    found = json.loads((saved / "config.json").read_text())
    changes = {"hidden_size": 64}, {"hidden_size": "wide"}, {"num_hidden_layers": 1}, {"vocab_size": 300}
    others = {
        "config.json": [json.dumps(content).encode() for content in ([], *(found | change for change in changes))],
        "tokenizer.model": [(ROOT / "release" / "tokenizer.model").read_bytes()],
    }
    whole = (saved / name).read_bytes()
    for content in (whole[: len(whole) // 2], *others.get(name, [])):
        (saved / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            load_model(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} not found"):
        load_model(saved)


def test_a_model_that_no_llama_checkpoint_can_hold_is_not_saved(tokenizer, tmp_path):
    for change in ({"norm": "layer"}, {"position": "learned"}, {"feed_forward": "gelu"}):
        model = LanguageModel(replace(build(tokenizer).config, **change), seed=1)
        with pytest.raises(CheckpointError, match="Llama"):
            save_model(tmp_path / "model", model, tokenizer)
    assert not (tmp_path / "model").exists()


def test_a_training_state_comes_back_whole_and_half_of_one_or_one_that_could_hold_code_is_refused(tokenizer, tmp_path):
    path, model = tmp_path / "checkpoint.pt", build(tokenizer)
    assert load_state(path) is None
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(20)[None], torch.arange(20)[None]).backward()
    optimizer.step()
    save_state(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7})
    found, expected = load_state(path), optimizer.state_dict()
    assert found["step"] == 7
    assert same(found["model"], model.state_dict())
    assert found["optimizer"]["param_groups"] == expected["param_groups"]
    assert all(same(found["optimizer"]["state"][i], kept) for i, kept in expected["state"].items())
    whole = path.read_bytes()
    for size in (len(whole) - 1000, len(whole) // 2, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
            load_state(path)
    torch.save({"step": tmp_path}, path)  # an object, which code could make when it is read
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is not a training state that can be trusted"):
        load_state(path)
