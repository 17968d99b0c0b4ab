"""What most decoders of today share: RMS norms, rotary positions, grouped heads and a gated MLP.

A family of that kind derives its config from :class:`RotaryConfig` and its functions from
:class:`RotaryDecoder`, and says in its own file what differs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from flexgen_jax.models.family import (
    Config,
    ConfigError,
    Family,
    Kind,
    Param,
    Params,
    Routed,
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
    check_activation,
    gated_mlp,
    linear,
    logits,
    merge_heads,
    rms_norm,
    split_heads,
)
from flexgen_jax.models.packed import Packed
from flexgen_jax.models.positions import Positions
from flexgen_jax.models.registry import family_of
from flexgen_jax.models.rope import Rope, angles, read_rope, rotate

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig(Config):
    """Hyper-parameters, named as in Hugging Face's ``config.json``.

    Attributes:
        rope: How positions turn queries and keys.
        sliding_window: Of the layers that have one; None: no layer has.
        layer_types: ``full_attention`` or ``sliding_attention`` of each layer; empty: all are full.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        stays_small(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        check_activation("hidden_act", self.hidden_act)
        if self.sliding_window is not None:
            positive(self, "sliding_window")
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} "
                "layers"
            )
        if not set(self.layer_types) <= {SLIDING, FULL}:
            raise ConfigError(
                f"layer_types must be {FULL} or {SLIDING}, got {sorted(set(self.layer_types))}"
            )
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise ConfigError("layer_types has sliding layers, and there is no sliding_window")

    @functools.cached_property
    def units(self) -> tuple[str, ...]:
        """The layers that a schedule sees: ``embed``, ``layer_0`` ..., ``head``."""
        return tuple(unit.name for unit in family_of(self).units(self))


# Our names of a layer's modules -> Hugging Face's.
MODULES = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


class RotaryDecoder(Family):
    """Pre-norm layers; what a family does otherwise it overrides.

    Attributes:
        config_class: Of its configs.
        architecture: Hugging Face's class, for ``config.json``.
        defaults: What a ``config.json`` leaves out, where it differs from :data:`DEFAULTS`.
        modules: Our names of a layer's modules -> Hugging Face's.
        norm_offset: Added to what norms are scaled by; such a scale begins at 0 instead of 1.
        rope_theta: Where nothing is said of it.
    """

    config_class: ClassVar[type[RotaryConfig]] = RotaryConfig
    architecture: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    modules: ClassVar[Mapping[str, str]] = MODULES
    norm_offset: ClassVar[float] = 0.0
    rope_theta: ClassVar[float] = 10_000.0

    def __init__(self, presets: Mapping[str, RotaryConfig]) -> None:
        self.presets = presets

    # The config

    def read(self, values: Mapping[str, Any]) -> RotaryConfig:
        usual, vocab = {**DEFAULTS, **self.defaults}, values.get("vocab_size")
        end = usual["eos_token_id"]
        if isinstance(vocab, int) and isinstance(end, int) and end >= vocab:
            usual["eos_token_id"] = None  # of a small vocabulary that says nothing of it
        return self.config_class(**self.fields({**usual, **values}))

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the config; ``values`` has the defaults.

        Raises:
            ConfigError: a size is missing, or a value asks for what is not there.
        """
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        for name in (*sizes, "num_attention_heads"):
            if values.get(name) is None:
                raise ConfigError(f"there is no {name}")
        known = {f.name for f in dataclasses.fields(self.config_class)} - {"rope", "layer_types"}
        found = {k: v for k, v in values.items() if k in known}
        found["model_type"] = self.model_types[0]
        heads = found["num_attention_heads"]
        if found.get("num_key_value_heads") is None:
            found["num_key_value_heads"] = heads
        if found.get("head_dim") is None:
            width = found["hidden_size"]
            if not isinstance(width, int) or not isinstance(heads, int) or not heads:
                raise ConfigError(f"hidden_size {width!r} and {heads!r} heads give no head_dim")
            if width % heads:
                raise ConfigError(
                    f"hidden_size ({width}) must be a multiple of num_attention_heads ({heads}), "
                    "or head_dim be given"
                )
            found["head_dim"] = width // heads
        for field in dataclasses.fields(self.config_class):
            if field.name in found:
                found[field.name] = _checked(field, found[field.name])
        vocab = found["vocab_size"]
        if isinstance(vocab, int):
            for name in ("bos_token_id", "pad_token_id"):
                if not isinstance(found.get(name), int):
                    found[name] = None
            found["eos_token_id"] = read_token_ids(values, "eos_token_id", None, vocab)
        found["layer_types"] = self.layer_types(values)
        if SLIDING not in found["layer_types"]:
            found["layer_types"], found["sliding_window"] = (), None
        found["rope"] = self.read_rope(values, found["head_dim"])
        return found

    def layer_types(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Of each layer; ``layer_types`` of ``config.json`` where it is there."""
        said = values.get("layer_types")
        if said is None:
            return ()
        if not isinstance(said, (list, tuple)):
            raise ConfigError(f"layer_types must be a list, got {said!r}")
        return tuple(said)

    def read_rope(self, values: Mapping[str, Any], head_dim: int) -> Rope:
        """Of the layers that have no other one."""
        said = values.get("rope_parameters")
        partial = (said or {}).get("partial_rotary_factor") if isinstance(said, Mapping) else None
        partial = values.get("partial_rotary_factor") if partial is None else partial
        if partial not in (None, 1, 1.0):
            raise ConfigError(
                f"partial_rotary_factor is {partial!r}; this family turns whole heads"
            )
        return read_rope(
            values,
            dim=head_dim,
            max_positions=values["max_position_embeddings"],
            theta=self.rope_theta,
        )

    def write(self, config: RotaryConfig) -> dict[str, Any]:
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        values |= values.pop("rope").to_json()
        if not config.layer_types:
            del values["layer_types"]
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"architectures": [self.architecture], **plain}

    def kind(self, config: Any, index: int) -> Kind:
        sliding = bool(config.layer_types) and config.layer_types[index] == SLIDING
        return Kind("decoder", window=config.sliding_window if sliding else None)

    # The parameters

    def biased(self, config: Any, module: str) -> bool:
        """Whether a product has a bias."""
        flag: bool = config.mlp_bias if module in ("gate", "up", "down") else config.attention_bias
        return flag

    def norms(self, config: Any) -> dict[str, int]:
        """A layer's norms, and how wide they are."""
        return {"attention_norm": config.hidden_size, "mlp_norm": config.hidden_size}

    def params(self, config: Any, unit: Unit) -> dict[str, Param]:
        hidden, ffn = config.hidden_size, config.intermediate_size
        start = 1.0 - self.norm_offset
        if unit.kind.role == "embed":
            return {"tokens": table(config.vocab_size, hidden)}
        if unit.kind.role == "head":
            found = {"norm.scale": norm(hidden, start)}
            if not config.tie_word_embeddings:
                found["tokens"] = table(config.vocab_size, hidden)
            return found
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        products = {
            "q": (hidden, queries),
            "k": (hidden, keys),
            "v": (hidden, keys),
            "out": (queries, hidden),
            "gate": (hidden, ffn),
            "up": (hidden, ffn),
            "down": (ffn, hidden),
        }
        norms, found = self.norms(config), {}
        for module in self.modules:
            if module in norms:
                found[f"{module}.scale"] = norm(norms[module], start)
            if module in products:
                found[f"{module}.kernel"] = matrix(*products[module])
                if self.biased(config, module):
                    found[f"{module}.bias"] = bias(products[module][1])
        return found

    def source(self, config: Any, name: str) -> Source:
        unit, module, *leaf = name.split(".")
        if name == "embed.tokens":
            return Source("model.embed_tokens.weight")
        if name == "head.tokens":
            return Source("lm_head.weight")
        if unit == "head":
            return Source("model.norm.weight")
        kind = "bias" if leaf[0] == "bias" else "weight"
        where = f"model.layers.{unit.removeprefix('layer_')}.{self.modules[module]}"
        return Source(f"{where}.{kind}", transposed=leaf[0] == "kernel")

    # The functions

    def normed(self, params: Params, name: str, x: Array, config: Any) -> Array:
        """The norm ``name`` of ``x``."""
        return rms_norm(params[name], x, config.rms_norm_eps, self.norm_offset)

    def embed(
        self, params: Params, rows: Float[Array, "batch seq embed"], at: Positions, config: Any
    ) -> Float[Array, "batch seq hidden"]:
        return rows

    def rope_of(self, config: Any, kind: Kind) -> Rope | None:
        """What turns the queries and keys of a layer; None: nothing does."""
        rope: Rope = config.rope
        return rope

    def scale(self, config: Any) -> float:
        """What attention's scores are multiplied with."""
        scale: float = config.head_dim**-0.5
        return scale

    def project(self, params: Params, x: Array, config: Any) -> tuple[Array, Array, Array]:
        """Queries, keys and values by heads, before they are turned."""
        return (
            split_heads(linear(params["q"], x), config.num_attention_heads, config.head_dim),
            split_heads(linear(params["k"], x), config.num_key_value_heads, config.head_dim),
            split_heads(linear(params["v"], x), config.num_key_value_heads, config.head_dim),
        )

    def before_attention(
        self,
        params: Params,
        hidden: Float[Array, "batch seq hidden"],
        at: Positions,
        config: Any,
        kind: Kind,
    ) -> tuple[Array, Array, Array]:
        x = self.normed(params, "attention_norm", hidden, config)
        return self.turned(*self.project(params, x, config), at, config, kind)

    def turned(
        self, query: Array, key: Array, value: Array, at: Positions, config: Any, kind: Kind
    ) -> tuple[Array, Array, Array]:
        """Queries and keys turned by their positions, and queries scaled."""
        rope = self.rope_of(config, kind)
        if rope is not None:
            cosine, sine = angles(rope, at)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        return query * jnp.asarray(self.scale(config), query.dtype), key, value

    def after_attention(
        self,
        params: Params,
        hidden: Float[Array, "batch seq hidden"],
        attended: Float[Array, "batch heads seq head_dim"],
        config: Any,
        kind: Kind,
    ) -> Float[Array, "batch seq hidden"] | Routed:
        hidden = hidden + linear(params["out"], merge_heads(attended))
        x = self.normed(params, "mlp_norm", hidden, config)
        return hidden + gated_mlp(params, x, config.hidden_act)

    def head(
        self,
        params: Params,
        table: Float[Array, "vocab embed"] | Packed,
        hidden: Float[Array, "*dims hidden"],
        config: Any,
    ) -> Float[Array, "*dims vocab"]:
        return logits(table, self.normed(params, "norm", hidden, config))


def all_windows(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Layer types where ``sliding_window`` alone gives every layer a window."""
    count = values["num_hidden_layers"]
    if values.get("sliding_window") is None or type(count) is not int:
        return ()
    return (SLIDING,) * min(count, 1025)  # more are refused


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value of ``config.json`` for a field that is a number or a flag."""
    kind = str(field.type).removesuffix(" | None")
    if value is None and kind != str(field.type):
        return None
    if kind == "float":
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigError(f"{field.name} must be a number, got {value!r}")
        return float(value)
    if kind == "bool" and not isinstance(value, bool):
        raise ConfigError(f"{field.name} must be true or false, got {value!r}")
    return value


# What transformers takes where a config.json is silent, in most families.
DEFAULTS: Mapping[str, Any] = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
