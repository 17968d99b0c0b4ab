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

    A group may be a *ring*, which keeps the last ``capacity`` positions and forgets the older ones:
    position p of the sequence lies at index p % capacity.

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

    def put(
        self,
        name: str,
        arrays: Sequence[jax.Array],
        capacity: int,
        *,
        length: int | None = None,
        ring: bool = False,
    ) -> None:
        """Keeps ``arrays`` as the beginning of sequences of ``capacity`` positions.

        What the name stood for before is gone.

        Args:
            length: How many positions the sequences have so far; None: as many as the arrays. Only
                in a ring it may be more than the capacity: then the arrays have exactly
                ``capacity`` positions, the last ones, in ring order.
            ring: Whether appending beyond the capacity overwrites the oldest positions.

        Raises:
            StorageError: more than the capacity, or the tier did not take them.
            ValueError: the arrays have not the positions that ``length`` says.
        """
        ...

    def append(self, name: str, arrays: Sequence[jax.Array]) -> None:
        """Adds positions at the end.

        In a ring they take the places of the oldest ones, which no computation may still need; of
        more than the capacity, the last ones are kept.

        Raises:
            KeyError: no such name.
            StorageError: more than the capacity, or the tier did not take them.
        """
        ...

    def renew(self, name: str, rows: np.ndarray, arrays: Sequence[jax.Array]) -> None:
        """Replaces what some rows hold at the newest positions: others have moved in there.

        What the rows then have before these positions is finite, and means nothing. The length
        stays.

        Args:
            rows: (count,) int32: rows of the arrays' first axis; -1: what comes for it is dropped.
                No row twice.
            arrays: Of each array of the group, (count, ..., positions, dim): what the rows now have
                at the last ``positions`` positions of the sequence, in the sequence's order (not
                the ring's).

        Raises:
            KeyError: no such name.
            StorageError: the tier did not take them.
            ValueError: more positions than the sequence has, or than a ring keeps.
        """
        ...

    def resize(self, name: str, capacity: int) -> None:
        """Gives a ring another capacity; it keeps the newest positions that fit.

        Raises:
            KeyError: no such name.
            StorageError: the tier did not take them.
            ValueError: the group is not a ring, or the capacity is none.
        """
        ...

    def load(self, name: str, slot: Slot) -> tuple[jax.Array, ...]:
        """The group on the device, ready, each array of ``capacity`` positions, by index.

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
            index: Integers, shaped as the arrays' leading axes and one more; of a ring, indices in
                the ring.

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


def full_nbytes(arrays: Sequence[jax.Array | np.ndarray], capacity: int) -> list[int]:
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


def check_renewal(name: str, positions: int, length: int, capacity: int) -> None:
    """Refuses to renew positions that are not kept.

    Raises:
        ValueError: says how many there are and came.
    """
    kept = min(length, capacity)
    if positions > kept:
        raise ValueError(f"{name} keeps {kept} positions: {positions} cannot be renewed")


def check_resize(name: str, ring: bool, capacity: int) -> None:
    """Refuses another capacity for what is not a ring, and one of no positions.

    Raises:
        ValueError: says which.
    """
    if not ring:
        raise ValueError(f"{name} is not a ring: its capacity stays")
    if capacity < 1:
        raise ValueError(f"{name} cannot have a capacity of {capacity} positions")


def renewed_rows(
    name: str, rows: np.ndarray, arrays: Sequence[jax.Array], length: int, capacity: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The rows that are not dropped, and what comes for them, on the host.

    Raises:
        ValueError: as :func:`check_renewal`.
    """
    check_renewal(name, arrays[0].shape[-2], length, capacity)
    kept = rows >= 0
    return rows[kept], [np.asarray(array)[kept] for array in arrays]


def sequence_length(
    name: str, arrays: Sequence[jax.Array], capacity: int, length: int | None, ring: bool
) -> int:
    """How many positions sequences have that are put so.

    Raises:
        StorageError: more than the capacity, and it is not a ring.
        ValueError: the arrays have not the positions that ``length`` says.
    """
    have = arrays[0].shape[-2]
    if not ring:
        if length not in (None, have):
            raise ValueError(
                f"{name} has arrays of {have} positions and a length of {length}: only those of a "
                f"ring may differ"
            )
        check_capacity(name, 0, have, capacity)
        return have
    length = have if length is None else length
    if capacity < 1 or have != min(length, capacity):
        raise ValueError(
            f"{name} is a ring of {capacity} positions, of a sequence of {length}: expected arrays "
            f"of {max(0, min(length, capacity))} positions in ring order, got {have}"
        )
    return length
