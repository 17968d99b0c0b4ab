"""Gemma 3 (Gemma Team 2025, arXiv 2503.19786), its text part: most layers slide, two rope bases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from flexgen_jax.models.family import ConfigError, Kind, Params
from flexgen_jax.models.gemma2 import Gemma2, GemmaConfig
from flexgen_jax.models.rope import Rope, read_rope
from flexgen_jax.models.rotary import FULL, SLIDING, RotaryConfig

_LOCAL = "local"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(GemmaConfig):
    """``local_rope``: of the layers that slide."""

    local_rope: Rope


class Gemma3(Gemma2):
    """Of a model with a vision part (``gemma3``), the text part."""

    model_types = ("gemma3_text", "gemma3")
    architecture = "Gemma3ForCausalLM"
    config_class = Gemma3Config
    prefixes = ("model.", "language_model.model.", "model.language_model.", "")
    rope_theta = 1e6
    defaults = {  # noqa: RUF012 # read only
        **Gemma2.defaults,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_local_base_freq": 1e4,
    }
    modules = {  # noqa: RUF012 # read only
        **Gemma2.modules,
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    }

    def read(self, values: Mapping[str, Any]) -> RotaryConfig:
        text = values.get("text_config")
        if values.get("model_type") == "gemma3":
            if not isinstance(text, Mapping):
                raise ConfigError("there is no text_config")
            # What its published files leave out: the sizes of the 4B model.
            usual = {"vocab_size": 262208, "num_attention_heads": 8}
            outer = {k: values[k] for k in ("eos_token_id", "bos_token_id") if k in values}
            values = {**usual, **outer, **text, "model_type": "gemma3_text"}
        return super().read(values)

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = super().fields({**values, "attn_logit_softcapping": None})
        by_kind = values.get("rope_parameters")
        local: Mapping[str, Any] = {"rope_theta": values["rope_local_base_freq"]}
        if by_kind and not values.get("rope_scaling"):
            local = {"rope_parameters": by_kind[SLIDING]}
        found["local_rope"] = read_rope(
            local, dim=found["head_dim"], max_positions=found["max_position_embeddings"]
        )
        return found

    def read_rope(self, values: Mapping[str, Any], head_dim: int) -> Rope:
        by_kind = values.get("rope_parameters")
        if by_kind and not values.get("rope_scaling"):
            if not isinstance(by_kind, Mapping) or {FULL, SLIDING} - set(by_kind):
                raise ConfigError(f"rope_parameters must say {FULL} and {SLIDING}: {by_kind!r}")
            values = {**values, "rope_parameters": by_kind[FULL]}
        return super().read_rope(values, head_dim)

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        pattern = values.get("sliding_window_pattern") or 6
        if values.get("layer_types") is not None or not isinstance(pattern, int):
            return super().layer_types(values)
        every = range(values["num_hidden_layers"])
        return tuple(SLIDING if (i + 1) % pattern else FULL for i in every)

    def write(self, config: RotaryConfig) -> dict[str, Any]:
        values = super().write(config)
        values["rope_local_base_freq"] = values.pop("local_rope").theta
        return values

    def ignored(self, config: Any, key: str) -> bool:
        seeing = ("vision_tower", "multi_modal_projector", "vision_model")
        return super().ignored(config, key) or any(part in key for part in seeing)

    def kind(self, config: Any, index: int) -> Kind:
        kind = super().kind(config, index)
        sliding = bool(config.layer_types) and config.layer_types[index] == SLIDING
        return kind._replace(variant=_LOCAL if sliding else "")

    def norms(self, config: Any) -> dict[str, int]:
        return {**super().norms(config), "q_norm": config.head_dim, "k_norm": config.head_dim}

    def rope_of(self, config: Any, kind: Kind) -> Rope | None:
        rope: Rope = config.local_rope if kind.variant == _LOCAL else config.rope
        return rope

    def project(self, params: Params, x: Array, config: Any) -> tuple[Array, Array, Array]:
        query, key, value = super().project(params, x, config)
        query = self.normed(params, "q_norm", query, config)
        return query, self.normed(params, "k_norm", key, config), value


def _gemma3(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, **more: Any
) -> Gemma3Config:
    positions, factor = more.setdefault("max_position_embeddings", 131072), more.pop("factor", 8.0)
    scaling = ("linear", (("factor", factor),)) if factor else ("default", ())
    return Gemma3Config(
        model_type="gemma3_text",
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act="gelu_pytorch_tanh",
        rope=Rope(1e6, head_dim, positions, *scaling),
        local_rope=Rope(1e4, head_dim, positions),
        tie_word_embeddings=True,
        layer_types=tuple(SLIDING if (i + 1) % 6 else FULL for i in range(layers)),
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        **{"vocab_size": 262208, "sliding_window": 1024, **more},
    )


PRESETS: Mapping[str, Gemma3Config] = {
    "google/gemma-3-1b-pt": _gemma3(
        26,
        1152,
        6912,
        4,
        1,
        256,
        factor=None,
        vocab_size=262144,
        sliding_window=512,
        max_position_embeddings=32768,
    ),
    "google/gemma-3-4b-pt": _gemma3(34, 2560, 10240, 8, 4, 256),
    "google/gemma-3-12b-pt": _gemma3(48, 3840, 15360, 16, 8, 256),
    "google/gemma-3-27b-pt": _gemma3(62, 5376, 21504, 32, 16, 128, query_pre_attn_scalar=168.0),
}

FAMILY = Gemma3(PRESETS)
