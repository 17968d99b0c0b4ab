"""The host tier: arrays in main memory, one transfer away from the device.

On an accelerator that is ``pinned_host`` memory, from which copies run asynchronously at full bus
speed. On the CPU backend device and host are the same memory: the arrays are aliased and the tier
exists in the accounting only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from storage.device import grow, take_positions, take_rows
from storage.memory import aligned_bytes
from storage.pinned_memory import on_host, pin
from storage.pinned_ring import PinnedRing, patched
from storage.ring_index import resized_index, spans
from storage.slots import Slot
from storage.store import (
    check_capacity,
    check_resize,
    full_nbytes,
    renewed_rows,
    sequence_length,
)


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
        """Keeps ``array``: aliased if aligned on the CPU backend, else as a pinned copy.

        Raises:
            StorageError: no more can be pinned.
        """
        self._arrays[name] = pin(array, self._home)

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

    def take(self, name: str, rows: np.ndarray) -> jax.Array:
        # Pinned memory cannot be indexed in place: there the whole matrix travels.
        return take_rows(jax.device_put(self._arrays[name], self._on_device), rows)

    def close(self) -> None:
        self._arrays.clear()


@dataclasses.dataclass
class _Group:
    """Arrays of full capacity in aligned memory, filled up to ``length``."""

    arrays: list[np.ndarray]
    length: int
    ring: bool

    @property
    def capacity(self) -> int:
        return self.arrays[0].shape[-2]


class HostSequences:
    """Sequences in main memory that a CPU device reads where they lie.

    For the CPU backend; and beside an accelerator, which pinned memory serves faster, for attention
    on the host and for taking single positions. Appending writes into
    memory that computations alias; by then they are done, since what is appended is their result.
    Renewing does the same, after that.
    """

    free_store = False

    def __init__(self, device: Any = None) -> None:
        self._home = jax.local_devices(backend="cpu")[0]
        self._device = device or self._home
        self.free_load = self._device.platform == "cpu"
        self._groups: dict[str, _Group] = {}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for group in list(self._groups.values()) for array in group.arrays)

    def slot_nbytes(self, sizes: Sequence[int]) -> int:
        return 0

    def put(
        self,
        name: str,
        arrays: Sequence[jax.Array],
        capacity: int,
        *,
        length: int | None = None,
        ring: bool = False,
    ) -> None:
        length = sequence_length(name, arrays, capacity, length, ring)
        group = self._groups.get(name)
        shapes = [(*a.shape[:-2], capacity, a.shape[-1]) for a in arrays]
        # Touched memory is used again: fresh pages cost six times the copy.
        if group is None or [(a.shape, a.dtype) for a in group.arrays] != [
            (shape, a.dtype) for shape, a in zip(shapes, arrays, strict=True)
        ]:
            group = _Group(
                [
                    aligned_bytes(nbytes, touch=True).view(a.dtype).reshape(shape)
                    for nbytes, a, shape in zip(
                        full_nbytes(arrays, capacity), arrays, shapes, strict=True
                    )
                ],
                0,
                ring,
            )
        group.length = 0
        self._write(group, arrays)
        group.length, group.ring = length, ring
        self._groups[name] = group

    def append(self, name: str, arrays: Sequence[jax.Array]) -> None:
        group = self._groups[name]
        if not group.ring:
            check_capacity(name, group.length, arrays[0].shape[-2], group.capacity)
        self._write(group, arrays)

    @staticmethod
    def _write(group: _Group, arrays: Sequence[jax.Array]) -> None:
        more = arrays[0].shape[-2]
        host = on_host(arrays)
        for start, source, size in spans(group.length, more, group.capacity):
            for kept, array in zip(group.arrays, host, strict=True):
                kept[..., start : start + size, :] = array[..., source : source + size, :]
        group.length += more

    def renew(self, name: str, rows: np.ndarray, arrays: Sequence[jax.Array]) -> None:
        group, positions = self._groups[name], arrays[0].shape[-2]
        rows, host = renewed_rows(name, rows, arrays, group.length, group.capacity)
        for start, source, size in spans(group.length - positions, positions, group.capacity):
            for kept, array in zip(group.arrays, host, strict=True):
                kept[rows, ..., start : start + size, :] = array[..., source : source + size, :]

    def resize(self, name: str, capacity: int) -> None:
        group = self._groups[name]
        check_resize(name, group.ring, capacity)
        if capacity == group.capacity:
            return
        index = resized_index(group.length, group.capacity, capacity)
        arrays = []
        for array in group.arrays:
            shape = (*array.shape[:-2], capacity, array.shape[-1])
            nbytes = array.nbytes // group.capacity * capacity
            # Whoever reads the old one has it still: what is appended next comes of what it reads.
            arrays.append(aligned_bytes(nbytes).view(array.dtype).reshape(shape))
            np.take(array, index, axis=-2, out=arrays[-1], mode="clip")
        self._groups[name] = _Group(arrays, group.length, ring=True)

    def load(self, name: str, slot: Slot) -> tuple[jax.Array, ...]:
        # A transfer may read them later, and the newest positions are written meanwhile.
        return tuple(jax.block_until_ready(jax.device_put(self._groups[name].arrays, self._device)))

    def take(self, name: str, index: jax.Array) -> tuple[jax.Array, ...]:
        """Gathered here; only the positions asked for go to where ``index`` lies."""
        (device,) = index.devices()
        arrays, index = jax.device_put((tuple(self._groups[name].arrays), index), self._home)
        return jax.device_put(take_positions(arrays, index), device)

    def discard(self, name: str) -> None:
        self._groups.pop(name, None)

    def close(self) -> None:
        self._groups.clear()


@dataclasses.dataclass
class _Pieces:
    """Groups of arrays in pinned memory that follow one another along the sequence."""

    pieces: list[tuple[jax.Array, ...]]
    tail: list[np.ndarray]
    filled: int  # positions of the tail
    length: int
    capacity: int

    @property
    def nbytes(self) -> int:
        return sum(full_nbytes(self.pieces[0], self.capacity))


class PinnedSequences:
    """Sequences in pinned host memory beside an accelerator.

    Pinned arrays are immutable, so a sequence is kept in pieces: what came first, then pieces of
    ``piece`` positions; the newest positions are collected in plain memory until they fill one.
    A ring is cut into pieces from the beginning (:class:`storage.pinned_ring.PinnedRing`).
    """

    free_load = free_store = False

    def __init__(self, device: Any = None, piece: int = 64) -> None:
        device = device or jax.local_devices()[0]
        self._pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        self._on_device = jax.sharding.SingleDeviceSharding(device)
        self._piece = piece
        self._groups: dict[str, _Pieces | PinnedRing] = {}

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in list(self._groups.values()))

    def slot_nbytes(self, sizes: Sequence[int]) -> int:
        return 0

    def put(
        self,
        name: str,
        arrays: Sequence[jax.Array],
        capacity: int,
        *,
        length: int | None = None,
        ring: bool = False,
    ) -> None:
        length = sequence_length(name, arrays, capacity, length, ring)
        if ring:
            self._groups[name] = PinnedRing(arrays, capacity, length, self._piece, self._pinned)
            return
        first = pin(tuple(arrays), self._pinned)
        room = min(self._piece, capacity - length)
        tail = [np.zeros((*a.shape[:-2], room, a.shape[-1]), a.dtype) for a in arrays]
        self._groups[name] = _Pieces([first], tail, 0, length, capacity)

    def append(self, name: str, arrays: Sequence[jax.Array]) -> None:
        group, more = self._groups[name], arrays[0].shape[-2]
        if isinstance(group, PinnedRing):
            group.append(arrays)
            return
        check_capacity(name, group.length, more, group.capacity)
        host = on_host(arrays)
        taken = 0
        while taken < more:
            room = group.tail[0].shape[-2]
            count = min(more - taken, room - group.filled)
            for kept, array in zip(group.tail, host, strict=True):
                kept[..., group.filled : group.filled + count, :] = array[
                    ..., taken : taken + count, :
                ]
            taken += count
            group.filled += count
            if group.filled == room == self._piece:
                full = [array.copy() for array in group.tail]  # a transfer may read it later
                group.pieces.append(pin(tuple(full), self._pinned))
                group.filled = 0
        group.length += more

    def renew(self, name: str, rows: np.ndarray, arrays: Sequence[jax.Array]) -> None:
        group, positions = self._groups[name], arrays[0].shape[-2]
        rows, host = renewed_rows(name, rows, arrays, group.length, group.capacity)
        if rows.size == 0:
            return
        if isinstance(group, PinnedRing):
            group.renew(rows, host)
            return
        oldest = group.length - positions
        start = 0
        for number, piece in enumerate(group.pieces):
            end = start + piece[0].shape[-2]
            at = max(start, oldest)
            if at < end:
                new = [array[..., at - oldest : end - oldest, :] for array in host]
                group.pieces[number] = pin(patched(piece, rows, at - start, new), self._pinned)
            start = end
        newest = min(group.filled, positions)
        for kept, array in zip(group.tail, host, strict=True):
            kept[rows, ..., group.filled - newest : group.filled, :] = array[
                ..., positions - newest :, :
            ]

    def resize(self, name: str, capacity: int) -> None:
        group = self._groups[name]
        check_resize(name, isinstance(group, PinnedRing), capacity)
        assert isinstance(group, PinnedRing)
        if capacity != group.capacity:
            arrays = group.resized(self._on_device, capacity)
            self._groups[name] = PinnedRing(
                arrays, capacity, group.length, self._piece, self._pinned
            )

    def load(self, name: str, slot: Slot) -> tuple[jax.Array, ...]:
        group = self._groups[name]
        if isinstance(group, PinnedRing):
            return group.load(self._on_device)
        tail = [tuple(group.tail)] if group.filled else []
        # One call for all pieces: every transfer pays a fixed price.
        pieces = jax.device_put([*group.pieces, *tail], self._on_device)
        return jax.block_until_ready(_joined(tuple(pieces), group.capacity))

    def take(self, name: str, index: jax.Array) -> tuple[jax.Array, ...]:
        # Pinned memory cannot be indexed where it lies: everything travels.
        return take_positions(self.load(name, Slot()), index)

    def discard(self, name: str) -> None:
        self._groups.pop(name, None)

    def close(self) -> None:
        self._groups.clear()


@partial(jax.jit, static_argnums=1)
def _joined(pieces: tuple[tuple[jax.Array, ...], ...], capacity: int) -> tuple[jax.Array, ...]:
    whole = tuple(jnp.concatenate(parts, axis=-2) for parts in zip(*pieces, strict=True))
    return grow(tuple(w[..., :capacity, :] for w in whole), capacity)


def host_sequences(device: Any = None) -> HostSequences | PinnedSequences:
    """The host tier's sequences for computation on ``device``."""
    device = device or jax.local_devices()[0]
    return HostSequences(device) if device.platform == "cpu" else PinnedSequences(device)
