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
    """

    device: float
    host: float
    disk: float
    shared: bool = False

    @classmethod
    def of(cls, hardware: Hardware) -> Limits:
        """All that a machine has. Where nothing moves between them, device and host are one."""
        h = hardware
        if h.host_to_device is None:
            return cls(device=h.device_memory + h.host_memory, host=0, disk=h.disk, shared=True)
        return cls(device=h.device_memory, host=h.host_memory, disk=h.disk)

    def exceeded(self, peak: Mapping[Tier, float]) -> dict[Tier, float]:
        """Tier -> bytes too many."""
        room = {Tier.DEVICE: self.device, Tier.HOST: self.host, Tier.DISK: self.disk}
        over = {tier: peak[tier] - room[tier] for tier in Tier}
        if self.shared:
            # The host's part beyond its own room (buffers, say) is the device's loss.
            over[Tier.DEVICE] += max(0.0, over.pop(Tier.HOST))
        return {tier: excess for tier, excess in over.items() if excess > 0}
