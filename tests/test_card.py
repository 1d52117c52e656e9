"""The model card: every number in it was recorded, and the model beside it wrote the samples."""

from blm_core.checkpoint import save_model
from blm_core.config import ModelConfig
from blm_core.evidence import publish
from blm_core.evidence.__main__ import main
from blm_core.evidence.card import PROMPT, SAMPLES, evaluations, write_card
from blm_core.model import LanguageModel

RECORDED = {
    "data": {"train_stories": "1,234", "train_megabytes": "5.6"},
    "tokenizer": {"pieces": "512"},
    "model": {"parameters": "7,890", "layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "context": 64},
    "train": {"tokens": "9 M", "steps": "10", "epochs": "1.1", "minutes": "12"}
    | {"device": "a machine", "torch": "2", "dtype": "float32"},
    "compare": {"bits_per_byte": "3.210", "stories": "456", "split": "official", "low": "3.100", "high": "3.300"},
}


def test_the_card_states_what_was_recorded_and_shows_ten_samples(smoke, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BLM_BUILD", str(tmp_path))
    for section, values in RECORDED.items():
        publish.record(smoke, section, **values)
    config = ModelConfig(vocab_size=len(tokenizer), n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, seq_len=64)
    save_model(tmp_path / "release", LanguageModel(config, seed=1), tokenizer)
    write_card(smoke, tmp_path / "release")
    card = (tmp_path / "release" / "README.md").read_text()
    for value in ("7,890", "1,234 stories", "5.6 MB", "3.210 bits per byte", "456 stories (official)", "[3.100, 3.300]"):
        assert value in card
    assert card.count(f". {PROMPT}") == SAMPLES
    assert "{" not in card


def test_scores_that_evaluate_printed_stand_in_the_card(tokenizer, tmp_path, capsys):
    config = ModelConfig(vocab_size=len(tokenizer), n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, seq_len=64)
    save_model(tmp_path / "model", LanguageModel(config, seed=1), tokenizer)
    (tmp_path / "held.txt").write_text("A goat sat on a cart.\n<|endoftext|>\nIt rained.\n<|endoftext|>\n")
    assert main(["evaluate", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "held.txt"), "--json"]) == 0
    (tmp_path / "evaluate.jsonl").write_text(capsys.readouterr().out)
    (line,) = evaluations(tmp_path / "evaluate.jsonl")
    assert line.startswith("held.txt ")
    assert line.endswith("], 2 stories")
    assert evaluations(tmp_path / "nothing.jsonl") == []
