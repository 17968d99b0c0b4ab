"""Qwen3 with experts (Yang et al. 2025, arXiv 2505.09388): 128 of them, eight for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_jax.models.qwen3 import HeadNorms
from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import all_windows
from flexgen_jax.models.sparse import SparseConfig, SparseDecoder, dense_by_step


class Qwen3Moe(HeadNorms, SparseDecoder):
    """Attention as in :mod:`~flexgen_jax.models.qwen3`."""

    model_types = ("qwen3_moe",)
    architecture = "Qwen3MoeForCausalLM"
    defaults = {  # noqa: RUF012 # read only
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "eos_token_id": None,
    }

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        return all_windows(values) if values.get("use_sliding_window") else ()

    def dense_layers(self, values: Mapping[str, Any]) -> tuple[int, ...]:
        return dense_by_step(values)

    def write(self, config: Any) -> dict[str, Any]:
        values = {k: v for k, v in super().write(config).items() if k != "layer_types"}
        return {
            **values,
            "mlp_only_layers": list(config.dense_layers),
            "decoder_sparse_step": 1,
            "use_sliding_window": config.sliding_window is not None,
        }


def _qwen3_moe(
    layers: int, hidden: int, ffn: int, width: int, heads: int, positions: int, theta: float
) -> SparseConfig:
    return SparseConfig(
        model_type="qwen3_moe",
        vocab_size=151936,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        moe_intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=positions,
        rope=Rope(theta, 128, positions),
        num_experts=128,
        num_experts_per_tok=8,
        bos_token_id=151643,
        eos_token_id=(151645, 151643),
    )


PRESETS: Mapping[str, SparseConfig] = {
    "Qwen/Qwen3-30B-A3B": _qwen3_moe(48, 2048, 6144, 768, 32, 40960, 1e6),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _qwen3_moe(48, 2048, 6144, 768, 32, 262144, 1e7),
    "Qwen/Qwen3-235B-A22B": _qwen3_moe(94, 4096, 12288, 1536, 64, 40960, 1e6),
    "Qwen/Qwen3-235B-A22B-Instruct-2507": _qwen3_moe(94, 4096, 12288, 1536, 64, 262144, 5e6),
}

FAMILY = Qwen3Moe(PRESETS)
