"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama's layers, some with a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_jax.models.family import ConfigError
from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import SLIDING, RotaryConfig, RotaryDecoder, all_windows


class Mistral(RotaryDecoder):
    """Every layer has the window, or none has."""

    model_types = ("mistral",)
    architecture = "MistralForCausalLM"
    defaults = {  # noqa: RUF012 # read only
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    }

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        said = super().layer_types(values)
        if values.get("sliding_window") is None:
            return ()
        if any(kind != SLIDING for kind in said):
            raise ConfigError("layer_types of this family are not read: all its layers are alike")
        return all_windows(values)

    def write(self, config: RotaryConfig) -> dict[str, Any]:
        values = super().write(config)
        values.pop("layer_types", None)
        return values


def _mistral(layers: int, hidden: int, ffn: int, heads: int, **more: Any) -> RotaryConfig:
    theta, positions = more.pop("theta", 1e6), more.setdefault("max_position_embeddings", 32768)
    if more.get("sliding_window"):
        more["layer_types"] = (SLIDING,) * layers
    return RotaryConfig(
        model_type="mistral",
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=Rope(theta, 128, positions),
        **{"vocab_size": 32768, "bos_token_id": 1, "eos_token_id": 2, **more},
    )


PRESETS: Mapping[str, RotaryConfig] = {
    "mistralai/Mistral-7B-v0.1": _mistral(
        32, 4096, 14336, 32, vocab_size=32000, theta=1e4, sliding_window=4096
    ),
    "mistralai/Mistral-7B-v0.3": _mistral(32, 4096, 14336, 32),
    "mistralai/Mistral-Nemo-Base-2407": _mistral(
        40, 5120, 14336, 32, vocab_size=131072, max_position_embeddings=131072
    ),
    "mistralai/Mistral-Small-24B-Base-2501": _mistral(
        40, 5120, 32768, 32, vocab_size=131072, theta=1e8
    ),
    "mistralai/Mistral-Large-Instruct-2407": _mistral(
        88, 12288, 28672, 96, max_position_embeddings=131072
    ),
}

FAMILY = Mistral(PRESETS)
