"""GLM-4 (0414) (GLM Team 2024, arXiv 2406.12793): four norms a layer, neighbours are turned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from flexgen_jax.models.family import ConfigError, Kind, Params, Source
from flexgen_jax.models.layers import gated_mlp, linear, merge_heads
from flexgen_jax.models.positions import Positions
from flexgen_jax.models.rope import Rope, read_rope
from flexgen_jax.models.rotary import MODULES, RotaryConfig, RotaryDecoder

ENDS = (151329, 151336, 151338)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm4Config(RotaryConfig):
    """``partial_rotary_factor``: the share of a head that positions turn."""

    partial_rotary_factor: float = 0.5


class Glm4(RotaryDecoder):
    """See the module; gate and up are one tensor in its files."""

    model_types = ("glm4",)
    architecture = "Glm4ForCausalLM"
    config_class = Glm4Config
    defaults = {  # noqa: RUF012 # read only
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "eos_token_id": ENDS,
        "pad_token_id": 151329,
    }
    modules = {  # noqa: RUF012 # read only
        **MODULES,
        "attention_post_norm": "post_self_attn_layernorm",
        "mlp_post_norm": "post_mlp_layernorm",
    }

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return super().fields({**values, "partial_rotary_factor": partial_factor(values)})

    def read_rope(self, values: Mapping[str, Any], head_dim: int) -> Rope:
        return read_partial_rope(values, head_dim)

    def biased(self, config: Any, module: str) -> bool:
        return config.attention_bias and module in ("q", "k", "v")

    def norms(self, config: Any) -> dict[str, int]:
        names = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
        return dict.fromkeys(names, config.hidden_size)

    def source(self, config: Any, name: str) -> Source:
        found = super().source(config, name)
        ffn, module = config.intermediate_size, name.split(".")[1]
        rows = {"gate": (0, ffn), "up": (ffn, 2 * ffn)}
        if module not in rows:
            return found
        key = found.key.replace(self.modules[module], "mlp.gate_up_proj")
        return found._replace(key=key, rows=rows[module])

    def turned(
        self, query: Array, key: Array, value: Array, at: Positions, config: Any, kind: Kind
    ) -> tuple[Array, Array, Array]:
        # Queries and keys in one other order have the same products.
        query, key = _halves(query, config.rope.dim), _halves(key, config.rope.dim)
        return super().turned(query, key, value, at, config, kind)

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


def partial_factor(values: Mapping[str, Any]) -> Any:
    """The share of a head that positions turn, as transformers 4 or 5 has it."""
    said = values.get("rope_parameters")
    inner = said.get("partial_rotary_factor") if isinstance(said, Mapping) else None
    return values["partial_rotary_factor"] if inner is None else inner


def read_partial_rope(values: Mapping[str, Any], head_dim: int) -> Rope:
    """Of ``partial_rotary_factor``, a field of ``values``.

    Raises:
        ConfigError: no share, or as :func:`read_rope`.
    """
    partial = values["partial_rotary_factor"]
    if not isinstance(partial, (int, float)) or not 0 < partial <= 1:
        raise ConfigError(f"partial_rotary_factor must be above 0, at most 1; got {partial!r}")
    positions = values["max_position_embeddings"]
    return read_rope(values, dim=int(head_dim * partial), max_positions=positions)


def _halves(x: Array, dim: int) -> Array:
    """The first ``dim`` elements in another order: what were neighbours is a pair of halves."""
    return jnp.concatenate([x[..., :dim:2], x[..., 1:dim:2], x[..., dim:]], axis=-1)


PRESETS: Mapping[str, Glm4Config] = {
    "THUDM/GLM-4-9B-0414": Glm4Config(
        model_type="glm4",
        vocab_size=151552,
        num_hidden_layers=40,
        hidden_size=4096,
        intermediate_size=13696,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=32768,
        rope=Rope(1e4, 64, 32768),
        attention_bias=True,
        eos_token_id=ENDS,
        pad_token_id=151329,
    ),
}

FAMILY = Glm4(PRESETS)
