"""What decoders with experts share: a router, and experts that are gated MLPs.

Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021, arXiv 2101.03961. A family derives its
config from :class:`SparseConfig` and its functions from :class:`SparseDecoder`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexgen_jax.models.family import (
    ConfigError,
    Kind,
    Param,
    Params,
    Routed,
    Source,
    Unit,
    matrix,
    positive,
)
from flexgen_jax.models.layers import gated_mlp, linear, merge_heads
from flexgen_jax.models.rotary import RotaryConfig, RotaryDecoder

# Elements of the experts that are loaded together, at most: enough for the disk and for what a load
# costs in Python, and few enough for slots that are much smaller than a layer.
_UNIT_ELEMENTS = 40_000_000
_UNIT_EXPERTS = 16

# Of all layers: each is a few records, and tens of thousands are what there is.
_MOST_EXPERTS = 1 << 17


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig(RotaryConfig):
    """Hyper-parameters of a model with experts.

    Attributes:
        num_experts: Of each layer that has some.
        num_experts_per_tok: How many of them each token chooses.
        moe_intermediate_size: Width of an expert; ``intermediate_size`` is that of dense layers.
        norm_topk_prob: The gates of the chosen experts are divided by their sum.
        dense_layers: Layers without experts.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
        if self.num_experts > 4096 or self.num_experts * self.num_hidden_layers > _MOST_EXPERTS:
            raise ConfigError(
                f"num_experts {self.num_experts} in each of {self.num_hidden_layers} layers is "
                "more than any model has"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds num_experts "
                f"({self.num_experts})"
            )


class SparseDecoder(RotaryDecoder):
    """Layers whose MLP is many, of which each token takes a few.

    Attributes:
        names: Our names of fields -> those in ``config.json``, where they are others.
        sparse_modules: Our names of what a layer with experts has beside attention -> Hugging
            Face's: ``router``, and of an expert that all tokens take ``shared.gate`` and the like.
        expert_modules: Our names of an expert's modules -> Hugging Face's, with the expert's number
            in them.
    """

    config_class: ClassVar[type[SparseConfig]] = SparseConfig
    names: ClassVar[Mapping[str, str]] = {}
    sparse_modules: ClassVar[Mapping[str, str]] = {"router": "mlp.gate"}
    expert_modules: ClassVar[Mapping[str, str]] = {
        "gate": "mlp.experts.{}.gate_proj",
        "up": "mlp.experts.{}.up_proj",
        "down": "mlp.experts.{}.down_proj",
    }

    def read(self, values: Mapping[str, Any]) -> RotaryConfig:
        said = dict(values)
        # transformers 5 calls their number so, whatever the family.
        for ours, theirs in (("num_experts", "num_local_experts"), *self.names.items()):
            if said.get(theirs) is not None:
                said[ours] = said[theirs]
        return super().read(said)

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            if values.get(name) is None:
                raise ConfigError(f"there is no {self.names.get(name, name)}")
        return {**super().fields(values), "dense_layers": self.dense_layers(values)}

    def dense_layers(self, values: Mapping[str, Any]) -> tuple[int, ...]:
        """Layers without experts, as ``config.json`` has them."""
        return ()

    def write(self, config: Any) -> dict[str, Any]:
        values = super().write(config)
        del values["dense_layers"]
        for ours, theirs in self.names.items():
            values[theirs] = values.pop(ours)
        return values

    def is_sparse(self, config: Any, index: int) -> bool:
        """Whether a layer has experts."""
        return index not in config.dense_layers

    def kind(self, config: Any, index: int) -> Kind:
        experts = config.num_experts if self.is_sparse(config, index) else 0
        return super().kind(config, index)._replace(experts=experts)

    def experts_per_unit(self, config: Any) -> int:
        each = 3 * config.hidden_size * config.moe_intermediate_size
        most = min(_UNIT_EXPERTS, max(1, config.num_experts // 2), _UNIT_ELEMENTS // each)
        divisors = (n for n in range(max(1, most), 0, -1) if config.num_experts % n == 0)
        return next(divisors)

    # The parameters

    def params(self, config: Any, unit: Unit) -> dict[str, Param]:
        if unit.kind.role == "experts":
            return {
                f"expert_{number}.{name}": record
                for number in unit.experts
                for name, record in self.expert_params(config).items()
            }
        found = super().params(config, unit)
        if unit.kind.role == "decoder" and unit.kind.experts:
            dense = ("gate.", "up.", "down.")
            found = {k: v for k, v in found.items() if not k.startswith(dense)}
            found |= self.sparse_params(config)
        return found

    def sparse_params(self, config: Any) -> dict[str, Param]:
        """Of a layer with experts: what tokens choose with, few and decisive, so never in codes."""
        return {"router.kernel": Param((config.hidden_size, config.num_experts), "matrix")}

    def expert_params(self, config: Any) -> dict[str, Param]:
        """Of one expert, ``module.leaf`` -> record."""
        return gated_params("", config.hidden_size, config.moe_intermediate_size)

    def source(self, config: Any, name: str) -> Source:
        unit, _, rest = name.partition(".")
        module, _, leaf = rest.rpartition(".")
        layer, experts, _ = unit.removeprefix("layer_").partition("_experts_")
        if experts:
            number, _, part = module.removeprefix("expert_").partition(".")
            where = self.expert_modules[part].format(number)
        elif module in self.sparse_modules:
            where = self.sparse_modules[module]
        else:
            return super().source(config, name)
        kind = "bias" if leaf == "bias" else "weight"
        return Source(f"model.layers.{layer}.{where}.{kind}", transposed=leaf == "kernel")

    # The functions

    def after_attention(
        self,
        params: Params,
        hidden: Float[Array, "batch seq hidden"],
        attended: Float[Array, "batch heads seq head_dim"],
        config: Any,
        kind: Kind,
    ) -> Float[Array, "batch seq hidden"] | Routed:
        if not kind.experts:
            return super().after_attention(params, hidden, attended, config, kind)
        hidden = hidden + linear(params["out"], merge_heads(attended))
        x = self.normed(params, "mlp_norm", hidden, config)
        gates, chosen = self.choose(params, x, config)
        return Routed(hidden + self.shared(params, x, config), x, gates, chosen)

    def shared(
        self, params: Params, x: Float[Array, "batch seq hidden"], config: Any
    ) -> Float[Array, "batch seq hidden"] | float:
        """What is added for all tokens, whatever they chose."""
        return 0.0

    def choose(
        self, params: Params, x: Float[Array, "batch seq hidden"], config: Any
    ) -> tuple[Float[Array, "batch seq k"], Int[Array, "batch seq k"]]:
        """The gates of the chosen experts (float32), and which they are: the likeliest ones."""
        scores = linear(params["router"], x).astype(jnp.float32)
        gates, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), config.num_experts_per_tok)
        if config.norm_topk_prob:
            gates = gates / gates.sum(axis=-1, keepdims=True)
        return gates, chosen.astype(jnp.int32)

    def expert(
        self, params: Params, inputs: Float[Array, "rows hidden"], config: Any
    ) -> Float[Array, "rows hidden"]:
        return gated_mlp(params, inputs[None], config.hidden_act)[0]


def gated_params(prefix: str, hidden: int, ffn: int) -> dict[str, Param]:
    """Of a gated MLP, whose names begin with ``prefix``."""
    return {
        f"{prefix}gate.kernel": matrix(hidden, ffn),
        f"{prefix}up.kernel": matrix(hidden, ffn),
        f"{prefix}down.kernel": matrix(ffn, hidden),
    }


def dense_by_step(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without experts by ``mlp_only_layers`` and ``decoder_sparse_step``.

    Raises:
        ConfigError: not a list of layers, or no step.
    """
    dense, every = values.get("mlp_only_layers") or [], values.get("decoder_sparse_step", 1)
    layers = values["num_hidden_layers"]
    if not isinstance(dense, (list, tuple)) or not all(type(i) is int for i in dense):
        raise ConfigError(f"mlp_only_layers must be a list of layers, got {dense!r}")
    if type(every) is not int or every < 1:
        raise ConfigError(f"decoder_sparse_step must be a positive integer, got {every!r}")
    if type(layers) is not int:
        return ()  # is refused
    return tuple(i for i in range(min(layers, 1024)) if i in dense or (i + 1) % every)
