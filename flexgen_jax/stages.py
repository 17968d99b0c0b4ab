"""The stages of a pipeline: which layers each device computes, and what of the model it holds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from flexgen_jax.config import OPTConfig
from flexgen_jax.params import matmul_flops, unit_names
from scheduling.placement import Placement, place
from scheduling.policy import Policy, Tier
from scheduling.stages import balanced, hosts_of
from storage.slots import Ring

if TYPE_CHECKING:
    from flexgen_jax.weight_format import WeightFormat
    from flexgen_jax.weights import Weights
    from scheduling.workload import Workload

# The job that layers are balanced for: what nobody says of it is not known when weights are placed.
_PROMPT_LEN, _GEN_LEN = 512, 32
# How many times as long a FLOP of a decode step takes as one of prefill (FlexGen's fit: 21.24 and
# 4.3 TFLOP/s): of few rows most of the time goes to reading the matrices.
_DECODE = 5


class Rings:
    """The slots that a stage's loads fill; kept from block to block: making them is expensive."""

    def __init__(self, workload: Workload) -> None:
        w = workload
        self.weights = Ring(w.weight_slots)
        self.cache = Ring(w.cache_slots)
        self.hidden = Ring(w.hidden_slots)

    @property
    def nbytes(self) -> int:
        """Bytes that the slots hold now."""
        return self.weights.nbytes + self.cache.nbytes + self.hidden.nbytes

    def close(self) -> None:
        """Gives their memory back."""
        for ring in (self.weights, self.cache, self.hidden):
            ring.close()


@dataclasses.dataclass
class Stage:
    """A device, with the weights of its layers.

    Attributes:
        rings: None: not made yet, or something may still be reading them.
    """

    device: Any
    weights: Weights
    rings: Rings | None = None

    def close(self) -> None:
        """Gives back memory and file handles."""
        if self.rings is not None:
            self.rings.close()
            self.rings = None
        self.weights.close()


@functools.lru_cache(maxsize=64)
def stage_starts(config: OPTConfig, num_stages: int) -> tuple[int, ...]:
    """The first layer of each stage, balanced by what the layers cost.

    Raises:
        ValueError: more stages than layers.
    """
    head = len(config.units) - 1
    positions = _PROMPT_LEN + _DECODE * _GEN_LEN
    of_head = 1 + _DECODE * _GEN_LEN  # logits are of the last position only
    costs = [
        flops * (of_head if layer == head else positions)
        for layer, flops in enumerate(matmul_flops(config))
    ]
    return balanced(costs, num_stages)


def layers_of(config: OPTConfig, num_stages: int) -> list[range]:
    """The layers of each stage."""
    starts = stage_starts(config, num_stages)
    ends = *starts[1:], len(config.units)
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def place_stages(config: OPTConfig, form: WeightFormat, policy: Policy) -> list[Placement]:
    """Where the weights of each stage lie: dealt to tiers (DESIGN §4) in layer order.

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


def stored_names(config: OPTConfig, form: WeightFormat, layers: Iterable[int]) -> set[str]:
    """What of a weight store ``layers`` take."""
    return {
        stored
        for layer in layers
        for name in unit_names(config, config.units[layer])
        for stored in form.stored_names(name)
    }


def together(placements: Sequence[Placement]) -> Placement:
    """Of all stages."""
    return Placement(tuple(cell for placement in placements for cell in placement.cells))


def fullest(stages: Sequence[Mapping[Tier, int]], *, shared: bool) -> dict[Tier, int]:
    """Bytes of each tier that the stages of a host hold: of the devices, the fullest one's.

    Args:
        shared: The devices are one memory.
    """
    held = {tier: sum(stage.get(tier, 0) for stage in stages) for tier in Tier}
    if not shared:
        held[Tier.DEVICE] = max(stage.get(Tier.DEVICE, 0) for stage in stages)
    return held


def stage_devices(num_stages: int) -> list[Any]:
    """A device for each stage: of all processes, where JAX's runtime joins several.

    Raises:
        ValueError: there are too few; the message says how to have more.
    """
    from flexgen_jax.backends import local_devices
    from flexgen_jax.processes import process_count

    local = local_devices()
    count = process_count() if num_stages > 1 else 1
    if num_stages < count:
        raise ValueError(
            f"num_stages {num_stages} over {count} processes: each of them needs a stage at least"
        )
    if count == 1:
        return _first(local, num_stages)
    hosts = hosts_of(num_stages, count)
    return [
        device
        for index in range(count)
        for device in _first(
            [d for d in jax.devices() if d.process_index == index], hosts.count(index)
        )
    ]


def _first(devices: list[Any], count: int) -> list[Any]:
    if len(devices) < count:
        cure = (
            f"to try stages on a CPU, set JAX_NUM_CPU_DEVICES={count} before JAX starts"
            if devices[0].platform == "cpu"
            else "use fewer stages, or more machines"
        )
        raise ValueError(
            f"num_stages {count} needs {count} devices, and JAX finds {len(devices)} "
            f"({devices[0].device_kind}); {cure}"
        )
    return devices[:count]
