"""Qwen3 (Yang et al. 2025, arXiv 2505.09388): a norm of each query's and key's head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from flexgen_jax.models.family import Params
from flexgen_jax.models.qwen2 import windows_above
from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import MODULES, RotaryConfig, RotaryDecoder


class HeadNorms(RotaryDecoder):
    """Queries and keys have a norm, head by head."""

    modules = {  # noqa: RUF012 # read only
        **MODULES,
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    }

    def norms(self, config: Any) -> dict[str, int]:
        return {**super().norms(config), "q_norm": config.head_dim, "k_norm": config.head_dim}

    def project(self, params: Params, x: Array, config: Any) -> tuple[Array, Array, Array]:
        query, key, value = super().project(params, x, config)
        query = self.normed(params, "q_norm", query, config)
        return query, self.normed(params, "k_norm", key, config), value


class Qwen3(HeadNorms):
    """See the module."""

    model_types = ("qwen3",)
    architecture = "Qwen3ForCausalLM"
    defaults = {  # noqa: RUF012 # read only
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "eos_token_id": None,
    }

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        return super().layer_types(values) or windows_above(values)

    def write(self, config: RotaryConfig) -> dict[str, Any]:
        return {**super().write(config), "use_sliding_window": config.sliding_window is not None}


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool = False) -> RotaryConfig:
    return RotaryConfig(
        model_type="qwen3",
        vocab_size=151936,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope=Rope(1e6, 128, 40960),
        tie_word_embeddings=tied,
        bos_token_id=151643,
        eos_token_id=(151645, 151643),
    )


PRESETS: Mapping[str, RotaryConfig] = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 9728, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 12288, 32),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 17408, 40),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 25600, 64),
}

FAMILY = Qwen3(PRESETS)
