"""The model for other programs: transformers and llama.cpp.

- transformers loads the saved folder as it is; what is added is a vocabulary for its fast tokenizers and how to sample
- llama.cpp takes one GGUF file, written through its own package `gguf`: the architecture `llama`, the sentencepiece vocabulary
  with its scores and types, matrices as f32, f16, bf16 or q8_0 (blocks of 32 along a row share a scale), norms as f32
- One character differs: a literal U+2581, which sentencepiece uses for a space, is three bytes for us and a space for both
"""

from pathlib import Path

from torch import Tensor

from blm_core import END_OF_TEXT
from blm_core.checkpoint import load_model
from blm_core.files import write_json, written_aside
from blm_core.generate import Sampling
from blm_core.tokenizer import SPACE_MARK, Tokenizer


def export_transformers(folder: Path) -> None:
    """Add to the model in `folder` what `AutoTokenizer` and `generate` need. Raises CheckpointError.

    A text gets the ids of our vocabulary, with `<|endoftext|>` in front of it.
    """
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as FastTokenizer

    model, tokenizer = load_model(folder)
    pieces = {tokenizer.piece(i): i for i in range(len(tokenizer))}
    merges = _merges(tokenizer, pieces)
    fast = FastTokenizer(models.BPE(pieces, merges, unk_token=tokenizer.piece(0), fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", SPACE_MARK)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.post_processor = processors.TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.eot)])
    fast.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    fast.add_tokens([AddedToken("\n", normalized=False)])
    fast.save(str(Path(folder) / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    config |= {"model_max_length": model.config.seq_len, "model_input_names": ["input_ids", "attention_mask"]}
    write_json(Path(folder) / "tokenizer_config.json", config)
    defaults = {"do_sample": True, **{name: getattr(Sampling(), name) for name in ("temperature", "top_p", "top_k")}}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
    write_json(Path(folder) / "generation_config.json", defaults | special)


def _merges(tokenizer: Tokenizer, pieces: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that may be joined, best first.

    sentencepiece joins the pair whose joined piece has the best score, the fast tokenizers the pair of the best rank: every
    way of making a piece of two others gets the rank of that piece.
    """
    merges = []
    for joined in sorted(filter(tokenizer.is_normal, pieces.values()), key=tokenizer.score, reverse=True):
        piece = tokenizer.piece(joined)
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in pieces and piece[i:] in pieces]
        merges += sorted(pairs, key=lambda pair: [pieces[part] for part in pair])
    return merges


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a query or key matrix in the order of GGUF's `llama`, which rotates neighbours and not halves of a head."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def export_gguf(folder: Path, path: Path, dtype: str = "f16") -> None:
    """Write the model in `folder` to `path`, matrices as "f32", "f16", "bf16" or "q8_0". Raises CheckpointError."""
    import gguf
    from gguf import GGMLQuantizationType as Form

    model, tokenizer = load_model(folder)
    c, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.n_layers)
    with written_aside(path) as aside:
        writer = gguf.GGUFWriter(aside, "llama")
        writer.add_name("BLM")
        writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(dtype, f"MOSTLY_{dtype.upper()}")])
        writer.add_vocab_size(c.vocab_size)
        writer.add_context_length(c.seq_len)
        writer.add_embedding_length(c.d_model)
        writer.add_block_count(c.n_layers)
        writer.add_feed_forward_length(c.d_ff)
        writer.add_head_count(c.n_heads)
        writer.add_head_count_kv(c.n_kv_heads)
        writer.add_key_length(c.d_head)
        writer.add_value_length(c.d_head)
        writer.add_rope_dimension_count(c.d_head)
        writer.add_rope_freq_base(c.rope_base)
        writer.add_layer_norm_rms_eps(c.norm_eps)
        _add_vocabulary(writer, tokenizer, gguf.TokenType)
        for name, weight in model.state_dict().items():
            for part, heads in (("q_proj", c.n_heads), ("k_proj", c.n_kv_heads)):
                weight = interleaved(weight, heads) if part in name else weight
            form = Form[dtype.upper()] if weight.ndim == 2 else Form.F32
            if form == Form.Q8_0 and weight.shape[-1] % 32:  # a row that no blocks of 32 fill
                form = Form.F16
            writer.add_tensor(names.get_name(name, (".weight",)), gguf.quants.quantize(weight.numpy(), form), raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_vocabulary(writer, tokenizer, types) -> None:
    """Pieces, scores and types; `<|endoftext|>` begins and ends a text, and no space is put in front of one."""
    pieces = [tokenizer.piece(i) for i in range(len(tokenizer))]
    special = {0: types.UNKNOWN, tokenizer.eot: types.CONTROL, pieces.index("\n"): types.USER_DEFINED}
    kinds = [special.get(i, types.NORMAL if tokenizer.is_normal(i) else types.BYTE) for i in range(len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([tokenizer.score(i) for i in range(len(pieces))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
