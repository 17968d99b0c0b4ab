"""Which layers each pipeline stage computes, and where its weights lie."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flexgen_jax.models.family import Config
from flexgen_jax.models.params import expert_numbers, matmul_flops, unit_experts, unit_names
from flexgen_jax.planning.default_job import GEN_LEN, PROMPT_LEN
from flexgen_jax.weights.weight_format import WeightFormat
from scheduling.placement import Placement, place_numbers
from scheduling.policy import Policy, Split, Tier
from scheduling.stages import balanced

# How many times as long a FLOP of a decode step takes as one of prefill (FlexGen's fit: 21.24 and
# 4.3 TFLOP/s): of few rows most of the time goes to reading the matrices.
_DECODE = 5


@functools.lru_cache(maxsize=64)
def stage_starts(config: Config, num_stages: int) -> tuple[int, ...]:
    """The first layer of each stage, balanced by what the layers cost.

    Raises:
        ValueError: more stages than layers.
    """
    head = len(config.units) - 1
    positions = PROMPT_LEN + _DECODE * GEN_LEN
    of_head = 1 + _DECODE * GEN_LEN  # logits are of the last position only
    units, experts = unit_experts(config), expert_numbers(config)
    costs: list[float] = []
    starts: list[int] = []
    for layer, flops in enumerate(matmul_flops(config)):
        if layer in units:  # a layer's experts stay with it
            assert experts is not None
            count, chosen = experts
            costs[-1] += len(units[layer]) * chosen / count * flops * positions
            continue
        costs.append(flops * (of_head if layer == head else positions))
        starts.append(layer)
    return tuple(starts[place] for place in balanced(costs, num_stages))


def layers_of(config: Config, num_stages: int) -> list[range]:
    """The layers of each stage."""
    starts = stage_starts(config, num_stages)
    ends = *starts[1:], len(config.units)
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def place_stages(config: Config, form: WeightFormat, policy: Policy) -> Sequence[Placement]:
    """Where the weights of each stage lie: dealt to tiers in layer order, an expert as a whole.

    What two stages need, such as the token table of a tied head, each of them has.

    Raises:
        ValueError: the policy places experts, and the model has none.
    """
    check_experts(config, policy)
    entries, placements = form.entries(config), []
    of_stages = zip(
        groups_of(config, form, policy.num_stages), tiers_of(config, form, policy), strict=True
    )
    for groups, tiers in of_stages:
        tier_of = {
            name: tier for group, tier in zip(groups, tiers, strict=True) for name in group.names
        }
        placements.append(
            Placement.of(
                (n, entry.nbytes, tier_of[n]) for n, entry in entries.items() if n in tier_of
            )
        )
    return tuple(placements)


class Group(NamedTuple):
    """What of a weight store lies on one tier together: a tensor, or an expert."""

    names: tuple[str, ...]
    nbytes: int
    is_expert: bool


@functools.lru_cache(maxsize=16)  # a search asks for the same again and again
def groups_of(config: Config, form: WeightFormat, num_stages: int) -> tuple[tuple[Group, ...], ...]:
    """What each stage has, in the order in which it is dealt to tiers."""
    entries, of_experts = form.entries(config), _units_of_experts(config)
    stages = []
    for layers in layers_of(config, num_stages):
        needed = stored_names(config, form, layers)
        found: dict[str, list[str]] = {}
        for name in entries:
            if name in needed:
                unit, _, rest = name.partition(".")
                whole = f"{unit}.{rest.partition('.')[0]}" if unit in of_experts else name
                found.setdefault(whole, []).append(name)
        stages.append(
            tuple(
                Group(
                    tuple(names),
                    sum(entries[name].nbytes for name in names),
                    whole.partition(".")[0] in of_experts,
                )
                for whole, names in found.items()
            )
        )
    return tuple(stages)


def tiers_of(config: Config, form: WeightFormat, policy: Policy) -> tuple[tuple[Tier, ...], ...]:
    """Where each group of each stage lies."""
    tiers = tuple(Tier)
    dealt = tier_numbers(config, form, policy)
    return tuple(tuple(tiers[number] for number in of_stage.tolist()) for of_stage in dealt)


def tier_numbers(config: Config, form: WeightFormat, policy: Policy) -> tuple[np.ndarray, ...]:
    """The same, as numbers of the tiers: of each stage (groups,)."""
    sizes = _sizes_of_groups(config, form, policy.num_stages)
    whole = (False, policy.weights), (True, policy.experts or policy.weights)
    found = []
    for stage, (is_expert, _) in enumerate(sizes):
        dealt = np.empty(len(is_expert), np.int64)
        for kind, split in whole:
            dealt[is_expert == kind] = _dealt(config, form, split, kind, policy.num_stages)[stage]
        found.append(dealt)
    return tuple(found)


@functools.lru_cache(maxsize=16)
def _sizes_of_groups(
    config: Config, form: WeightFormat, num_stages: int
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Of each stage (groups,) which are experts, and (groups,) their bytes."""
    return tuple(
        (np.array([g.is_expert for g in groups]), np.array([g.nbytes for g in groups], np.int64))
        for groups in groups_of(config, form, num_stages)
    )


@functools.lru_cache(maxsize=256)  # a search asks for the same again and again
def _dealt(
    config: Config, form: WeightFormat, split: Split, experts: bool, num_stages: int
) -> tuple[np.ndarray, ...]:
    """Of each stage (experts,), or of its other groups."""
    return tuple(
        np.array(place_numbers(nbytes[is_expert == experts].tolist(), split), np.int64)
        for is_expert, nbytes in _sizes_of_groups(config, form, num_stages)
    )


def check_experts(config: Config, policy: Policy) -> None:
    """Refuses a policy for experts that are not there.

    Raises:
        ValueError: the policy places experts, and the model has none.
    """
    if policy.experts is not None and not unit_experts(config):
        raise ValueError(
            "the policy places experts, and the model has none: leave experts out, or "
            "--experts-percent on the command line"
        )


def experts_of(config: Config, placement: Placement) -> Placement:
    """Those of the weights that are experts."""
    units = _units_of_experts(config)
    return Placement(tuple(c for c in placement.cells if c.name.partition(".")[0] in units))


def _units_of_experts(config: Config) -> set[str]:
    return {config.units[layer] for layer in unit_experts(config)}


def stored_names(config: Config, form: WeightFormat, layers: Iterable[int]) -> set[str]:
    """What of a weight store ``layers`` take."""
    return {
        stored
        for layer in layers
        for stored in form.order(config, unit_names(config, config.units[layer]))
    }


def together(placements: Sequence[Placement]) -> Placement:
    """Of all stages."""
    return Placement(tuple(cell for placement in placements for cell in placement.cells))
