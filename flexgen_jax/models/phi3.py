"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al. 2024, arXiv 2404.14219, 2412.08905): fused tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flexgen_jax.models.family import ConfigError, Source
from flexgen_jax.models.rope import Rope, read_rope
from flexgen_jax.models.rotary import SLIDING, RotaryConfig, RotaryDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(RotaryConfig):
    """``partial_rotary_factor``: the share of a head that positions turn."""

    partial_rotary_factor: float = 1.0
    original_max_position_embeddings: int = 4096


class Phi3(RotaryDecoder):
    """Queries, keys and values are one tensor in its files; so are gate and up."""

    model_types = ("phi3",)
    architecture = "Phi3ForCausalLM"
    config_class = Phi3Config
    defaults = {  # noqa: RUF012 # read only
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "eos_token_id": 32000,
    }

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        said = values.get("rope_parameters")
        inner = said if isinstance(said, Mapping) else {}
        partial = inner.get("partial_rotary_factor", values.get("partial_rotary_factor"))
        original = values.get("original_max_position_embeddings")
        original = inner.get("original_max_position_embeddings") if original is None else original
        values = {
            **values,
            "partial_rotary_factor": 1.0 if partial is None else partial,
            "original_max_position_embeddings": 4096 if original is None else original,
        }
        return super().fields(values)

    def read_rope(self, values: Mapping[str, Any], head_dim: int) -> Rope:
        partial = values["partial_rotary_factor"]
        if not isinstance(partial, (int, float)) or not 0 < partial <= 1:
            raise ConfigError(f"partial_rotary_factor must be above 0, at most 1; got {partial!r}")
        scaling = values.get("rope_scaling")
        if isinstance(scaling, Mapping):  # an old name, and one that was never meant here
            kind = scaling.get("rope_type") or scaling.get("type")
            if kind in ("su", "yarn"):
                values = {**values, "rope_scaling": {**scaling, "rope_type": "longrope"}}
        rope = read_rope(
            values,
            dim=int(head_dim * partial),
            max_positions=values["max_position_embeddings"],
            original=values["original_max_position_embeddings"],
        )
        if rope.type not in ("default", "longrope"):
            raise ConfigError(f"rope_type must be default or longrope here, got {rope.type!r}")
        return rope

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        if values.get("sliding_window") is None:
            return ()
        count = values["num_hidden_layers"]
        return (SLIDING,) * count if isinstance(count, int) and 0 < count < 100_000 else ()

    def write(self, config: RotaryConfig) -> dict[str, Any]:
        values = super().write(config)
        values.pop("layer_types", None)
        return values

    def room(self, config: Any, prompt_len: int) -> int:
        """A sequence does not cross the border at which all its positions would turn otherwise."""
        border: int = config.original_max_position_embeddings
        crosses = config.rope.type == "longrope" and prompt_len <= border
        return min(border, config.max_position_embeddings) if crosses else super().room(config, 0)

    def source(self, config: Any, name: str) -> Source:
        found = super().source(config, name)
        module = name.split(".")[1]
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        rows = {
            "q": (0, queries),
            "k": (queries, queries + keys),
            "v": (queries + keys, queries + 2 * keys),
            "gate": (0, config.intermediate_size),
            "up": (config.intermediate_size, 2 * config.intermediate_size),
        }
        if module not in rows:
            return found
        whole = "mlp.gate_up_proj" if module in ("gate", "up") else "self_attn.qkv_proj"
        key = found.key.replace(self.modules[module], whole)
        return found._replace(key=key, rows=rows[module])


PRESETS: Mapping[str, Phi3Config] = {
    "microsoft/phi-4": Phi3Config(
        model_type="phi3",
        vocab_size=100352,
        num_hidden_layers=40,
        hidden_size=5120,
        intermediate_size=17920,
        num_attention_heads=40,
        num_key_value_heads=10,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=16384,
        original_max_position_embeddings=16384,
        rope=Rope(2.5e5, 128, 16384),
        bos_token_id=100257,
        eos_token_id=100265,
    ),
}

FAMILY = Phi3(PRESETS)
