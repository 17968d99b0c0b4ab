"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): 64 experts, eight for each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from flexgen_jax.models.family import ConfigError, Params
from flexgen_jax.models.layers import linear, split_heads
from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import MODULES
from flexgen_jax.models.sparse import SparseConfig, SparseDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoeConfig(SparseConfig):
    """``clip_qkv``: Elements of queries, keys and values lie between it and its negative."""

    clip_qkv: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_qkv is not None and not self.clip_qkv > 0:
            raise ConfigError(f"clip_qkv must be a positive number or null, got {self.clip_qkv!r}")


class Olmoe(SparseDecoder):
    """Queries and keys have a norm of their whole width."""

    model_types = ("olmoe",)
    architecture = "OlmoeForCausalLM"
    config_class = OlmoeConfig
    defaults = {  # noqa: RUF012 # read only
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "eos_token_id": 50279,
        "pad_token_id": 1,
    }
    names = {"moe_intermediate_size": "intermediate_size"}  # noqa: RUF012 # read only
    modules = {  # noqa: RUF012 # read only
        **MODULES,
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    }

    def norms(self, config: Any) -> dict[str, int]:
        return {
            **super().norms(config),
            "q_norm": config.num_attention_heads * config.head_dim,
            "k_norm": config.num_key_value_heads * config.head_dim,
        }

    def project(self, params: Params, x: Array, config: Any) -> tuple[Array, Array, Array]:
        query = self.normed(params, "q_norm", linear(params["q"], x), config)
        key = self.normed(params, "k_norm", linear(params["k"], x), config)
        value, most = linear(params["v"], x), config.clip_qkv
        if most is not None:
            query, key, value = (jnp.clip(part, -most, most) for part in (query, key, value))
        return (
            split_heads(query, config.num_attention_heads, config.head_dim),
            split_heads(key, config.num_key_value_heads, config.head_dim),
            split_heads(value, config.num_key_value_heads, config.head_dim),
        )


_OLMOE = OlmoeConfig(
    model_type="olmoe",
    vocab_size=50304,
    num_hidden_layers=16,
    hidden_size=2048,
    intermediate_size=1024,
    moe_intermediate_size=1024,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope=Rope(1e4, 128, 4096),
    num_experts=64,
    num_experts_per_tok=8,
    norm_topk_prob=False,
    eos_token_id=50279,
    pad_token_id=1,
)

PRESETS: Mapping[str, OlmoeConfig] = {
    "allenai/OLMoE-1B-7B-0924": _OLMOE,
    "allenai/OLMoE-1B-7B-0924-Instruct": _OLMOE,
}

FAMILY = Olmoe(PRESETS)
