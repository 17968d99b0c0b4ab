"""OLMo 2 (OLMo Team 2024, arXiv 2501.00656): norms after each half of a layer, none before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from flexgen_jax.models.family import Kind, Params
from flexgen_jax.models.layers import gated_mlp, linear, merge_heads, split_heads
from flexgen_jax.models.positions import Positions
from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import MODULES, RotaryConfig, RotaryDecoder


class Olmo2(RotaryDecoder):
    """Queries and keys have a norm of their whole width."""

    model_types = ("olmo2",)
    architecture = "Olmo2ForCausalLM"
    defaults = {"rms_norm_eps": 1e-5, "eos_token_id": 50279}  # noqa: RUF012 # read only
    modules = {  # noqa: RUF012 # read only
        **{k: v for k, v in MODULES.items() if k not in ("attention_norm", "mlp_norm")},
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }

    def norms(self, config: Any) -> dict[str, int]:
        return {
            "q_norm": config.num_attention_heads * config.head_dim,
            "k_norm": config.num_key_value_heads * config.head_dim,
            "attention_post_norm": config.hidden_size,
            "mlp_post_norm": config.hidden_size,
        }

    def before_attention(
        self,
        params: Params,
        hidden: Float[Array, "batch seq hidden"],
        at: Positions,
        config: Any,
        kind: Kind,
    ) -> tuple[Array, Array, Array]:
        query = self.normed(params, "q_norm", linear(params["q"], hidden), config)
        key = self.normed(params, "k_norm", linear(params["k"], hidden), config)
        value = linear(params["v"], hidden)
        return self.turned(
            split_heads(query, config.num_attention_heads, config.head_dim),
            split_heads(key, config.num_key_value_heads, config.head_dim),
            split_heads(value, config.num_key_value_heads, config.head_dim),
            at,
            config,
            kind,
        )

    def after_attention(
        self,
        params: Params,
        hidden: Float[Array, "batch seq hidden"],
        attended: Float[Array, "batch heads seq head_dim"],
        config: Any,
        kind: Kind,
    ) -> Float[Array, "batch seq hidden"]:
        x = linear(params["out"], merge_heads(attended))
        hidden = hidden + self.normed(params, "attention_post_norm", x, config)
        x = gated_mlp(params, hidden, config.hidden_act)
        return hidden + self.normed(params, "mlp_post_norm", x, config)


def _olmo2(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> RotaryConfig:
    return RotaryConfig(
        model_type="olmo2",
        vocab_size=100352,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
        rope=Rope(5e5, hidden // heads, 4096),
        eos_token_id=100257,
        pad_token_id=100277,
    )


PRESETS: Mapping[str, RotaryConfig] = {
    "allenai/OLMo-2-1124-7B": _olmo2(32, 4096, 11008, 32, 32),
    "allenai/OLMo-2-1124-13B": _olmo2(40, 5120, 13824, 40, 40),
    "allenai/OLMo-2-0325-32B": _olmo2(64, 5120, 27648, 40, 8),
}

FAMILY = Olmo2(PRESETS)
