"""Qwen1.5-MoE and Qwen2 with experts (Yang et al. 2024, arXiv 2407.10671): one more for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexgen_jax.models.family import Param, Params, matrix, positive
from flexgen_jax.models.layers import gated_mlp, linear
from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import FULL, SLIDING
from flexgen_jax.models.sparse import SparseConfig, SparseDecoder, dense_by_step, gated_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(SparseConfig):
    """``shared_expert_intermediate_size``: Width of the expert that all tokens take."""

    shared_expert_intermediate_size: int
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "shared_expert_intermediate_size")


class Qwen2Moe(SparseDecoder):
    """What the shared expert adds has a gate of its own."""

    model_types = ("qwen2_moe",)
    architecture = "Qwen2MoeForCausalLM"
    config_class = Qwen2MoeConfig
    defaults = {  # noqa: RUF012 # read only
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
        "eos_token_id": None,
    }
    sparse_modules = {  # noqa: RUF012 # read only
        "router": "mlp.gate",
        "shared.gate": "mlp.shared_expert.gate_proj",
        "shared.up": "mlp.shared_expert.up_proj",
        "shared.down": "mlp.shared_expert.down_proj",
        "shared_gate": "mlp.shared_expert_gate",
    }

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        if not values.get("use_sliding_window"):
            return ()
        return super().layer_types(values) or _every_other(values)

    def dense_layers(self, values: Mapping[str, Any]) -> tuple[int, ...]:
        return dense_by_step(values)

    def write(self, config: Any) -> dict[str, Any]:
        return {
            **super().write(config),
            "mlp_only_layers": list(config.dense_layers),
            "decoder_sparse_step": 1,
            "use_sliding_window": config.sliding_window is not None,
        }

    def biased(self, config: Any, module: str) -> bool:
        return config.qkv_bias and module in ("q", "k", "v")

    def sparse_params(self, config: Any) -> dict[str, Param]:
        hidden, ffn = config.hidden_size, config.shared_expert_intermediate_size
        return {
            **super().sparse_params(config),
            **gated_params("shared.", hidden, ffn),
            "shared_gate.kernel": matrix(hidden, 1)._replace(quantized=False),
        }

    def shared(
        self, params: Params, x: Float[Array, "batch seq hidden"], config: Any
    ) -> Float[Array, "batch seq hidden"]:
        gate = jax.nn.sigmoid(linear(params["shared_gate"], x).astype(jnp.float32))
        return gate.astype(x.dtype) * gated_mlp(params["shared"], x, config.hidden_act)


def _every_other(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Layer types where ``use_sliding_window`` alone gives some of the lower layers a window."""
    count, most = values["num_hidden_layers"], values.get("max_window_layers", 28)
    if values.get("sliding_window") is None or type(count) is not int or type(most) is not int:
        return ()
    return tuple(FULL if i % 2 or i >= most else SLIDING for i in range(min(count, 1025)))


def _qwen2_moe(
    layers: int,
    hidden: int,
    ffn: int,
    width: int,
    shared: int,
    heads: int,
    kv_heads: int,
    experts: int,
    chosen: int,
    positions: int,
) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(
        model_type="qwen2_moe",
        vocab_size=151936,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=shared,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        rope=Rope(1e6, hidden // heads, positions),
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=False,
        bos_token_id=151643,
        eos_token_id=151643,
    )


PRESETS: Mapping[str, Qwen2MoeConfig] = {
    "Qwen/Qwen1.5-MoE-A2.7B": _qwen2_moe(24, 2048, 5632, 1408, 5632, 16, 16, 60, 4, 8192),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": _qwen2_moe(24, 2048, 5632, 1408, 5632, 16, 16, 60, 4, 8192),
    "Qwen/Qwen2-57B-A14B": _qwen2_moe(28, 3584, 18944, 2560, 20480, 28, 4, 64, 8, 131072),
    "Qwen/Qwen2-57B-A14B-Instruct": _qwen2_moe(28, 3584, 18944, 2560, 20480, 28, 4, 64, 8, 32768),
}

FAMILY = Qwen2Moe(PRESETS)
