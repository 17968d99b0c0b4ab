"""The parameters of a model before any array exists: names, shapes, units.

Initialisation, conversion, placement and loading all derive from these tables. A parameter has
a flat name ``unit.module.leaf`` (``layer_3.fc1.kernel``); nested, ``params["layer_3"]["fc1"]
["kernel"]``. Matrices count as (in, out) here, ready for ``x @ kernel``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from flexgen_jax.models.family import Config, Kind, Param, Unit
from flexgen_jax.models.registry import family_of

T = TypeVar("T")

Shapes = dict[str, tuple[int, ...]]

# The table whose rows the embedding takes: looked up where it lies, never loaded for it.
TOKEN_TABLE = "embed.tokens"


@functools.lru_cache(maxsize=16)
def _units(config: Config) -> dict[str, Unit]:
    return {unit.name: unit for unit in family_of(config).units(config)}


@functools.lru_cache(maxsize=16)
def unit_kinds(config: Config) -> tuple[Kind, ...]:
    """Of each unit, in order."""
    return tuple(unit.kind for unit in _units(config).values())


@functools.lru_cache(maxsize=16)
def unit_experts(config: Config) -> Mapping[int, tuple[int, ...]]:
    """Unit of experts, by its number -> which of its layer's experts it has."""
    units = enumerate(_units(config).values())
    return MappingProxyType({number: unit.experts for number, unit in units if unit.experts})


@functools.lru_cache(maxsize=16)
def expert_numbers(config: Config) -> tuple[int, int] | None:
    """How many experts a layer has, and how many of them a token chooses; None: there are none."""
    kinds = (unit.kind for unit in _units(config).values() if unit.kind.role == "decoder")
    count = max(kind.experts for kind in kinds)
    return (count, config.num_experts_per_tok) if count else None


@functools.lru_cache(maxsize=1 << 16)  # a large model with experts has 12,000 units
def unit_records(config: Config, unit: str) -> dict[str, Param]:
    """Flat name -> record of what ``unit`` owns; a shared parameter has one owner."""
    own = family_of(config).params(config, _units(config)[unit])
    return {f"{unit}.{name}": record for name, record in own.items()}


def unit_shapes(config: Config, unit: str) -> Shapes:
    """Flat name -> shape of what ``unit`` owns."""
    return {name: record.shape for name, record in unit_records(config, unit).items()}


@functools.lru_cache(maxsize=16)
def param_records(config: Config) -> dict[str, Param]:
    """Flat name -> record of every parameter, each once, in layer order."""
    return {k: v for unit in _units(config) for k, v in unit_records(config, unit).items()}


@functools.lru_cache(maxsize=16)
def param_shapes(config: Config) -> Shapes:
    """Flat name -> shape of every parameter, each once, in layer order."""
    return {name: record.shape for name, record in param_records(config).items()}


@functools.lru_cache(maxsize=1 << 16)  # a large model with experts has 12,000 units
def unit_names(config: Config, unit: str) -> tuple[str, ...]:
    """Flat names of what ``unit`` needs to compute, what it borrows included."""
    own = tuple(unit_records(config, unit))
    return own + family_of(config).borrows(config, _units(config)[unit])


@functools.lru_cache(maxsize=1 << 16)  # a large model with experts has 12,000 units
def loaded_names(config: Config, unit: str) -> tuple[str, ...]:
    """Flat names of what a load of ``unit`` brings: of the token table the embedding needs rows."""
    names = unit_names(config, unit)
    if _units(config)[unit].kind.role != "embed":
        return names
    return tuple(name for name in names if name != TOKEN_TABLE)


def head_table(config: Config) -> str:
    """The flat name of the table that the head multiplies with: its own, or the tokens'."""
    records = param_records(config)
    return next(n for n in unit_names(config, "head") if records[n].role == "table")


@functools.lru_cache(maxsize=16)
def matmul_flops(config: Config) -> tuple[float, ...]:
    """Per unit, of one position: two for each element of a matrix that it is multiplied with.

    Of a unit of experts, of one position that chose one of them: its experts are alike.
    """
    records = param_records(config)

    def multiplied(name: str, unit: Unit) -> bool:
        role = records[name].role
        return role == "matrix" or (unit.kind.role == "head" and role == "table")

    return tuple(
        2.0
        * sum(
            _elements(records[name])
            for name in unit_names(config, unit.name)
            if multiplied(name, unit)
        )
        / (unit.kind.experts if unit.kind.role == "experts" else 1)
        for unit in _units(config).values()
    )


# What a decoder layer multiplies with before attention.
BEFORE_ATTENTION = ("q", "k", "v")


@functools.lru_cache(maxsize=16)
def query_flops(config: Config) -> tuple[float, ...]:
    """Of :func:`matmul_flops` per unit, what comes before attention: queries, keys and values."""
    before = {f"{module}.kernel" for module in BEFORE_ATTENTION}
    return tuple(
        2.0
        * sum(
            _elements(record)
            for name, record in unit_records(config, unit).items()
            if name.partition(".")[2] in before
        )
        for unit in _units(config)
    )


def _elements(record: Param) -> int:
    return math.prod(record.shape)


def nest(flat: dict[str, T]) -> dict[str, Any]:
    """``{"a.b.c": x}`` -> ``{"a": {"b": {"c": x}}}``."""
    from flax.traverse_util import unflatten_dict

    tree: dict[str, Any] = unflatten_dict(flat, sep=".")
    return tree


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`nest`."""
    from flax.traverse_util import flatten_dict

    flat: dict[str, Any] = flatten_dict(tree, sep=".")
    return flat
