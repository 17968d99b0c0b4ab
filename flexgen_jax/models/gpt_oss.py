"""gpt-oss (OpenAI 2025, arXiv 2508.10925): clamped experts with biases, and attention sinks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexgen_jax.models.family import Param, Params, Source, Unit, bias, matrix
from flexgen_jax.models.layers import linear
from flexgen_jax.models.rope import Rope, read_rope
from flexgen_jax.models.rotary import FULL, SLIDING
from flexgen_jax.models.sparse import SparseConfig, SparseDecoder

# Where a config.json says nothing of them.
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(SparseConfig):
    """``swiglu_limit``: What experts clamp to; ``swiglu_alpha``: how steep their sigmoid is."""

    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0


class GptOss(SparseDecoder):
    """Gate and up are one matrix, of which every other column is the gate."""

    model_types = ("gpt_oss",)
    architecture = "GptOssForCausalLM"
    published_as = MappingProxyType({"quant_method": "mxfp4"})  # of the experts
    config_class = GptOssConfig
    rope_theta = 150_000.0
    defaults = {  # noqa: RUF012 # read only
        "head_dim": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 128,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "eos_token_id": None,
    }
    names = {  # noqa: RUF012 # read only
        "num_experts": "num_local_experts",
        "moe_intermediate_size": "intermediate_size",
    }
    sparse_modules = {"router": "mlp.router"}  # noqa: RUF012 # read only
    expert_modules = {  # noqa: RUF012 # read only
        "gate_up": "mlp.experts.gate_up_proj",
        "down": "mlp.experts.down_proj",
    }

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return super().fields({**values, "norm_topk_prob": True})

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        count = values["num_hidden_layers"]
        if values.get("layer_types") is not None or type(count) is not int:
            return super().layer_types(values)
        return tuple(FULL if i % 2 else SLIDING for i in range(min(count, 1025)))

    def read_rope(self, values: Mapping[str, Any], head_dim: int) -> Rope:
        if "rope_scaling" not in values and values.get("rope_parameters") is None:
            values = {**values, "rope_scaling": _YARN}
        positions = values["max_position_embeddings"]
        return read_rope(values, dim=head_dim, max_positions=positions, theta=self.rope_theta)

    def write(self, config: Any) -> dict[str, Any]:
        values = super().write(config)
        del values["norm_topk_prob"]
        full = [FULL] * config.num_hidden_layers
        return {**values, "layer_types": list(config.layer_types) or full}

    def params(self, config: Any, unit: Unit) -> dict[str, Param]:
        found = super().params(config, unit)
        if unit.kind.role == "decoder":
            found["attention.sinks"] = bias(config.num_attention_heads)
        return found

    def sparse_params(self, config: Any) -> dict[str, Param]:
        return {**super().sparse_params(config), "router.bias": bias(config.num_experts)}

    def expert_params(self, config: Any) -> dict[str, Param]:
        hidden, ffn = config.hidden_size, config.moe_intermediate_size
        return {
            "gate_up.kernel": matrix(hidden, 2 * ffn),
            "gate_up.bias": bias(2 * ffn),
            "down.kernel": matrix(ffn, hidden),
            "down.bias": bias(hidden),
        }

    def source(self, config: Any, name: str) -> Source:
        unit, *parts = name.split(".")
        layer, experts, _ = unit.removeprefix("layer_").partition("_experts_")
        if parts == ["attention", "sinks"]:
            return Source(f"model.layers.{layer}.self_attn.sinks")
        if not experts:
            return super().source(config, name)
        number, module, leaf = parts
        key = f"model.layers.{layer}.{self.expert_modules[module]}"
        key = f"{key}_bias" if leaf == "bias" else key
        return Source(key, expert=int(number.removeprefix("expert_")))

    def sinks(self, params: Params) -> Float[Array, " heads"]:
        sinks: Array = params["attention"]["sinks"]
        return sinks

    def expert(
        self, params: Params, inputs: Float[Array, "rows hidden"], config: Any
    ) -> Float[Array, "rows hidden"]:
        both = linear(params["gate_up"], inputs)
        gate = jnp.minimum(both[..., ::2], config.swiglu_limit)
        up = jnp.clip(both[..., 1::2], -config.swiglu_limit, config.swiglu_limit)
        gate = gate * jax.nn.sigmoid(gate * config.swiglu_alpha)
        return linear(params["down"], (up + 1) * gate)


def _gpt_oss(layers: int, experts: int) -> GptOssConfig:
    numbers = {k: v for k, v in _YARN.items() if k != "rope_type"}
    return GptOssConfig(
        model_type="gpt_oss",
        vocab_size=201088,
        num_hidden_layers=layers,
        hidden_size=2880,
        intermediate_size=2880,
        moe_intermediate_size=2880,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=Rope(150_000.0, 64, 131072, "yarn", tuple(sorted(numbers.items()))),
        attention_bias=True,
        sliding_window=128,
        layer_types=tuple(FULL if i % 2 else SLIDING for i in range(layers)),
        num_experts=experts,
        num_experts_per_tok=4,
        eos_token_id=(200002, 199999),
        pad_token_id=199999,
    )


PRESETS: Mapping[str, GptOssConfig] = {
    "openai/gpt-oss-20b": _gpt_oss(24, 32),
    "openai/gpt-oss-120b": _gpt_oss(36, 128),
}

FAMILY = GptOss(PRESETS)
