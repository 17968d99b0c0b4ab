"""Writes a Llama as GGUF, without a vocabulary: prompts are numbers of tokens.

python -m peers.gguf_model HUGGING_FACE_DIRECTORY TARGET F32|BF16|Q8_0|Q4_0
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import gguf
import numpy as np

from peers.job import CannotRun
from peers.tensors import Tensors

_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _in_pairs(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from halves, as Hugging Face turns them, to pairs, as GGUF's Llama does."""
    return kernel.reshape(heads, 2, -1, kernel.shape[1]).swapaxes(1, 2).reshape(kernel.shape)


def _named(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    c = tensors.config
    yield "token_embd.weight", tensors["model.embed_tokens.weight"]
    yield "output_norm.weight", tensors["model.norm.weight"]
    if "lm_head.weight" in tensors:
        yield "output.weight", tensors["lm_head.weight"]
    heads = {"attn_q": c["num_attention_heads"], "attn_k": c["num_key_value_heads"]}
    for layer in range(c["num_hidden_layers"]):
        for ours, theirs in _PARTS.items():
            values = tensors[f"model.layers.{layer}.{theirs}.weight"]
            if ours in heads:
                values = _in_pairs(values, heads[ours])
            yield f"blk.{layer}.{ours}.weight", values


def _frequencies(c: dict) -> np.ndarray | None:
    """What the rotary frequencies are divided by: Llama 3's scaling, one for each pair."""
    scaling = c.get("rope_scaling")
    if not scaling:
        return None
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    turns = c["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    seen = scaling["original_max_position_embeddings"] * turns
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip((seen - low) / (high - low), 0, 1)
    return (1 / (share + (1 - share) / scaling["factor"])).astype(np.float32)


def write(source: str, target: str, kind: str) -> None:
    """Writes ``target``; matrices of ``kind``, norms in float32.

    Raises:
        CannotRun: of this family llama.cpp has no model.
    """
    tensors = Tensors(source)
    c = tensors.config
    if c["model_type"] != "llama":
        raise CannotRun(f"llama.cpp has no model of the family {c['model_type']}")
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_rope_dimension_count(
        c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    )
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    frequencies = _frequencies(c)
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", frequencies)
    coded = gguf.GGMLQuantizationType[kind]
    for name, values in _named(tensors):
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, coded), raw_dtype=coded)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(*sys.argv[1:])
