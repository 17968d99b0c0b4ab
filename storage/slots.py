"""A ring of reusable buffers that loads fill, with explicit release.

Fresh memory costs six times the copy itself in page faults, so the buffers are made once and
refilled. JAX aliases them on the CPU and may still copy from them on an accelerator, and its
computations run later than they are called: a slot is refilled only when the *results* of
everything that read it are ready.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from storage.memory import PAGE, aligned_bytes, round_up


class Slot:
    """One buffer: ``begin`` to refill, ``take`` room for each tensor, ``release`` when read."""

    def __init__(self, nbytes: int = 0) -> None:
        self._memory = aligned_bytes(round_up(nbytes), touch=True)
        self._used = 0
        self._readers: list[Any] = []
        self._aliases: dict[Any, jax.Array] = {}

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def begin(self, nbytes: int = 0) -> None:
        """Waits until every reader's result is ready, empties the slot, and makes it this large."""
        readers, self._readers = self._readers, []
        jax.block_until_ready(readers)
        self._used = 0
        if nbytes > self._memory.nbytes:
            self._aliases.clear()
            self._memory = aligned_bytes(0)  # give the old memory back first
            self._memory = aligned_bytes(round_up(nbytes), touch=True)

    def take(self, nbytes: int) -> np.ndarray:
        """The next ``nbytes`` bytes (uint8), page-aligned, padded to whole pages for direct I/O."""
        start, end = self._used, self._used + round_up(nbytes, PAGE)
        if end > self._memory.nbytes:
            raise ValueError(
                f"slot of {self._memory.nbytes} bytes has no room for {nbytes} more after {start}"
            )
        self._used = end
        return self._memory[start:end]

    def alias(self, view: np.ndarray, device: Any) -> jax.Array:
        """``view``, of what was taken, as an array of the CPU ``device``: it *is* the memory.

        Made once for each place, shape and dtype: what is loaded next into the same place is seen
        through the same array. Making one takes longer than reading a small tensor.
        """
        key = view.ctypes.data, view.shape, view.dtype, device
        if key not in self._aliases:
            self._aliases[key] = jax.device_put(view, device)
        return self._aliases[key]

    def release(self, readers: Iterable[Any]) -> None:
        """Hands the slot back; ``readers`` are the results (JAX arrays) computed from it."""
        self._readers.extend(readers)


class Ring:
    """``count`` slots, which grow to what is loaded into them."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a ring needs at least one slot, got {count}")
        self._slots = [Slot() for _ in range(count)]

    @property
    def nbytes(self) -> int:
        """Bytes that the slots hold now."""
        return sum(slot.nbytes for slot in self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> Slot:
        return self._slots[index]

    def close(self) -> None:
        """Waits for the readers of every slot and gives the memory back."""
        slots, self._slots = self._slots, []
        for slot in slots:
            slot.begin()
