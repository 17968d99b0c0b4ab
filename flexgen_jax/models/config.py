"""The shape of an OPT model, read from the Hugging Face ``config.json`` or taken from a preset.

Owns every fact about the architecture that can be known without weights. Knows no array.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Galactica and OPT-IML ship these names too.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh")


class ConfigError(ValueError):
    """A ``config.json`` that is missing, malformed, or not of an OPT model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """Hyper-parameters of OPT, OPT-IML and Galactica, named as in Hugging Face's ``OPTConfig``.

    Lengths are in tokens. ``word_embed_proj_dim`` differs from ``hidden_size`` in OPT-350m only,
    which then has ``project_in`` and ``project_out``.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int = 0  # 0: the same as hidden_size
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    activation_function: str = "relu"
    tie_word_embeddings: bool = True
    pad_token_id: int = 1
    bos_token_id: int | None = 2
    eos_token_id: int | None = 2

    def __post_init__(self) -> None:
        if not self.word_embed_proj_dim:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "ffn_dim",
            "num_attention_heads",
            "max_position_embeddings",
            "word_embed_proj_dim",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.activation_function not in ACTIVATIONS:
            raise ConfigError(
                f"activation_function must be one of {', '.join(ACTIVATIONS)}; "
                f"got {self.activation_function!r}"
            )

    @property
    def head_dim(self) -> int:
        """Elements of a head's query, key or value."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_projection(self) -> bool:
        """Whether embeddings are projected to and from the hidden size (OPT-350m)."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def has_final_norm(self) -> bool:
        """Post-layer-norm models (OPT-350m) end without a norm of their own."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @functools.cached_property
    def units(self) -> tuple[str, ...]:
        """The layers that a schedule sees: ``embed``, ``layer_0`` ..., ``head``."""
        return ("embed", *(f"layer_{i}" for i in range(self.num_hidden_layers)), "head")

    def to_json(self) -> dict[str, Any]:
        """The Hugging Face form, which transformers' ``OPTConfig`` reads back."""
        values = dataclasses.asdict(self)
        values["_remove_final_layer_norm"] = values.pop("remove_final_layer_norm")
        return {"model_type": "opt", "architectures": ["OPTForCausalLM"], **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> OPTConfig:
        """Reads the Hugging Face form; keys that do not change the computation are ignored.

        Raises:
            ConfigError: not an OPT model, or a value out of range.
        """
        model_type = values.get("model_type", "opt")
        if model_type != "opt":
            raise ConfigError(
                f"model_type is {model_type!r}; flexgen-jax runs the OPT family "
                "(OPT, OPT-IML, Galactica), whose model_type is 'opt'"
            )
        values = {**values}
        if "_remove_final_layer_norm" in values:
            values["remove_final_layer_norm"] = values["_remove_final_layer_norm"]
        known = {f.name for f in dataclasses.fields(cls)}
        chosen = {k: v for k, v in values.items() if k in known and v is not None}
        if isinstance(chosen.get("eos_token_id"), list):
            chosen["eos_token_id"] = chosen["eos_token_id"][0]
        # Hugging Face leaves out what equals its own defaults, and those are OPT-125m's: ours too.
        return cls(**chosen)

    @classmethod
    def load(cls, path: str | Path) -> OPTConfig:
        """Reads ``config.json`` at ``path`` (the file, or the directory that holds it).

        Raises:
            ConfigError: no such file, not JSON, or not an OPT model; the message names the file.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: expected a JSON object, got {type(values).__name__}")
        try:
            return cls.from_json(values)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    @classmethod
    def preset(cls, name: str) -> OPTConfig:
        """One of ``PRESETS``, by ``opt-1.3b``, ``facebook/opt-1.3b`` or ``1.3b``.

        Raises:
            ConfigError: an unknown name; the message lists the known ones.
        """
        key = name.lower().removeprefix("facebook/").removeprefix("opt-")
        if key not in PRESETS:
            raise ConfigError(
                f"no preset {name!r}; presets: {', '.join('facebook/opt-' + k for k in PRESETS)}"
            )
        return PRESETS[key]


def _opt(layers: int, hidden: int, heads: int, **more: Any) -> OPTConfig:
    return OPTConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        **more,
    )


# Zhang et al. 2022 (arXiv 2205.01068), table 1.
PRESETS: dict[str, OPTConfig] = {
    "125m": _opt(12, 768, 12),
    "350m": _opt(24, 1024, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "1.3b": _opt(24, 2048, 32),
    "2.7b": _opt(32, 2560, 32),
    "6.7b": _opt(32, 4096, 32),
    "13b": _opt(40, 5120, 40),
    "30b": _opt(48, 7168, 56),
    "66b": _opt(64, 9216, 72),
    "175b": _opt(96, 12288, 96),
}
