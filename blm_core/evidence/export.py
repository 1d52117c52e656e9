"""The model as one GGUF file for llama.cpp, through llama.cpp's own package `gguf`.

- Architecture `llama`; the sentencepiece vocabulary with its scores and types
- Matrices as f32, f16, bf16 or q8_0 (blocks of 32 along a row share a scale); norms stay float32, as llama.cpp wants them
- One character differs: a literal U+2581 is a space in llama.cpp and three bytes here
"""

from pathlib import Path

from torch import Tensor

from blm_core.checkpoint import load_model
from blm_core.files import written_aside

DTYPES = ("f32", "f16", "bf16", "q8_0")
NAMES = {  # ours: those of GGUF
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """Our name of a tensor as GGUF's: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    ends = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in ends:
        return ends[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a query or key matrix in the order of GGUF's `llama`, which rotates neighbours and not halves of a head."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def export_gguf(folder: Path, path: Path, dtype: str = "f16") -> None:
    """Write the model in `folder` to `path`, matrices as one of DTYPES. Raises CheckpointError and ValueError."""
    import gguf

    if dtype not in DTYPES:
        raise ValueError(f"{dtype} is no type of this export; name one of {', '.join(DTYPES)}.")
    model, tokenizer = load_model(folder)
    c, kind = model.config, gguf.GGMLQuantizationType[dtype.upper()]
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
            form = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
            # A row that no blocks of 32 fill stays in f16.
            form = gguf.GGMLQuantizationType.F16 if dtype == "q8_0" and weight.shape[-1] % 32 and weight.ndim == 2 else form
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight.numpy(), form), raw_dtype=form)
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
