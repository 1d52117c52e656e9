"""The model as one GGUF file for llama.cpp, through llama.cpp's own package `gguf`.

- Architecture `llama`; the sentencepiece vocabulary with its scores and types
- Matrices as f32, f16, bf16 or q8_0 (blocks of 32 along a row share a scale); norms stay float32, as llama.cpp wants them
- One character differs: a literal U+2581 is a space in llama.cpp and three bytes here
"""

from pathlib import Path

from torch import Tensor

from blm_core.checkpoint import load_model
from blm_core.files import written_aside


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
