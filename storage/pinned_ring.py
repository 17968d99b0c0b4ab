"""A ring in pinned host memory beside an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from storage.device import gathered, grow
from storage.pinned_memory import on_host, pin
from storage.ring_index import even_pieces, resized_index, spans
from storage.store import full_nbytes


class PinnedRing:
    """The last ``capacity`` positions of a group.

    Pinned arrays are immutable, so the ring is cut into pieces, each replaced as a whole once a
    lap; the newest positions, less than a piece, are collected in plain memory.

    Args:
        arrays: As :meth:`storage.store.SequenceStore.put` takes them for a ring.
        length: How many positions the sequence has.
        piece: Positions of a piece at most.
        pinned: The sharding of pinned memory.
    """

    def __init__(
        self, arrays: Sequence[jax.Array], capacity: int, length: int, piece: int, pinned: Any
    ) -> None:
        self.capacity, self.length = capacity, length
        self._piece = even_pieces(capacity, piece)
        self._pinned = pinned
        self._pieces: dict[int, tuple[jax.Array, ...]] = {}
        have = arrays[0].shape[-2]
        for number, start in enumerate(range(0, have, self._piece)):
            size = self._size(number)
            if start + size <= have:
                # One after the other: cut all at once, the group would lie on the device twice.
                self._pin(number, _cut(tuple(arrays), np.int32(start), size))
        self._tail = [np.zeros((*a.shape[:-2], self._piece, a.shape[-1]), a.dtype) for a in arrays]
        number, filled = self._next()
        if filled:
            newest = _cut(tuple(arrays), np.int32(number * self._piece), filled)
            for kept, array in zip(self._tail, newest, strict=True):
                kept[..., :filled, :] = np.asarray(array)

    @property
    def nbytes(self) -> int:
        return sum(full_nbytes(self._tail, self.capacity))

    def _size(self, number: int) -> int:
        return min(self._piece, self.capacity - number * self._piece)

    def _next(self) -> tuple[int, int]:
        """The piece that the next position belongs to, and how many of its positions are newer."""
        return divmod(self.length % self.capacity, self._piece)

    def _pin(self, number: int, arrays: tuple[Any, ...]) -> None:
        self._pieces[number] = pin(arrays, self._pinned)

    def append(self, arrays: Sequence[jax.Array]) -> None:
        host = on_host(arrays)
        more = host[0].shape[-2]
        taken = max(0, more - self.capacity)
        self.length += taken
        while taken < more:
            number, filled = self._next()
            size = self._size(number)
            count = min(more - taken, size - filled)
            for kept, array in zip(self._tail, host, strict=True):
                kept[..., filled : filled + count, :] = array[..., taken : taken + count, :]
            if filled + count == size:
                # Copied: a transfer may read it later.
                self._pin(number, tuple(kept[..., :size, :].copy() for kept in self._tail))
            taken += count
            self.length += count

    def renew(self, rows: np.ndarray, host: Sequence[np.ndarray]) -> None:
        """Replaces what ``rows`` hold at the last positions, (count, ..., positions, dim) each."""
        positions = host[0].shape[-2]
        _, filled = self._next()
        newest = min(filled, positions)
        older = spans(self.length - positions, positions - newest, self.capacity)
        for start, source, size in older:
            taken = 0
            while taken < size:
                number, at = divmod(start + taken, self._piece)
                count = min(size - taken, self._size(number) - at)
                first = source + taken
                new = [array[..., first : first + count, :] for array in host]
                self._pin(number, patched(self._pieces[number], rows, at, new))
                taken += count
        for kept, array in zip(self._tail, host, strict=True):
            kept[rows, ..., filled - newest : filled, :] = array[..., positions - newest :, :]

    def load(self, on_device: Any) -> tuple[jax.Array, ...]:
        """The whole ring on the device, in ring order, ready."""
        number, filled = self._next()
        tail = tuple(kept[..., : self._size(number), :] for kept in self._tail)
        pinned = tuple(self._pieces[number] for number in sorted(self._pieces))
        # One call for all pieces: every transfer pays a fixed price. The tail goes along even if
        # nothing is in it: the program that joins them stays the same.
        pieces, tail = jax.device_put((pinned, tail), on_device)
        start = np.int32(number * self._piece)
        return jax.block_until_ready(_joined(pieces, tail, start, np.int32(filled), self.capacity))

    def resized(self, on_device: Any, capacity: int) -> tuple[jax.Array, ...]:
        """On the device: what a ring of ``capacity`` positions keeps of it."""
        index = resized_index(self.length, self.capacity, capacity)
        return gathered(self.load(on_device), index[: min(self.length, capacity)])


def patched(
    piece: Sequence[jax.Array], rows: np.ndarray, at: int, new: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...]:
    """A copy of a piece with ``new`` in ``rows`` from position ``at`` on."""
    copies = tuple(np.array(array) for array in piece)
    for copy, array in zip(copies, new, strict=True):
        copy[rows, ..., at : at + array.shape[-2], :] = array
    return copies


@partial(jax.jit, static_argnums=2)
def _cut(arrays: tuple[jax.Array, ...], start: jax.Array, count: int) -> tuple[jax.Array, ...]:
    return tuple(jax.lax.dynamic_slice_in_dim(a, start, count, axis=a.ndim - 2) for a in arrays)


@partial(jax.jit, static_argnums=4)
def _joined(
    pieces: tuple[tuple[jax.Array, ...], ...],
    tail: tuple[jax.Array, ...],
    start: jax.Array,
    filled: jax.Array,
    capacity: int,
) -> tuple[jax.Array, ...]:
    """The pieces one after the other, and over them, from ``start``, what the tail has newer."""

    def joined(newest: jax.Array, *parts: jax.Array) -> jax.Array:
        axis, size = newest.ndim - 2, newest.shape[-2]
        none = newest[..., :0, :]
        (whole,) = grow((jnp.concatenate([*parts, none], axis=axis),), capacity)
        older = jax.lax.dynamic_slice_in_dim(whole, start, size, axis=axis)
        newer = jnp.arange(size, dtype=jnp.int32)[:, None] < filled
        merged = jnp.where(newer, newest, older)
        return jax.lax.dynamic_update_slice_in_dim(whole, merged, start, axis=axis)

    return tuple(map(joined, tail, *pieces))
