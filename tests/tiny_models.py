"""Models small enough to build in a test: GPT-2 in transformers' folder layout, and a BLM in ours, both with random weights."""

from pathlib import Path

import torch

from blm_core.checkpoint import save_model
from blm_core.config import ModelConfig
from blm_core.model import LanguageModel
from blm_core.tokenizer import Tokenizer

LESSON = ["a fox and a hen went to the hill. the fox saw the hen, and the hen saw the fox."] * 20


def save_gpt2(folder: Path, seq_len: int = 64) -> Path:
    """GPT-2 with two layers and a byte-level vocabulary in which " fox" and "the" are tokens."""
    from tokenizers import Tokenizer as Vocabulary
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = Vocabulary(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    vocabulary.train_from_iterator(LESSON, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    torch.manual_seed(0)
    shape = {"n_positions": seq_len, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **shape))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def save_blm(folder: Path, tokenizer: Tokenizer, seq_len: int = 64) -> Path:
    config = ModelConfig(
        vocab_size=len(tokenizer), n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=seq_len, init_std=0.3
    )
    save_model(folder, LanguageModel(config, seed=0), tokenizer)
    return folder
