"""The contract of a tier: named, immutable arrays that can be brought to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax

from storage.slots import Slot


class StorageError(RuntimeError):
    """A read or write that failed; the message names the tensor, the file and the cure."""


@runtime_checkable
class Store(Protocol):
    """One tier's tensors. Loading may happen on any one thread at a time."""

    def __contains__(self, name: str) -> bool: ...

    def slot_nbytes(self, names: Sequence[str]) -> int:
        """Bytes of slot memory that loading ``names`` together may take (0: none)."""
        ...

    def load(self, names: Sequence[str], slot: Slot) -> dict[str, jax.Array]:
        """The arrays, on the device and ready; transient copies lie in ``slot``, already begun.

        Raises:
            KeyError: a name that is not in the store.
            StorageError: the tier could not deliver.
        """
        ...

    def close(self) -> None:
        """Gives back memory and handles; loaded arrays stay valid until their slot is refilled."""
        ...
