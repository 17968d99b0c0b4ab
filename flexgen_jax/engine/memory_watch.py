"""How much memory a run really takes, looked at between passes, and that it keeps to its limits."""

from __future__ import annotations

from collections.abc import Callable

import jax

from flexgen_jax.planning.memory_need import MemoryLimits, gigabytes
from storage.memory import give_back, resident_memory

# What a process has that has done nothing yet: more than that was there before for other ends.
_BEGUN_WITH = 0.2e9
# Growth after which what is only kept for later is given back: then it is done seldom.
_GROWN, _GROWN_BYTES = 1.04, 1 << 25


class MemoryExceededError(RuntimeError):
    """A run has taken more memory than it may, and ends; what is finished is kept."""


def _device_memory() -> int | None:
    """Bytes that arrays take on the fullest local device; None: it has no memory of its own."""
    found = [(d.memory_stats() or {}).get("bytes_in_use") for d in jax.local_devices()]
    return max((n for n in found if n is not None), default=None)


class MemoryWatch:
    """Begins with a process as it is, before a model's weights are placed.

    Args:
        limits: What it may take; none: it is only measured.
        resident: Gives the resident memory of the process in bytes, 0 where nothing tells it;
            ``on_device`` that of the device, None where that is the host's.

    Attributes:
        process_bytes: The most resident memory that was seen, without what was there before for
            other ends, and without the pages of mapped files, which the system takes back.
        device_bytes: The most that arrays took on a device; None: that is the host's memory.
    """

    def __init__(
        self,
        limits: MemoryLimits = MemoryLimits(),  # noqa: B008 # immutable
        *,
        resident: Callable[[], int] = resident_memory,
        on_device: Callable[[], int | None] = _device_memory,
    ) -> None:
        self._limits, self._resident, self._on_device = limits, resident, on_device
        begun = resident()
        self._before = max(0, begun - int(_BEGUN_WITH))
        self.process_bytes, self.device_bytes = begun - self._before, on_device()
        self._last = begun  # after the last time that something was given back

    def look(self) -> None:
        """Notes what is taken now, and gives back what is only kept for later.

        Raises:
            MemoryExceededError: more than is allowed.
        """
        resident, device = self._resident(), self._on_device()
        shared = device is None
        allowed = self._limits.of_process(shared=shared)
        over = allowed is not None and resident - self._before > allowed
        if over or resident > _GROWN * self._last + _GROWN_BYTES:
            give_back()
            resident = self._last = self._resident()
        self._last = min(self._last, resident)
        process = resident - self._before
        self.process_bytes = max(self.process_bytes, process)
        if device is not None:
            self.device_bytes = max(self.device_bytes or 0, device)
            self._check("device", device, self._limits.of_device(shared=shared))
        self._check("process", process, allowed)

    @staticmethod
    def _check(what: str, taken: int, allowed: int | None) -> None:
        if allowed is not None and taken > allowed:
            raise MemoryExceededError(
                f"the {what} holds {gigabytes(taken)} of memory, more than the "
                f"{gigabytes(allowed)} that are allowed, so the run ends here: allow more to go on "
                "(--device-memory, --host-memory), or begin again with a smaller block "
                "(--device-batch-size, --num-device-batches)"
            )
