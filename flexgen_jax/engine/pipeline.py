"""The stages of a pipeline: which layers each device computes, and what of the model it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scheduling.policy import Tier
from storage.slots import Ring

if TYPE_CHECKING:
    from flexgen_jax.engine.layer_loading import LayerLoader
    from scheduling.workload import Workload


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
    weights: LayerLoader
    rings: Rings | None = None

    def close(self) -> None:
        """Gives back memory and file handles."""
        if self.rings is not None:
            self.rings.close()
            self.rings = None
        self.weights.close()


def fullest(stages: Sequence[Mapping[Tier, int]], *, shared: bool) -> dict[Tier, int]:
    """Bytes of each tier that the stages of a host hold: of the devices, the fullest one's.

    Args:
        shared: The devices are one memory.
    """
    held = {tier: sum(stage.get(tier, 0) for stage in stages) for tier in Tier}
    if not shared:
        held[Tier.DEVICE] = max(stage.get(Tier.DEVICE, 0) for stage in stages)
    return held
