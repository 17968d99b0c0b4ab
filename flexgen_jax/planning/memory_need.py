"""How much memory a process takes that runs a block, and whether it may."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from scheduling.estimate import shortened
from scheduling.peak import highest, peak_nbytes
from scheduling.policy import Tier
from scheduling.registered import SCHEDULES, is_ours
from scheduling.schedules import Schedule
from scheduling.workload import Workload


class MemoryLimitError(ValueError):
    """A run would take more memory than it may; it has not begun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """What a block takes.

    Attributes:
        peak: Phase -> bytes per tier that weights, cache, hidden states and buffers take.
        workspace_bytes: What the largest computation takes of the device on top.
        runtime_bytes: Of host memory: Python, its libraries, and compiled programs.
        shared: Host and device are one memory.
    """

    peak: Mapping[str, Mapping[Tier, int]]
    workspace_bytes: int
    runtime_bytes: int
    shared: bool

    @property
    def device_bytes(self) -> int:
        """Of the device's memory; where it is the host's, of that."""
        peak = highest(self.peak)
        if not self.shared:
            return peak[Tier.DEVICE] + self.workspace_bytes
        return peak[Tier.DEVICE] + peak[Tier.HOST] + self.workspace_bytes + self.runtime_bytes

    @property
    def host_bytes(self) -> int:
        """Resident memory of the process: all that it takes of the host's memory."""
        if self.shared:
            return self.device_bytes
        return highest(self.peak)[Tier.HOST] + self.runtime_bytes

    def to_json(self) -> dict[str, Any]:
        """Bytes of the process, and of the device where that has a memory of its own."""
        device = {} if self.shared else {"device_bytes": self.device_bytes}
        return {
            **device,
            "process_bytes": self.host_bytes,
            "workspace_bytes": self.workspace_bytes,
            "runtime_bytes": self.runtime_bytes,
        }


@dataclasses.dataclass(frozen=True)
class MemoryLimits:
    """Bytes that were allowed by name, ``device_memory`` and ``host_memory``; None: no limit.

    Where both are one memory, ``device`` is all of it, or else ``host``.
    """

    device: int | None = None
    host: int | None = None

    @property
    def any(self) -> bool:
        """Whether there is a limit."""
        return self.device is not None or self.host is not None

    def of_device(self, *, shared: bool) -> int | None:
        """For the device's memory where it has one of its own."""
        return None if shared else self.device

    def of_process(self, *, shared: bool) -> int | None:
        """For the resident memory of the process."""
        if not shared:
            return self.host
        return self.host if self.device is None else self.device

    def check(self, need: MemoryNeed) -> None:
        """Refuses what would take more.

        Raises:
            MemoryLimitError: it says what is needed, what is allowed and what to change.
        """
        pairs = (
            ("the device's memory", need.device_bytes, self.of_device(shared=need.shared)),
            ("memory", need.host_bytes, self.of_process(shared=need.shared)),
        )
        for what, needed, allowed in pairs:
            if allowed is not None and needed > allowed:
                of_it = f", of them {gigabytes(need.runtime_bytes)} for Python and its libraries"
                raise MemoryLimitError(
                    f"this run would take {gigabytes(needed)} of {what}"
                    f"{of_it if what == 'memory' else ''}; {gigabytes(allowed)} are allowed. "
                    "Allow more (--device-memory, --host-memory), make the block smaller "
                    "(--device-batch-size, --num-device-batches), leave more on disk (--percent), "
                    "or let policy auto choose what fits"
                )


def memory_need(
    schedule: Schedule, workload: Workload, *, shared: bool, runtime_bytes: float
) -> MemoryNeed:
    """Of a block as the schedule orders it.

    Args:
        workload: With sizes.
    """
    assert workload.sizes is not None
    return MemoryNeed(
        peak=_peak(schedule, workload, shared=shared),
        workspace_bytes=max(b.workspace for b in workload.sizes.batches),
        runtime_bytes=round(runtime_bytes),
        shared=shared,
    )


def _peak(order: Schedule, w: Workload, *, shared: bool) -> dict[str, dict[Tier, int]]:
    """Phase -> bytes per tier, as the order has them."""
    # Where all batches are at the same step, or pass one by one, those in the middle are alike.
    # A diagonal's batches are at different steps, and of others nobody knows. Slots of weights grow
    # until each has had the largest layer that ever comes into it: a step later for each slot.
    if is_ours(order) and order is not SCHEDULES["diagonal"] and w.num_steps > 1:
        w = shortened(w, min(w.weight_slots + w.num_stages, w.num_steps - 1))
    return peak_nbytes(order(w), w, shared=shared)


def gigabytes(nbytes: float) -> str:
    """In words: GB, or MB where they are few."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
