"""Which layers each pipeline stage computes, and where its weights lie."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from flexgen_jax.models.family import Config
from flexgen_jax.models.params import matmul_flops, unit_names
from flexgen_jax.planning.default_job import GEN_LEN, PROMPT_LEN
from flexgen_jax.weights.weight_format import WeightFormat
from scheduling.placement import Placement, place
from scheduling.policy import Policy
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
    costs = [
        flops * (of_head if layer == head else positions)
        for layer, flops in enumerate(matmul_flops(config))
    ]
    return balanced(costs, num_stages)


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
        tiers = place([nbytes for _, nbytes in cells], policy.weights)
        placements.append(
            Placement.of((*cell, tier) for cell, tier in zip(cells, tiers, strict=True))
        )
    return placements


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
