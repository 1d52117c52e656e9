"""The model in transformers and in llama.cpp: the same ids, the same text."""

import itertools

import numpy as np
import pytest
import torch
from tiny_models import save_blm

from blm_core import END_OF_TEXT, data
from blm_core.checkpoint import load_model
from blm_core.config import ROOT
from blm_core.evidence.export import export_gguf, export_transformers, interleaved
from blm_core.generate import Sampling, complete
from blm_core.tokenizer import Tokenizer

TEXTS = [
    "  Two spaces,\n\na blank line \u2026 and a tab\t.",
    "\U0001f43b \x00 \u65e5\u672c\u8a9e e\u0301 \u202e",
    "121212 kites and 3 boats",
    "<unk> <0x41> <|endoftext",
    "\n",
    " ",
    "",
]
BEGINNINGS = ["Once upon a time", '"Can I play with you?" asked Mia.', "Ben and Sara went to the sea.\nThey saw"]


def test_transformers_gives_any_text_the_ids_of_our_vocabulary(smoke, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    export_transformers(save_blm(tmp_path, tokenizer))
    stories = list(itertools.islice(data.read_split(smoke.folder / "data", "train"), 50))
    for folder, vocabulary in ((tmp_path, tokenizer), (ROOT / "release", Tokenizer(ROOT / "release" / "tokenizer.model"))):
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        for text in TEXTS + stories:
            assert loaded(text)["input_ids"] == [vocabulary.eot, *vocabulary.encode(text)]
            assert loaded.decode(vocabulary.encode(text)) == text
        assert loaded.bos_token_id == loaded.eos_token_id == vocabulary.eot
        assert loaded(END_OF_TEXT, add_special_tokens=False)["input_ids"] == [vocabulary.eot]


def test_a_gguf_file_holds_the_vocabulary_and_every_weight(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install -e '.[comparison]'")
    model, tokenizer = load_model(ROOT / "release")
    export_gguf(ROOT / "release", tmp_path / "model.gguf", "f32")
    found = gguf.GGUFReader(tmp_path / "model.gguf")
    assert found.fields["tokenizer.ggml.tokens"].contents() == [tokenizer.piece(i) for i in range(len(tokenizer))]
    assert found.fields["tokenizer.ggml.scores"].contents() == [tokenizer.score(i) for i in range(len(tokenizer))]
    types = found.fields["tokenizer.ggml.token_type"].contents()
    assert [types.count(kind) for kind in (gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.BYTE)] == [1, 1, 256]
    weights = model.state_dict()
    assert len(found.tensors) == len(weights)
    for tensor, (name, weight) in zip(found.tensors, weights.items(), strict=True):  # in the same order
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            np.testing.assert_array_equal(tensor.data, weight.numpy())
    assert {"token_embd.weight", "output_norm.weight", "blk.0.ffn_up.weight"} < {tensor.name for tensor in found.tensors}


def test_rows_of_a_head_are_paired_with_those_half_a_head_further():
    rows = torch.arange(16.0)[:, None]  # two heads of eight
    assert interleaved(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_llama_cpp_writes_the_same_greedy_text_for_200_tokens(tmp_path, dtype):
    pytest.importorskip("gguf", reason="the package gguf is not installed: pip install -e '.[comparison]'")
    llama = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")
    export_gguf(ROOT / "release", tmp_path / "model.gguf", dtype)
    theirs = llama.Llama(str(tmp_path / "model.gguf"), n_ctx=512, verbose=False)
    model, tokenizer = load_model(ROOT / "release")
    for beginning in BEGINNINGS:
        ids = theirs.tokenize(beginning.encode())
        assert ids == [tokenizer.eot, *tokenizer.encode(beginning)]
        theirs.reset()
        steps = itertools.islice(theirs.generate(ids, temp=0), 200)
        written = list(itertools.takewhile(lambda token: token != tokenizer.eot, steps))
        (ours,) = complete(model, tokenizer, [beginning], Sampling(temperature=0, max_tokens=200))
        assert theirs.detokenize(written).decode() == ours
