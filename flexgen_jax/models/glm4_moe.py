"""GLM-4.5 and 4.6 (GLM-4.5 Team 2025, arXiv 2508.06471): experts chosen by corrected sigmoids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexgen_jax.models.family import ConfigError, Param, Params, Source, bias, positive
from flexgen_jax.models.glm4 import partial_factor, read_partial_rope
from flexgen_jax.models.layers import gated_mlp, linear
from flexgen_jax.models.packed import dense
from flexgen_jax.models.rope import Rope
from flexgen_jax.models.rotary import MODULES
from flexgen_jax.models.sparse import SparseConfig, SparseDecoder, gated_params

_ENDS = (151329, 151336, 151338)
_HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm4MoeConfig(SparseConfig):
    """Hyper-parameters.

    Attributes:
        n_shared_experts: So many that all tokens take; they are one.
        n_group, topk_group: Experts lie in so many groups, of which each token chooses from the
            best ``topk_group``.
        routed_scaling_factor: That gates are multiplied with.
        use_qk_norm: Each head of queries and keys has a norm.
        partial_rotary_factor: The share of a head that positions turn.
    """

    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    use_qk_norm: bool = False
    partial_rotary_factor: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "n_shared_experts", "n_group", "topk_group")
        if self.topk_group > self.n_group:
            raise ConfigError(f"topk_group ({self.topk_group}) exceeds n_group ({self.n_group})")
        if self.num_experts % self.n_group:
            raise ConfigError(
                f"n_routed_experts ({self.num_experts}) must be a multiple of n_group "
                f"({self.n_group})"
            )
        among = self.num_experts // self.n_group
        if among < 2:
            raise ConfigError(f"groups of {among} expert; each is judged by its best two")
        if self.num_experts_per_tok > among * self.topk_group:
            raise ConfigError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the "
                f"{among * self.topk_group} experts of topk_group groups"
            )


class Glm4Moe(SparseDecoder):
    """See the module; the layer that predicts a second token is left out."""

    model_types = ("glm4_moe",)
    architecture = "Glm4MoeForCausalLM"
    config_class = Glm4MoeConfig
    defaults = {  # noqa: RUF012 # read only
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "partial_rotary_factor": 0.5,
        "eos_token_id": None,
    }
    names = {"num_experts": "n_routed_experts"}  # noqa: RUF012 # read only
    modules = {**MODULES, **_HEAD_NORMS}  # noqa: RUF012 # read only
    sparse_modules = {  # noqa: RUF012 # read only
        "router": "mlp.gate",
        "shared.gate": "mlp.shared_experts.gate_proj",
        "shared.up": "mlp.shared_experts.up_proj",
        "shared.down": "mlp.shared_experts.down_proj",
    }

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return super().fields({**values, "partial_rotary_factor": partial_factor(values)})

    def dense_layers(self, values: Mapping[str, Any]) -> tuple[int, ...]:
        first = values["first_k_dense_replace"]
        if type(first) is not int or not 0 <= first <= 1024:
            raise ConfigError(f"first_k_dense_replace must be a number of layers, got {first!r}")
        return tuple(range(first))

    def write(self, config: Any) -> dict[str, Any]:
        return {**super().write(config), "first_k_dense_replace": len(config.dense_layers)}

    def read_rope(self, values: Mapping[str, Any], head_dim: int) -> Rope:
        return read_partial_rope(values, head_dim)

    def biased(self, config: Any, module: str) -> bool:
        return config.attention_bias and module in ("q", "k", "v")

    def norms(self, config: Any) -> dict[str, int]:
        heads = dict.fromkeys(_HEAD_NORMS, config.head_dim) if config.use_qk_norm else {}
        return {**super().norms(config), **heads}

    def sparse_params(self, config: Any) -> dict[str, Param]:
        width = config.moe_intermediate_size * config.n_shared_experts
        return {
            **super().sparse_params(config),
            # Of 16 bits it would be coarser than what scores differ by.
            "router.correction": bias(config.num_experts)._replace(exact=True),
            **gated_params("shared.", config.hidden_size, width),
        }

    def source(self, config: Any, name: str) -> Source:
        if name.endswith(".router.correction"):
            layer = name.partition(".")[0].removeprefix("layer_")
            return Source(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
        return super().source(config, name)

    def ignored(self, config: Any, key: str) -> bool:
        # Of the layer behind the last.
        beyond = f"model.layers.{config.num_hidden_layers}."
        return key.startswith(beyond) or super().ignored(config, key)

    def project(self, params: Params, x: Array, config: Any) -> tuple[Array, Array, Array]:
        query, key, value = super().project(params, x, config)
        if config.use_qk_norm:
            query = self.normed(params, "q_norm", query, config)
            key = self.normed(params, "k_norm", key, config)
        return query, key, value

    def choose(
        self, params: Params, x: Float[Array, "batch seq hidden"], config: Any
    ) -> tuple[Float[Array, "batch seq k"], Int[Array, "batch seq k"]]:
        """Corrections count in choosing, not in the gates."""
        router = {k: dense(v, jnp.float32).astype(jnp.float32) for k, v in params["router"].items()}
        scores = jax.nn.sigmoid(linear(router, x.astype(jnp.float32)))
        corrected = scores + router["correction"]
        if config.n_group > 1:
            groups = corrected.reshape(*corrected.shape[:-1], config.n_group, -1)
            best = jax.lax.top_k(groups, 2)[0].sum(axis=-1)
            kept = jax.lax.top_k(best, config.topk_group)[1]
            open_ = (kept[..., None] == jnp.arange(config.n_group)).any(axis=-2)
            corrected = jnp.where(open_[..., None], groups, -jnp.inf).reshape(corrected.shape)
        chosen = jax.lax.top_k(corrected, config.num_experts_per_tok)[1]
        gates = jnp.take_along_axis(scores, chosen, axis=-1)
        if config.norm_topk_prob:
            gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
        return gates * config.routed_scaling_factor, chosen.astype(jnp.int32)

    def shared(
        self, params: Params, x: Float[Array, "batch seq hidden"], config: Any
    ) -> Float[Array, "batch seq hidden"]:
        return gated_mlp(params["shared"], x, config.hidden_act)


def _glm4_moe(positions: int, **more: Any) -> Glm4MoeConfig:
    return Glm4MoeConfig(
        model_type="glm4_moe",
        vocab_size=151552,
        num_attention_heads=96,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope=Rope(1e6, 64, positions),
        attention_bias=True,
        num_experts_per_tok=8,
        eos_token_id=_ENDS,
        pad_token_id=151329,
        **more,
    )


_AIR: dict[str, Any] = {
    "num_hidden_layers": 46,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_experts": 128,
    "dense_layers": (0,),
}
_LARGE: dict[str, Any] = {
    "num_hidden_layers": 92,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 160,
    "dense_layers": (0, 1, 2),
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}

PRESETS: Mapping[str, Glm4MoeConfig] = {
    "zai-org/GLM-4.5-Air": _glm4_moe(131072, **_AIR),
    "zai-org/GLM-4.5": _glm4_moe(131072, **_LARGE),
    "zai-org/GLM-4.6": _glm4_moe(202752, **_LARGE),
}

FAMILY = Glm4Moe(PRESETS)
