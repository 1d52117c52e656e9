"""What the transformers library needs beside weights, so that `AutoTokenizer` gives the ids that our vocabulary gives.

A sentencepiece BPE merges the pair whose joined piece has the best score. The fast tokenizers merge the pair of the best
rank, so every way of joining two pieces to a third becomes a merge with the rank of the third.

One character differs: a literal U+2581, which sentencepiece uses for a space, is a space there and three bytes here.
"""

from blm_core import END_OF_TEXT
from blm_core.generate import Sampling
from blm_core.tokenizer import SPACE_MARK, Tokenizer


def merges(tokenizer: Tokenizer) -> list[list[str]]:
    """The pairs of pieces that may be joined, best first."""
    pieces = {tokenizer.piece(i): i for i in range(len(tokenizer))}
    normal = sorted((i for i in pieces.values() if tokenizer.is_normal(i)), key=tokenizer.score, reverse=True)
    found = []
    for piece in map(tokenizer.piece, normal):
        pairs = [[piece[:i], piece[i:]] for i in range(1, len(piece)) if piece[:i] in pieces and piece[i:] in pieces]
        found += sorted(pairs, key=lambda pair: [pieces[part] for part in pair])
    return found


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """`tokenizer.json` of the tokenizers library. Encoding with special tokens puts `<|endoftext|>` in front."""
    eot = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    newline = next(i for i in range(len(tokenizer)) if tokenizer.piece(i) == "\n")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokenizer.eot, "content": END_OF_TEXT, **flags, "special": True},
            {"id": newline, "content": "\n", **flags, "special": False},
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [eot, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [eot, {"Sequence": {"id": "A", "type_id": 0}}, eot, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [tokenizer.eot], "tokens": [END_OF_TEXT]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.piece(0),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {tokenizer.piece(i): i for i in range(len(tokenizer))},
            "merges": [" ".join(pair) for pair in merges(tokenizer)],
        },
    }


def tokenizer_config(seq_len: int) -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }


def generation_config(eot: int) -> dict:
    """The settings that `generate` has by default."""
    sampling = Sampling()
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "pad_token_id": eot,
    }
