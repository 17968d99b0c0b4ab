"""SmolLM3 (Hugging Face 2025): Llama's layers, every fourth without positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flexgen_jax.models.family import ConfigError, Kind
from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import FULL, SLIDING, RotaryConfig, RotaryDecoder

_NO_ROPE = "no rope"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Config(RotaryConfig):
    """``no_rope_layers``: of each layer 1 if positions turn it, 0 if not (as it is published)."""

    no_rope_layers: tuple[int, ...] = ()


class SmolLM3(RotaryDecoder):
    """See the module."""

    model_types = ("smollm3",)
    architecture = "SmolLM3ForCausalLM"
    config_class = SmolLM3Config
    rope_theta = 2e6
    defaults = {  # noqa: RUF012 # read only
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "eos_token_id": 128001,
    }

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return super().fields({**values, "no_rope_layers": _turned(values)})

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        said = super().layer_types(values)
        if said or not values.get("use_sliding_window") or values.get("sliding_window") is None:
            return said
        return tuple(FULL if turned else SLIDING for turned in _turned(values))

    def write(self, config: RotaryConfig) -> dict[str, Any]:
        return {**super().write(config), "use_sliding_window": config.sliding_window is not None}

    def kind(self, config: Any, index: int) -> Kind:
        variant = "" if config.no_rope_layers[index] else _NO_ROPE
        return super().kind(config, index)._replace(variant=variant)

    def rope_of(self, config: Any, kind: Kind) -> Rope | None:
        return None if kind.variant == _NO_ROPE else super().rope_of(config, kind)


def _turned(values: Mapping[str, Any]) -> tuple[int, ...]:
    said, count = values.get("no_rope_layers"), values["num_hidden_layers"]
    if said is None:
        every = values.get("no_rope_layer_interval", 4)
        return tuple(int((i + 1) % every != 0) for i in range(count))
    if not isinstance(said, (list, tuple)) or len(said) != count:
        raise ConfigError(f"no_rope_layers must be a list of {count} numbers, got {said!r}")
    return tuple(int(bool(turned)) for turned in said)


PRESETS: Mapping[str, SmolLM3Config] = {
    "HuggingFaceTB/SmolLM3-3B": SmolLM3Config(
        model_type="smollm3",
        vocab_size=128256,
        num_hidden_layers=36,
        hidden_size=2048,
        intermediate_size=11008,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=65536,
        rope=Rope(5e6, 128, 65536),
        tie_word_embeddings=True,
        eos_token_id=128012,
        no_rope_layers=tuple(int((i + 1) % 4 != 0) for i in range(36)),
    ),
}

FAMILY = SmolLM3(PRESETS)
