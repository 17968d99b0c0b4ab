"""The device tier: arrays that already are where computation wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from storage.slots import Slot


class DeviceStore:
    """Arrays resident on ``device``; loading hands them out as they are."""

    def __init__(self, device: Any = None) -> None:
        self._device = device or jax.local_devices()[0]
        self._arrays: dict[str, jax.Array] = {}

    def put(self, name: str, array: np.ndarray) -> None:
        """Moves ``array`` to the device; aligned host memory is aliased, not copied, on a CPU."""
        self._arrays[name] = jax.block_until_ready(jax.device_put(array, self._device))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def slot_nbytes(self, names: Sequence[str]) -> int:
        return 0

    def load(self, names: Sequence[str], slot: Slot) -> dict[str, jax.Array]:
        return {name: self._arrays[name] for name in names}

    def close(self) -> None:
        self._arrays.clear()
