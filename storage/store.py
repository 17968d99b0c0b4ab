"""The contracts of a tier: arrays that stay as they are, and arrays that grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np

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

    def take(self, name: str, rows: np.ndarray) -> jax.Array:
        """Some rows of a matrix, ``matrix[rows]``, on the device; the rest does not move.

        Raises:
            As :meth:`load`.
        """
        ...

    def close(self) -> None:
        """Gives back memory and handles; loaded arrays stay valid until their slot is refilled."""
        ...


@runtime_checkable
class SequenceStore(Protocol):
    """One tier's groups of arrays that grow along their last but one axis, the sequence.

    A group is all that one name stands for: the keys and values of one layer and batch, say, both
    ``(batch, heads, seq, head_dim)``. One thread may store, another one load and a third one take,
    as long as they do not touch the same name; what is loaded is read until the slot is begun again
    or the name is stored to again, whose new arrays are computed from it.

    Attributes:
        free_load: Loading is no work: the arrays are read where they lie.
        free_store: Storing is no work: it is dispatched and waits for nothing.
    """

    free_load: bool
    free_store: bool

    @property
    def nbytes(self) -> int:
        """Bytes that the groups take here at their full capacity."""
        ...

    def slot_nbytes(self, sizes: Sequence[int]) -> int:
        """Bytes of slot memory that loading arrays of these full ``sizes`` may take (0: none)."""
        ...

    def put(self, name: str, arrays: Sequence[jax.Array], capacity: int) -> None:
        """Keeps ``arrays`` as the beginning of sequences of ``capacity`` positions.

        What the name stood for before is gone.

        Raises:
            StorageError: the tier did not take them.
        """
        ...

    def append(self, name: str, arrays: Sequence[jax.Array]) -> None:
        """Adds positions at the end.

        Raises:
            KeyError: no such name.
            StorageError: more than the capacity, or the tier did not take them.
        """
        ...

    def load(self, name: str, slot: Slot) -> tuple[jax.Array, ...]:
        """The group on the device, ready, each array of ``capacity`` positions.

        Positions that are not filled yet hold some finite values. Transient copies lie in
        ``slot``, already begun.

        Raises:
            KeyError: no such name.
            StorageError: the tier could not deliver.
        """
        ...

    def take(self, name: str, index: jax.Array) -> tuple[jax.Array, ...]:
        """Some positions, of each array: ``array[..., index[..., i], :]`` at position ``i``.

        Args:
            index: Integers, shaped as the arrays' leading axes and one more.

        Raises:
            As :meth:`load`.
        """
        ...

    def discard(self, name: str) -> None:
        """Gives the group's room back; nothing if there is none."""
        ...

    def close(self) -> None:
        """Gives everything back."""
        ...


def full_nbytes(arrays: Sequence[jax.Array], capacity: int) -> list[int]:
    """Bytes of each array once it has ``capacity`` positions."""
    return [array.nbytes // array.shape[-2] * capacity for array in arrays]


def check_capacity(name: str, have: int, more: int, capacity: int) -> None:
    """Refuses positions beyond the capacity.

    Raises:
        StorageError: says how many there are, come and fit.
    """
    if have + more > capacity:
        raise StorageError(
            f"{name} has room for {capacity} positions: {have} are filled and {more} more came"
        )
