"""Gemma 2 (Gemma Team 2024, arXiv 2408.00118): norms around both halves of a layer, soft caps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from flexgen_jax.models.family import ConfigError, Kind, Params
from flexgen_jax.models.layers import gated_mlp, linear, merge_heads
from flexgen_jax.models.packed import Packed
from flexgen_jax.models.positions import Positions
from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import FULL, MODULES, SLIDING, RotaryConfig, RotaryDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(RotaryConfig):
    """Gemma's own hyper-parameters.

    Attributes:
        query_pre_attn_scalar: Attention's scores are divided by its root.
        attn_logit_softcapping: Of attention's scores; ``final_logit_softcapping``: of the logits;
            None: they are as they are.
    """

    query_pre_attn_scalar: float = 256.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None


class Gemma2(RotaryDecoder):
    """See the module; ``1 + scale`` in every norm, embeddings times the root of their width."""

    model_types: tuple[str, ...] = ("gemma2",)
    architecture = "Gemma2ForCausalLM"
    config_class: ClassVar[type[GemmaConfig]] = GemmaConfig
    norm_offset = 1.0
    defaults = {  # noqa: RUF012 # read only
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    modules = {  # noqa: RUF012 # read only
        **MODULES,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if values.get("use_bidirectional_attention"):
            raise ConfigError("use_bidirectional_attention is not for generating; it must be false")
        # A hidden_act beside it is not what transformers takes.
        return super().fields({**values, "hidden_act": values["hidden_activation"]})

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        every = range(values["num_hidden_layers"])
        return super().layer_types(values) or tuple(FULL if i % 2 else SLIDING for i in every)

    def write(self, config: RotaryConfig) -> dict[str, Any]:
        values = super().write(config)
        if "layer_types" not in values:
            values["layer_types"] = [FULL] * config.num_hidden_layers
        values["hidden_activation"] = values.pop("hidden_act")
        return values

    def kind(self, config: Any, index: int) -> Kind:
        return super().kind(config, index)._replace(soft_cap=config.attn_logit_softcapping)

    def norms(self, config: Any) -> dict[str, int]:
        names = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
        return dict.fromkeys(names, config.hidden_size)

    def scale(self, config: Any) -> float:
        scale: float = config.query_pre_attn_scalar**-0.5
        return scale

    def embed(
        self, params: Params, rows: Float[Array, "batch seq embed"], at: Positions, config: Any
    ) -> Float[Array, "batch seq hidden"]:
        return rows * jnp.asarray(config.hidden_size**0.5, rows.dtype)

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
        x = self.normed(params, "mlp_norm", hidden, config)
        x = gated_mlp(params, x, config.hidden_act)
        return hidden + self.normed(params, "mlp_post_norm", x, config)

    def head(
        self,
        params: Params,
        table: Float[Array, "vocab embed"] | Packed,
        hidden: Float[Array, "*dims hidden"],
        config: Any,
    ) -> Float[Array, "*dims vocab"]:
        found = super().head(params, table, hidden, config)
        cap = config.final_logit_softcapping
        return found if cap is None else cap * jnp.tanh(found / cap)


def _gemma2(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, scalar: int
) -> GemmaConfig:
    return GemmaConfig(
        model_type="gemma2",
        vocab_size=256000,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=8192,
        rope=Rope(1e4, head_dim, 8192),
        tie_word_embeddings=True,
        sliding_window=4096,
        layer_types=tuple(FULL if i % 2 else SLIDING for i in range(layers)),
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        query_pre_attn_scalar=float(scalar),
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )


PRESETS: Mapping[str, GemmaConfig] = {
    "google/gemma-2-2b": _gemma2(26, 2304, 9216, 8, 4, 256, 256),
    "google/gemma-2-9b": _gemma2(42, 3584, 14336, 16, 8, 256, 256),
    "google/gemma-2-27b": _gemma2(46, 4608, 36864, 32, 16, 128, 144),
}

FAMILY = Gemma2(PRESETS)
