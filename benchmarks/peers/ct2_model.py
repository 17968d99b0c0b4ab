"""Writes a Llama or an OPT for CTranslate2, whose own converter would want torch.

python -m peers.ct2_model HUGGING_FACE_DIRECTORY TARGET [int8]
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from ctranslate2.converters.utils import fuse_linear
from ctranslate2.specs import attention_spec, common_spec, transformer_spec

from peers.tensors import Tensors


def _linear(spec: Any, tensors: Tensors, name: str) -> None:
    spec.weight = tensors[f"{name}.weight"]
    if f"{name}.bias" in tensors:
        spec.bias = tensors[f"{name}.bias"]


def _norm(spec: Any, tensors: Tensors, name: str) -> None:
    spec.gamma = tensors[f"{name}.weight"]
    if f"{name}.bias" in tensors:
        spec.beta = tensors[f"{name}.bias"]


def _attention(spec: Any, tensors: Tensors, name: str, out: str) -> None:
    parts = [common_spec.LinearSpec() for _ in range(3)]
    for part, letter in zip(parts, "qkv", strict=True):
        _linear(part, tensors, f"{name}.{letter}_proj")
    fuse_linear(spec.linear[0], parts)
    _linear(spec.linear[1], tensors, f"{name}.{out}")


def llama(tensors: Tensors) -> Any:
    c = tensors.config
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    scaling = c.get("rope_scaling") or {}
    kind = attention_spec.RotaryScalingType.Llama3 if scaling else None
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        c["num_hidden_layers"],
        heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_scaling_type=kind,
        rotary_scaling_factor=scaling.get("factor", 1),
        rotary_base=c["rope_theta"],
        num_heads_kv=None if kv_heads == heads else kv_heads,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = tensors["model.embed_tokens.weight"]
    _norm(decoder.layer_norm, tensors, "model.norm")
    for i, layer in enumerate(decoder.layer):
        name = f"model.layers.{i}"
        _norm(layer.self_attention.layer_norm, tensors, f"{name}.input_layernorm")
        _norm(layer.ffn.layer_norm, tensors, f"{name}.post_attention_layernorm")
        _attention(layer.self_attention, tensors, f"{name}.self_attn", "o_proj")
        _linear(layer.ffn.linear_0, tensors, f"{name}.mlp.gate_proj")
        _linear(layer.ffn.linear_0_noact, tensors, f"{name}.mlp.up_proj")
        _linear(layer.ffn.linear_1, tensors, f"{name}.mlp.down_proj")
        if scaling:
            for bound in ("low", "high"):
                value = np.dtype("float32").type(scaling[f"{bound}_freq_factor"])
                setattr(layer.self_attention, f"rotary_{bound}_freq_factor", value)
    head = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    decoder.projection.weight = tensors[head]
    spec.config.layer_norm_epsilon = c["rms_norm_eps"]
    return spec


def opt(tensors: Tensors) -> Any:
    c = tensors.config
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        c["num_hidden_layers"],
        c["num_attention_heads"],
        pre_norm=c["do_layer_norm_before"],
        activation=common_spec.Activation.RELU,
    )
    decoder, root = spec.decoder, "model.decoder"
    decoder.scale_embeddings = False
    # Positions are counted from 2.
    decoder.position_encodings.encodings = tensors[f"{root}.embed_positions.weight"][2:]
    decoder.embeddings.weight = tensors[f"{root}.embed_tokens.weight"]
    _norm(decoder.layer_norm, tensors, f"{root}.final_layer_norm")
    for i, layer in enumerate(decoder.layer):
        name = f"{root}.layers.{i}"
        _norm(layer.self_attention.layer_norm, tensors, f"{name}.self_attn_layer_norm")
        _norm(layer.ffn.layer_norm, tensors, f"{name}.final_layer_norm")
        _attention(layer.self_attention, tensors, f"{name}.self_attn", "out_proj")
        _linear(layer.ffn.linear_0, tensors, f"{name}.fc1")
        _linear(layer.ffn.linear_1, tensors, f"{name}.fc2")
    decoder.projection.weight = tensors[f"{root}.embed_tokens.weight"]
    return spec


def main() -> None:
    source, target, *precision = sys.argv[1:]
    tensors = Tensors(source)
    spec = {"llama": llama, "opt": opt}[tensors.config["model_type"]](tensors)
    # Tokens are given by their numbers.
    spec.register_vocabulary([str(i) for i in range(tensors.config["vocab_size"])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize(quantization=precision[0] if precision else None)
    os.makedirs(target, exist_ok=True)
    spec.save(target)


if __name__ == "__main__":
    main()
