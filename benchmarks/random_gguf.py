"""A GGUF of random 4-bit weights with a model's shapes, for timing llama.cpp. Needs ``gguf``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_BLOCK, _BLOCK_NBYTES = 32, 18
_SCALE = 0.0046  # codes from -7 to 7: a standard deviation of 0.02
_ARCHITECTURES = {"qwen3_moe": "qwen3moe", "olmoe": "olmoe"}


def _tensors(config: dict[str, Any], arch: str) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, shape, whether it is in codes), as llama.cpp wants them."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads, width = config["num_key_value_heads"], config["moe_intermediate_size"]
    count = config["num_experts"]
    yield "token_embd.weight", (config["vocab_size"], hidden), True
    yield "output.weight", (config["vocab_size"], hidden), True
    yield "output_norm.weight", (hidden,), False
    # OLMoE's norms are of all heads together.
    norms = (head_dim, head_dim) if arch == "qwen3moe" else (heads * head_dim, kv_heads * head_dim)
    for layer in range(config["num_hidden_layers"]):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (hidden,), False
        yield block + "ffn_norm.weight", (hidden,), False
        yield block + "attn_q_norm.weight", norms[:1], False
        yield block + "attn_k_norm.weight", norms[1:], False
        yield block + "attn_q.weight", (heads * head_dim, hidden), True
        yield block + "attn_k.weight", (kv_heads * head_dim, hidden), True
        yield block + "attn_v.weight", (kv_heads * head_dim, hidden), True
        yield block + "attn_output.weight", (hidden, heads * head_dim), True
        yield block + "ffn_gate_inp.weight", (count, hidden), False
        yield block + "ffn_gate_exps.weight", (count, width, hidden), True
        yield block + "ffn_up_exps.weight", (count, width, hidden), True
        yield block + "ffn_down_exps.weight", (count, hidden, width), True


def write_random(config_file: Path, path: Path, seed: int = 0) -> None:
    """Writes ``path``: Q4_0 matrices, float32 norms and routers, no vocabulary."""
    config = json.loads(config_file.read_text())
    config.setdefault("moe_intermediate_size", config.get("intermediate_size"))
    arch = _ARCHITECTURES[config["model_type"]]
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_value_length(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta", 10_000.0))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(seed)
    kept = list(_tensors(config, arch))
    for name, shape, coded in kept:
        raw = gguf.GGMLQuantizationType.Q4_0 if coded else gguf.GGMLQuantizationType.F32
        size = int(np.prod(shape))
        nbytes = size // _BLOCK * _BLOCK_NBYTES if coded else size * 4
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, coded in kept:
        size = int(np.prod(shape))
        if coded:
            # From -7 to 7: a mean other than zero would make all tokens alike, and choose the same
            # experts.
            low, high = rng.integers(1, 16, (2, size // _BLOCK, _BLOCK_NBYTES), np.uint8)
            data = low | (high << 4)
            data[:, :2] = np.array([_SCALE], np.float16).view(np.uint8)
        elif "norm" in name:
            data = np.ones(shape, np.float32)
        else:
            data = rng.normal(0, 0.02, shape).astype(np.float32)
        writer.write_tensor_data(data)
    writer.close()
