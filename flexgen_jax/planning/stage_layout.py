"""Which layers each pipeline stage computes, and where its weights lie."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from flexgen_jax.models.family import Config
from flexgen_jax.models.params import expert_numbers, matmul_flops, unit_experts, unit_names
from flexgen_jax.planning.default_job import GEN_LEN, PROMPT_LEN
from flexgen_jax.weights.weight_format import WeightFormat
from scheduling.placement import Placement, place
from scheduling.policy import Policy, Tier
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


def place_stages(config: Config, form: WeightFormat, policy: Policy) -> list[Placement]:
    """Where the weights of each stage lie: dealt to tiers in layer order.

    What two stages need, such as the token table of a tied head, each of them has.
    """
    entries = form.entries(config)
    placements = []
    for layers in layers_of(config, policy.num_stages):
        needed = stored_names(config, form, layers)
        cells = [(name, entry.nbytes) for name, entry in entries.items() if name in needed]
        placements.append(_dealt(config, cells, policy))
    return placements


def _dealt(config: Config, cells: Sequence[tuple[str, int]], policy: Policy) -> Placement:
    """Tensors to tiers: the experts', and the others'."""
    units = unit_experts(config)
    names = {config.units[layer] for layer in units}
    tier_of: dict[str, Tier] = {}
    for split, some in (
        (policy.weights, [c for c in cells if c[0].partition(".")[0] not in names]),
        (policy.experts or policy.weights, [c for c in cells if c[0].partition(".")[0] in names]),
    ):
        tiers = place([nbytes for _, nbytes in some], split)
        tier_of |= {name: tier for (name, _), tier in zip(some, tiers, strict=True)}
    return Placement.of((*cell, tier_of[cell[0]]) for cell in cells)


def stored_names(config: Config, form: WeightFormat, layers: Iterable[int]) -> set[str]:
    """What of a weight store ``layers`` take."""
    return {
        stored
        for layer in layers
        for name in unit_names(config, config.units[layer])
        for stored in form.stored_names(config, name)
    }


def together(placements: Sequence[Placement]) -> Placement:
    """Of all stages."""
    return Placement(tuple(cell for placement in placements for cell in placement.cells))
