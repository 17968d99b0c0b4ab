"""Llama 2 and 3 (Touvron et al. 2023, arXiv 2307.09288; 2024, arXiv 2407.21783), and SmolLM2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import RotaryConfig, RotaryDecoder


class Llama(RotaryDecoder):
    """See the module."""

    model_types = ("llama",)
    architecture = "LlamaForCausalLM"


def _llama(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, **more: Any
) -> RotaryConfig:
    head_dim, theta = hidden // heads, more.pop("theta", 1e4)
    positions = more.setdefault("max_position_embeddings", 4096)
    scaling = more.pop("scaling", None)
    numbers = () if scaling is None else tuple(sorted(scaling.items()))
    kind = "default" if scaling is None else "llama3"
    return RotaryConfig(
        model_type="llama",
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope=Rope(theta, head_dim, positions, kind, numbers),
        **{"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, **more},
    )


def _llama3(
    layers: int, hidden: int, ffn: int, heads: int, factor: float = 8.0, **more: Any
) -> RotaryConfig:
    return _llama(
        layers,
        hidden,
        ffn,
        heads,
        8,
        vocab_size=128256,
        max_position_embeddings=131072,
        theta=5e5,
        scaling={
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=128000,
        **{"eos_token_id": 128001, **more},
    )


def _smol(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, theta: float = 1e5) -> Any:
    return _llama(
        layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        vocab_size=49152,
        max_position_embeddings=8192,
        theta=theta,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


_INSTRUCT: dict[str, Any] = {"eos_token_id": (128001, 128008, 128009)}

PRESETS: Mapping[str, RotaryConfig] = {
    "meta-llama/Llama-2-7b-hf": _llama(32, 4096, 11008, 32, 32),
    "meta-llama/Llama-2-13b-hf": _llama(40, 5120, 13824, 40, 40),
    "meta-llama/Llama-2-70b-hf": _llama(80, 8192, 28672, 64, 8),
    "meta-llama/Llama-3.1-8B": _llama3(32, 4096, 14336, 32),
    "meta-llama/Llama-3.1-8B-Instruct": _llama3(32, 4096, 14336, 32, **_INSTRUCT),
    "meta-llama/Llama-3.1-70B": _llama3(80, 8192, 28672, 64),
    "meta-llama/Llama-3.1-405B": _llama3(126, 16384, 53248, 128),
    "meta-llama/Llama-3.2-1B": _llama3(16, 2048, 8192, 32, 32.0, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B": _llama3(28, 3072, 8192, 24, 32.0, tie_word_embeddings=True),
    "meta-llama/Llama-3.3-70B-Instruct": _llama3(80, 8192, 28672, 64, **_INSTRUCT),
    "HuggingFaceTB/SmolLM2-135M": _smol(30, 576, 1536, 9, 3),
    "HuggingFaceTB/SmolLM2-360M": _smol(32, 960, 2560, 15, 5),
    "HuggingFaceTB/SmolLM2-1.7B": _smol(24, 2048, 8192, 32, 32, theta=1.3e5),
}

FAMILY = Llama(PRESETS)
