"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral with eight experts, two for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import all_windows
from flexgen_jax.models.sparse import SparseConfig, SparseDecoder


class Mixtral(SparseDecoder):
    """See the module."""

    model_types = ("mixtral",)
    architecture = "MixtralForCausalLM"
    rope_theta = 1e6
    defaults = {  # noqa: RUF012 # read only
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
    names = {  # noqa: RUF012 # read only
        "num_experts": "num_local_experts",
        "moe_intermediate_size": "intermediate_size",
    }
    sparse_modules = {"router": "block_sparse_moe.gate"}  # noqa: RUF012 # read only
    expert_modules = {  # noqa: RUF012 # read only
        "gate": "block_sparse_moe.experts.{}.w1",
        "up": "block_sparse_moe.experts.{}.w3",
        "down": "block_sparse_moe.experts.{}.w2",
    }

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return super().fields({**values, "norm_topk_prob": True})

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        return all_windows(values)

    def write(self, config: Any) -> dict[str, Any]:
        values = super().write(config)
        del values["norm_topk_prob"]
        values.pop("layer_types", None)
        return values


def _mixtral(
    layers: int, hidden: int, ffn: int, heads: int, positions: int, vocab: int = 32000
) -> SparseConfig:
    return SparseConfig(
        model_type="mixtral",
        vocab_size=vocab,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        moe_intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope=Rope(1e6, 128, positions),
        num_experts=8,
        num_experts_per_tok=2,
        bos_token_id=1,
        eos_token_id=2,
    )


PRESETS: Mapping[str, SparseConfig] = {
    "mistralai/Mixtral-8x7B-v0.1": _mixtral(32, 4096, 14336, 32, 32768),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _mixtral(32, 4096, 14336, 32, 32768),
    "mistralai/Mixtral-8x22B-v0.1": _mixtral(56, 6144, 16384, 48, 65536),
    "mistralai/Mixtral-8x22B-Instruct-v0.1": _mixtral(56, 6144, 16384, 48, 65536, 32768),
}

FAMILY = Mixtral(PRESETS)
