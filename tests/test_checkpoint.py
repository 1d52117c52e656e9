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
from blm_core.config import ModelConfig
from blm_core.generate import Sampling, complete
from blm_core.model import LanguageModel
from blm_core.tokenizer import train


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


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


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


@pytest.mark.parametrize("shape", [{"n_kv_heads": 2}, {"n_kv_heads": 1, "norm_eps": 1e-3, "rope_base": 300.0}], ids=str)
def test_transformers_loads_the_folder_and_computes_the_same_logits_and_the_same_text(tokenizer, tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path, build(tokenizer, **shape), tokenizer)
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
    foreign = [*(whole[:size] for size in range(len(whole))), b"\xff" * 100, pickle.dumps(7), whole.replace(b"F32", b"F16")]
    for content in foreign:
        (tmp_path / "foreign").write_bytes(content)
        with pytest.raises(CheckpointError, match="foreign is not a whole safetensors file"):
            read_tensors(tmp_path / "foreign")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_folder_with_a_file_that_is_missing_or_cut_off_is_refused_with_its_name(saved, name):
    cut(saved / name, 0.5)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_model(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} not found"):
        load_model(saved)


def test_a_configuration_that_does_not_fit_or_is_foreign_is_refused(saved):
    found = json.loads((saved / "config.json").read_text())
    changes = {"hidden_size": 64}, {"hidden_size": "wide"}, {"num_hidden_layers": 1}, {"vocab_size": 300}
    for content in ([], {"model_type": "gpt2"}, *(found | change for change in changes)):
        (saved / "config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"config\.json"):
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


def test_a_training_state_comes_back_whole_and_half_of_one_or_one_that_could_hold_code_is_refused(tokenizer, tmp_path):
    path, model = tmp_path / "checkpoint.pt", build(tokenizer)
    assert load_state(path) is None
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(20)[None], torch.arange(20)[None]).backward()
    optimizer.step()
    save_state(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "pending": [(1.5, 0.25)]})
    found = load_state(path)
    assert same(found["model"], model.state_dict())
    assert found["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    for i, kept in optimizer.state_dict()["state"].items():
        assert same(found["optimizer"]["state"][i], kept)
    assert (found["step"], [tuple(pair) for pair in found["pending"]]) == (7, [(1.5, 0.25)])
    for share in (0.999, 0.5, 0):
        cut(path, share)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
            load_state(path)
    torch.save({"step": tmp_path}, path)  # an object, which code could make when it is read
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is not a training state that can be trusted"):
        load_state(path)
