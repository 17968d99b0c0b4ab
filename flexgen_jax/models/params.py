"""The parameters of OPT before any array exists: names, shapes, units.

Initialisation, conversion, placement and loading all derive from these tables. A parameter has
a flat name ``unit.module.leaf`` (``layer_3.fc1.kernel``); nested, ``params["layer_3"]["fc1"]
["kernel"]``. Kernels are stored (in, out), ready for ``x @ kernel``.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeVar

from flexgen_jax.models.config import OPTConfig

T = TypeVar("T")

Shapes = dict[str, tuple[int, ...]]

# Learned positions start at index 2 in OPT: an inheritance of fairseq's padding index.
POSITION_OFFSET = 2


def _norm(name: str, config: OPTConfig) -> Shapes:
    if not config.layer_norm_elementwise_affine:
        return {}
    return {f"{name}.scale": (config.hidden_size,), f"{name}.bias": (config.hidden_size,)}


def _linear(name: str, n_in: int, n_out: int, config: OPTConfig) -> Shapes:
    shapes: Shapes = {f"{name}.kernel": (n_in, n_out)}
    if config.enable_bias:
        shapes[f"{name}.bias"] = (n_out,)
    return shapes


def unit_shapes(config: OPTConfig, unit: str) -> Shapes:
    """Flat name -> shape of what ``unit`` owns; a shared parameter has one owner."""
    hidden, embed, ffn = config.hidden_size, config.word_embed_proj_dim, config.ffn_dim
    if unit == "embed":
        shapes: Shapes = {
            "embed.tokens": (config.vocab_size, embed),
            "embed.positions": (config.max_position_embeddings + POSITION_OFFSET, hidden),
        }
        if config.has_projection:
            shapes["embed.project_in.kernel"] = (embed, hidden)
        return shapes
    if unit == "head":
        shapes = _norm("head.norm", config) if config.has_final_norm else {}
        if config.has_projection:
            shapes["head.project_out.kernel"] = (hidden, embed)
        if not config.tie_word_embeddings:
            shapes["head.tokens"] = (config.vocab_size, embed)
        return shapes
    return {
        **_norm(f"{unit}.attention_norm", config),
        **_linear(f"{unit}.q", hidden, hidden, config),
        **_linear(f"{unit}.k", hidden, hidden, config),
        **_linear(f"{unit}.v", hidden, hidden, config),
        **_linear(f"{unit}.out", hidden, hidden, config),
        **_norm(f"{unit}.mlp_norm", config),
        **_linear(f"{unit}.fc1", hidden, ffn, config),
        **_linear(f"{unit}.fc2", ffn, hidden, config),
    }


@functools.lru_cache(maxsize=16)
def param_shapes(config: OPTConfig) -> Shapes:
    """Flat name -> shape of every parameter, each once, in layer order."""
    return {k: v for unit in config.units for k, v in unit_shapes(config, unit).items()}


@functools.lru_cache(maxsize=512)
def unit_names(config: OPTConfig, unit: str) -> tuple[str, ...]:
    """Flat names of what ``unit`` needs to compute; a tied head needs ``embed.tokens`` as well."""
    own = tuple(unit_shapes(config, unit))
    return (*own, "embed.tokens") if unit == "head" and config.tie_word_embeddings else own


@functools.lru_cache(maxsize=16)
def matmul_flops(config: OPTConfig) -> tuple[float, ...]:
    """Per unit, of one position: two for each element of a matrix that it is multiplied with."""
    shapes = param_shapes(config)
    return tuple(
        2.0
        * sum(
            math.prod(shapes[name])
            for name in unit_names(config, unit)
            if name.endswith(".kernel") or (unit == "head" and name.endswith(".tokens"))
        )
        for unit in config.units
    )


def nest(flat: dict[str, T]) -> dict[str, Any]:
    """``{"a.b.c": x}`` -> ``{"a": {"b": {"c": x}}}``."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of :func:`nest`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
