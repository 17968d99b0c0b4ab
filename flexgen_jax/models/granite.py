"""Granite 3 (IBM 2024): Llama's layers with four multipliers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from flexgen_jax.models.family import Kind, Params
from flexgen_jax.models.layers import gated_mlp, linear, merge_heads
from flexgen_jax.models.packed import Packed
from flexgen_jax.models.positions import Positions
from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import RotaryConfig, RotaryDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteConfig(RotaryConfig):
    """The multipliers: of embeddings, of attention's scores, of what layers add, and the divisor of
    the logits."""

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0


class Granite(RotaryDecoder):
    """See the module."""

    model_types = ("granite",)
    architecture = "GraniteForCausalLM"
    config_class = GraniteConfig

    def scale(self, config: Any) -> float:
        scale: float = config.attention_multiplier
        return scale

    def embed(
        self, params: Params, rows: Float[Array, "batch seq embed"], at: Positions, config: Any
    ) -> Float[Array, "batch seq hidden"]:
        return rows * config.embedding_multiplier

    def after_attention(
        self,
        params: Params,
        hidden: Float[Array, "batch seq hidden"],
        attended: Float[Array, "batch heads seq head_dim"],
        config: Any,
        kind: Kind,
    ) -> Float[Array, "batch seq hidden"]:
        times = config.residual_multiplier
        hidden = hidden + linear(params["out"], merge_heads(attended)) * times
        x = self.normed(params, "mlp_norm", hidden, config)
        return hidden + gated_mlp(params, x, config.hidden_act) * times

    def head(
        self,
        params: Params,
        table: Float[Array, "vocab embed"] | Packed,
        hidden: Float[Array, "*dims hidden"],
        config: Any,
    ) -> Float[Array, "*dims vocab"]:
        return super().head(params, table, hidden, config) / config.logits_scaling


def _granite(
    hidden: int, ffn: int, scale: float, logits: float, *, theta: float, positions: int
) -> GraniteConfig:
    return GraniteConfig(
        model_type="granite",
        vocab_size=49155,
        num_hidden_layers=40,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=hidden // 32,
        rms_norm_eps=1e-5,
        max_position_embeddings=positions,
        rope=Rope(theta, hidden // 32, positions),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        embedding_multiplier=12.0,
        attention_multiplier=scale,
        residual_multiplier=0.22,
        logits_scaling=logits,
    )


PRESETS: Mapping[str, GraniteConfig] = {
    "ibm-granite/granite-3.0-2b-base": _granite(
        2048, 8192, 0.015625, 8.0, theta=1e4, positions=4096
    ),
    "ibm-granite/granite-3.0-8b-base": _granite(
        4096, 12800, 0.0078125, 16.0, theta=1e4, positions=4096
    ),
    "ibm-granite/granite-3.1-2b-instruct": _granite(
        2048, 8192, 0.015625, 8.0, theta=5e6, positions=131072
    ),
    "ibm-granite/granite-3.1-8b-instruct": _granite(
        4096, 12800, 0.0078125, 16.0, theta=1e7, positions=131072
    ),
}

FAMILY = Granite(PRESETS)
