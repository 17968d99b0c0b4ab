"""OPT, OPT-IML and Galactica (Zhang et al. 2022, arXiv 2205.01068).

Learned positions that begin at index 2, biases, layer norm and a plain MLP. OPT-350m norms after
the residual and projects its embeddings to the hidden size and back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from flexgen_jax.models.attention import (
    Selection,
    attend,
    attend_cached,
    attend_prompt,
    attend_selected,
    causal_visibility,
    select_cached,
    sum_values,
)
from flexgen_jax.models.decoding import decode, forward, init_params, prefill
from flexgen_jax.models.family import (
    Config,
    ConfigError,
    Family,
    Kind,
    Param,
    Params,
    Source,
    Unit,
    bias,
    matrix,
    norm,
    positive,
    read_token_ids,
    stays_small,
    table,
)
from flexgen_jax.models.layers import (
    activate,
    check_activation,
    layer_norm,
    linear,
    logits,
    merge_heads,
    split_heads,
)
from flexgen_jax.models.packed import Packed
from flexgen_jax.models.positions import Positions
from flexgen_jax.models.registry import load_config

__all__ = [
    "ACTIVATIONS",
    "FAMILY",
    "PRESETS",
    "OPTConfig",
    "Params",
    "Selection",
    "attend",
    "attend_cached",
    "attend_prompt",
    "attend_selected",
    "causal_visibility",
    "decode",
    "forward",
    "head",
    "init_params",
    "layer_norm",
    "linear",
    "prefill",
    "select_cached",
    "sum_values",
]

# Galactica and OPT-IML ship these names too.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh")

# Learned positions start at index 2: an inheritance of fairseq's padding index.
POSITION_OFFSET = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig(Config):
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
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self) -> None:
        if not self.word_embed_proj_dim:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        positive(
            self,
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "ffn_dim",
            "num_attention_heads",
            "max_position_embeddings",
            "word_embed_proj_dim",
        )
        stays_small(self)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        check_activation("activation_function", self.activation_function, ACTIVATIONS)

    @property
    def model_type(self) -> str:
        """``opt``."""
        return "opt"

    @property
    def num_key_value_heads(self) -> int:
        """Each query head has its own key and value."""
        return self.num_attention_heads

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
        return tuple(unit.name for unit in FAMILY.units(self))

    def to_json(self) -> dict[str, Any]:
        """The Hugging Face form, which transformers' ``OPTConfig`` reads back."""
        return FAMILY.write(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> OPTConfig:
        """Reads the Hugging Face form; keys that do not change the computation are ignored.

        Raises:
            ConfigError: not an OPT model, or a value out of range.
        """
        return FAMILY.read(values)

    @classmethod
    def load(cls, path: str | Path) -> OPTConfig:
        """Reads ``config.json`` at ``path`` (the file, or the directory that holds it).

        Raises:
            ConfigError: no such file, not JSON, or not an OPT model; the message names the file.
        """
        config = load_config(path, FAMILY)
        assert isinstance(config, cls)
        return config

    @classmethod
    def preset(cls, name: str) -> OPTConfig:
        """One of ``PRESETS``, by ``opt-1.3b``, ``facebook/opt-1.3b`` or ``1.3b``.

        Raises:
            ConfigError: an unknown name; the message lists the known ones.
        """
        config = FAMILY.named(name)
        if config is None:
            raise ConfigError(f"no preset {name!r}; presets: {', '.join(FAMILY.presets)}")
        return config


def _opt(layers: int, hidden: int, heads: int, **more: Any) -> OPTConfig:
    return OPTConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        **more,
    )


# Zhang et al. 2022, table 1.
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

# Our names of a layer's modules -> Hugging Face's; the others have one name.
_MODULES = {
    "attention_norm": "self_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
}


class OPT(Family):
    """See the module."""

    model_types = ("opt",)
    presets: Mapping[str, OPTConfig] = {f"facebook/opt-{k}": v for k, v in PRESETS.items()}
    # Old checkpoints save the decoder alone, without the language model around it.
    prefixes = ("model.decoder.", "decoder.")

    def named(self, name: str) -> OPTConfig | None:
        """Bare sizes, too: ``1.3b``."""
        return PRESETS.get(name.lower().removeprefix("facebook/").removeprefix("opt-"))

    def read(self, values: Mapping[str, Any]) -> OPTConfig:
        model_type = values.get("model_type", "opt")
        if model_type != "opt":
            raise ConfigError(f"model_type is {model_type!r}; that of the OPT family is 'opt'")
        values = {**values}
        if "_remove_final_layer_norm" in values:
            values["remove_final_layer_norm"] = values["_remove_final_layer_norm"]
        known = {f.name for f in dataclasses.fields(OPTConfig)}
        # Hugging Face leaves out what equals its own defaults, and those are OPT-125m's: ours too.
        chosen = {k: v for k, v in values.items() if k in known and v is not None}
        config = OPTConfig(**{**chosen, "eos_token_id": None})
        ids = read_token_ids(values, "eos_token_id", 2, config.vocab_size)
        return dataclasses.replace(config, eos_token_id=ids)

    def write(self, config: OPTConfig) -> dict[str, Any]:
        values = dataclasses.asdict(config)
        values["_remove_final_layer_norm"] = values.pop("remove_final_layer_norm")
        if isinstance(config.eos_token_id, tuple):
            values["eos_token_id"] = list(config.eos_token_id)
        return {"model_type": "opt", "architectures": ["OPTForCausalLM"], **values}

    def params(self, config: OPTConfig, unit: Unit) -> dict[str, Param]:
        hidden, embed, ffn = config.hidden_size, config.word_embed_proj_dim, config.ffn_dim

        def normed(name: str) -> dict[str, Param]:
            if not config.layer_norm_elementwise_affine:
                return {}
            return {f"{name}.scale": norm(hidden), f"{name}.bias": bias(hidden)}

        def product(name: str, n_in: int, n_out: int) -> dict[str, Param]:
            found = {f"{name}.kernel": matrix(n_in, n_out)}
            return found | ({f"{name}.bias": bias(n_out)} if config.enable_bias else {})

        if unit.kind.role == "embed":
            found = {
                "tokens": table(config.vocab_size, embed),
                "positions": Param(
                    (config.max_position_embeddings + POSITION_OFFSET, hidden), "positions"
                ),
            }
            if config.has_projection:
                found["project_in.kernel"] = matrix(embed, hidden)
            return found
        if unit.kind.role == "head":
            found = normed("norm") if config.has_final_norm else {}
            if config.has_projection:
                found["project_out.kernel"] = matrix(hidden, embed)
            if not config.tie_word_embeddings:
                found["tokens"] = table(config.vocab_size, embed)
            return found
        return {
            **normed("attention_norm"),
            **product("q", hidden, hidden),
            **product("k", hidden, hidden),
            **product("v", hidden, hidden),
            **product("out", hidden, hidden),
            **normed("mlp_norm"),
            **product("fc1", hidden, ffn),
            **product("fc2", ffn, hidden),
        }

    def source(self, config: OPTConfig, name: str) -> Source:
        prefix = self.prefixes[0]
        if name == "head.tokens":
            return Source("lm_head.weight")
        unit, module, *leaf = name.split(".")
        if not leaf:  # embed.tokens, embed.positions
            return Source(f"{prefix}embed_{module}.weight")
        kind = "bias" if leaf[0] == "bias" else "weight"
        if unit == "head" and module == "norm":
            return Source(f"{prefix}final_layer_norm.{kind}")
        if unit.startswith("layer_"):
            module = f"layers.{unit.removeprefix('layer_')}.{_MODULES.get(module, module)}"
        return Source(f"{prefix}{module}.{kind}", transposed=leaf[0] == "kernel")

    def ignored(self, config: OPTConfig, key: str) -> bool:
        return key.rpartition(".")[2] == "version"  # saved by old versions

    def embed(
        self,
        params: Params,
        rows: Float[Array, "batch seq embed"],
        at: Positions,
        config: OPTConfig,
    ) -> Float[Array, "batch seq hidden"]:
        x = linear(params["project_in"], rows) if config.has_projection else rows
        # Padding sits at -1, as Hugging Face counts it; what is computed there is never seen.
        return x + params["positions"][jnp.maximum(at.index, -1) + POSITION_OFFSET]

    def before_attention(
        self,
        params: Params,
        hidden: Float[Array, "batch seq hidden"],
        at: Positions,
        config: OPTConfig,
        kind: Kind,
    ) -> tuple[Array, Array, Array]:
        x = _pre_norm(params, "attention_norm", hidden, config)
        scale = jnp.asarray(config.head_dim**-0.5, x.dtype)
        heads, head_dim = config.num_attention_heads, config.head_dim
        return (
            split_heads(linear(params["q"], x) * scale, heads, head_dim),
            split_heads(linear(params["k"], x), heads, head_dim),
            split_heads(linear(params["v"], x), heads, head_dim),
        )

    def after_attention(
        self,
        params: Params,
        hidden: Float[Array, "batch seq hidden"],
        attended: Float[Array, "batch heads seq head_dim"],
        config: OPTConfig,
        kind: Kind,
    ) -> Float[Array, "batch seq hidden"]:
        hidden = hidden + linear(params["out"], merge_heads(attended))
        hidden = _post_norm(params, "attention_norm", hidden, config)
        x = linear(params["fc1"], _pre_norm(params, "mlp_norm", hidden, config))
        hidden = hidden + linear(params["fc2"], activate(config.activation_function, x))
        return _post_norm(params, "mlp_norm", hidden, config)

    def head(
        self,
        params: Params,
        table: Float[Array, "vocab embed"] | Packed,
        hidden: Float[Array, "*dims hidden"],
        config: OPTConfig,
    ) -> Float[Array, "*dims vocab"]:
        if config.has_final_norm:
            hidden = layer_norm(params.get("norm", {}), hidden)
        if config.has_projection:
            hidden = linear(params["project_out"], hidden)
        return logits(table, hidden)


def _pre_norm(params: Params, name: str, hidden: Array, config: OPTConfig) -> Array:
    return layer_norm(params.get(name, {}), hidden) if config.do_layer_norm_before else hidden


def _post_norm(params: Params, name: str, hidden: Array, config: OPTConfig) -> Array:
    return hidden if config.do_layer_norm_before else layer_norm(params.get(name, {}), hidden)


FAMILY = OPT()


def head(
    params: Params,
    token_table: Float[Array, "vocab embed"] | Packed,
    hidden: Float[Array, "*dims hidden"],
    config: Config,
) -> Float[Array, "*dims vocab"]:
    """Final norm, projection and logits (float32). A tied model passes its embedding table."""
    assert isinstance(config, OPTConfig)
    return FAMILY.head(params, token_table, hidden, config)
