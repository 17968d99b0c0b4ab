"""The host tier: arrays in main memory, one transfer away from the device.

On an accelerator that is ``pinned_host`` memory, from which copies run asynchronously at full bus
speed. On the CPU backend device and host are the same memory: the arrays are aliased and the tier
exists in the accounting only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from storage.slots import Slot


class HostStore:
    """Arrays in host memory; loading copies them to ``device`` in one batched transfer."""

    def __init__(self, device: Any = None) -> None:
        self._device = device or jax.local_devices()[0]
        self._on_device = jax.sharding.SingleDeviceSharding(self._device)
        self._shared = self._device.platform == "cpu"
        kind = None if self._shared else "pinned_host"
        self._home = jax.sharding.SingleDeviceSharding(self._device, memory_kind=kind)
        self._arrays: dict[str, jax.Array] = {}

    def put(self, name: str, array: np.ndarray) -> None:
        """Keeps ``array``: aliased if aligned on the CPU backend, else as a pinned copy."""
        self._arrays[name] = jax.block_until_ready(jax.device_put(array, self._home))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def slot_nbytes(self, names: Sequence[str]) -> int:
        return 0

    def load(self, names: Sequence[str], slot: Slot) -> dict[str, jax.Array]:
        chosen = {name: self._arrays[name] for name in names}
        if self._shared:
            return chosen
        # One call for the whole layer: every transfer pays a fixed price.
        return jax.block_until_ready(jax.device_put(chosen, self._on_device))

    def close(self) -> None:
        self._arrays.clear()
