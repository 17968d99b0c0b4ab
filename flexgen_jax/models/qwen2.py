"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671): biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import FULL, SLIDING, RotaryConfig, RotaryDecoder


def windows_above(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Layer types where ``use_sliding_window`` gives the upper layers a window."""
    if not values.get("use_sliding_window") or values.get("sliding_window") is None:
        return ()
    first, count = values.get("max_window_layers", 28), values["num_hidden_layers"]
    return tuple(SLIDING if i >= first else FULL for i in range(count))


class Qwen2(RotaryDecoder):
    """See the module."""

    model_types = ("qwen2",)
    architecture = "Qwen2ForCausalLM"
    defaults = {  # noqa: RUF012 # read only
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "eos_token_id": None,
    }

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        return super().layer_types(values) or windows_above(values)

    def write(self, config: RotaryConfig) -> dict[str, Any]:
        return {**super().write(config), "use_sliding_window": config.sliding_window is not None}

    def biased(self, config: Any, module: str) -> bool:
        return module in ("q", "k", "v")


def _qwen2(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> RotaryConfig:
    positions = more.setdefault("max_position_embeddings", 32768)
    return RotaryConfig(
        model_type="qwen2",
        vocab_size=vocab,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        rope=Rope(1e6, hidden // heads, positions),
        **{"bos_token_id": 151643, "eos_token_id": 151643, **more},
    )


_SMALL: dict[str, Any] = {"tie_word_embeddings": True}
_LONG: dict[str, Any] = {"max_position_embeddings": 131072}
_LARGE: dict[str, Any] = {**_LONG, "rms_norm_eps": 1e-5}

PRESETS: Mapping[str, RotaryConfig] = {
    "Qwen/Qwen2.5-0.5B": _qwen2(24, 896, 4864, 14, 2, 151936, **_SMALL),
    "Qwen/Qwen2.5-1.5B": _qwen2(28, 1536, 8960, 12, 2, 151936, **_SMALL, **_LONG),
    "Qwen/Qwen2.5-3B": _qwen2(36, 2048, 11008, 16, 2, 151936, **_SMALL),
    "Qwen/Qwen2.5-7B": _qwen2(28, 3584, 18944, 28, 4, 152064, **_LONG),
    "Qwen/Qwen2.5-14B": _qwen2(48, 5120, 13824, 40, 8, 152064, **_LARGE),
    "Qwen/Qwen2.5-32B": _qwen2(64, 5120, 27648, 40, 8, 152064, **_LARGE),
    "Qwen/Qwen2.5-72B": _qwen2(80, 8192, 29568, 64, 8, 152064, **_LARGE),
}

FAMILY = Qwen2(PRESETS)
