"""How much a run may take of each tier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from scheduling.hardware import Hardware
from scheduling.policy import Tier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes that a run may take of each tier.

    Attributes:
        shared: Device and host are one memory, of ``device`` bytes in all; ``host`` is the part of
            it that may be used as a tier of its own.
        aside: Of ``host`` (of ``device``, where they are one): bytes that are not the run's to
            place, such as those of Python and of compiled programs.
    """

    device: float
    host: float
    disk: float
    shared: bool = False
    aside: float = 0.0

    @classmethod
    def of(cls, hardware: Hardware) -> Limits:
        """All that a machine has. Where nothing moves between them, device and host are one."""
        h = hardware
        if h.host_to_device is None:
            whole = h.device_memory + h.host_memory
            return cls(device=whole, host=0, disk=h.disk, shared=True, aside=h.runtime_memory)
        return cls(device=h.device_memory, host=h.host_memory, disk=h.disk, aside=h.runtime_memory)

    def exceeded(self, peak: Mapping[Tier, float]) -> dict[Tier, float]:
        """Tier -> bytes too many, if the run places so many."""
        room = {Tier.DEVICE: self.device, Tier.HOST: self.host, Tier.DISK: self.disk}
        over = {tier: peak[tier] - room[tier] for tier in Tier}
        if self.shared:
            # The host's part beyond its own room (buffers, say) is the device's loss.
            over[Tier.DEVICE] += max(0.0, over.pop(Tier.HOST))
        over[Tier.DEVICE if self.shared else Tier.HOST] += self.aside
        return {tier: excess for tier, excess in over.items() if excess > 0}
