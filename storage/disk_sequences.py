"""Sequences on disk: whole chunks along the sequence, the newest positions in host memory.

Writing token by token would rewrite a chunk for every token, so a chunk is written once, when it
is full; the positions after the last full chunk (the tail) are few and stay in host memory. Loading
reads the filled chunks only and brings them, with the tail, into the layout that is computed with.

A ring's chunks are written over, once a lap. Until that is done with the chunk that the newest
positions belong to, its older ones are read from the file and the tail is laid over them.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from storage.chunks import Chunks, Layout, RawChunks, Views, ZarrChunks, touched
from storage.device import take_positions
from storage.disk import DiskContext
from storage.memory import available_memory, round_up
from storage.pinned_memory import on_host
from storage.ring_index import even_pieces, resized_index, spans
from storage.slots import Slot
from storage.store import (
    StorageError,
    check_capacity,
    check_resize,
    renewed_rows,
    sequence_length,
)


@dataclasses.dataclass
class _Group:
    shapes: tuple[tuple[int, ...], ...]  # at full capacity
    layout: Layout
    capacity: int
    ring: bool
    tail: list[np.ndarray]  # (rows, positions, dim)
    length: int = 0
    chunks: int = 0  # written

    @property
    def form(self) -> tuple[Layout, tuple[tuple[int, ...], ...], int]:
        """What must be the same for another group to be kept in its place."""
        return self.layout, self.shapes, self.tail[0].shape[1]

    @property
    def index(self) -> int:
        """Where the next position goes."""
        return self.length % self.capacity if self.ring else self.length

    def chunk_size(self, chunk: int) -> int:
        """Positions that fill a chunk; what ends a ring may be shorter."""
        positions = self.layout.positions
        return min(positions, self.capacity - chunk * positions) if self.ring else positions

    def whole_chunks(self, first: int, count: int) -> int:
        """Chunks from ``first`` on, up to the ring's end, that ``count`` positions fill."""
        positions = self.layout.positions
        if self.ring and first * positions + count >= self.capacity:
            return -(-self.capacity // positions) - first
        return count // positions

    @property
    def sizes(self) -> list[int]:
        dtypes = self.layout.dtypes
        return [math.prod(s) * d.itemsize for s, d in zip(self.shapes, dtypes, strict=True)]


class DiskSequences:
    """Sequences in files below ``directory``, which must exist and be empty.

    Args:
        nbytes: What will lie here at most, all groups together: decides whether the page cache
            should hold it.
    """

    def __init__(
        self,
        directory: Path,
        context: DiskContext | None = None,
        device: Any = None,
        *,
        nbytes: int = 0,
    ) -> None:
        context = context or DiskContext()
        self._device = device or jax.local_devices()[0]
        self._positions = context.chunk_positions
        self._directory = directory
        fits = nbytes <= context.cache_share * available_memory()
        direct = context.mode == "direct" or (context.mode == "auto" and not fits)
        self._chunks: Chunks = (
            ZarrChunks(directory)
            if context.mode == "tensorstore"
            else RawChunks(directory, direct=direct)
        )
        self._groups: dict[str, _Group] = {}
        self._taken = Slot()
        self.free_load = self.free_store = False
        self.bytes_read = self.bytes_written = 0
        self._counting = threading.Lock()  # any of the threads may read or write

    @property
    def nbytes(self) -> int:
        return sum(sum(group.sizes) for group in list(self._groups.values()))

    @property
    def buffered_nbytes(self) -> int:
        """Bytes of host memory that tails take."""
        return sum(tail.nbytes for group in list(self._groups.values()) for tail in group.tail)

    def slot_nbytes(self, sizes: Sequence[int]) -> int:
        return sum(map(round_up, sizes))

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
        self._put(name, arrays, capacity, length, ring)

    def _put(
        self,
        name: str,
        arrays: Sequence[jax.Array | np.ndarray],
        capacity: int,
        length: int,
        ring: bool,
    ) -> None:
        # What cannot grow is one chunk: nothing of it needs to wait in host memory.
        fixed = length == capacity and not ring
        if ring:
            positions = even_pieces(capacity, self._positions)
        else:
            positions = capacity if fixed else self._positions
        shapes = tuple((*a.shape[:-2], capacity, a.shape[-1]) for a in arrays)
        layout = Layout(
            tuple((math.prod(s[:-2]), positions, s[-1]) for s in shapes),
            tuple(np.dtype(a.dtype) for a in arrays),
        )
        waiting = 0 if fixed else positions
        group = self._groups.get(name)
        if group is None or group.form != (layout, shapes, waiting):
            self._chunks.discard(name)
            tail = [
                np.zeros((s[0], waiting, s[2]), d)
                for s, d in zip(layout.shapes, layout.dtypes, strict=True)
            ]
            group = _Group(shapes, layout, capacity, ring, tail)
        group.ring = ring
        group.length = group.chunks = 0
        self._groups[name] = group
        more = self._flat(group, arrays)
        self._add(name, group, more)
        if length > capacity:
            # All of it is written; what is newer in the chunk to be written next waits as well.
            group.length = length
            filled = group.index % positions
            for kept, array in zip(group.tail, more, strict=True):
                kept[:, :filled] = array[:, group.index - filled : group.index]

    def append(self, name: str, arrays: Sequence[jax.Array]) -> None:
        group = self._groups[name]
        if not group.ring:
            check_capacity(name, group.length, arrays[0].shape[-2], group.capacity)
        self._add(name, group, self._flat(group, arrays))

    @staticmethod
    def _flat(group: _Group, arrays: Sequence[jax.Array | np.ndarray]) -> list[np.ndarray]:
        return [
            a.reshape(s[0], -1, s[2])
            for a, s in zip(on_host(arrays), group.layout.shapes, strict=True)
        ]

    def _add(self, name: str, group: _Group, more: Views) -> None:
        positions, count = group.layout.positions, more[0].shape[1]
        # Of more than a ring holds, the last ones. If they begin amid a chunk, they end amid it,
        # too: what the tail has before them is written and then overlaid.
        taken = max(0, count - group.capacity)
        group.length += taken
        while taken < count:
            chunk, filled = divmod(group.index, positions)
            size = group.chunk_size(chunk)
            if filled == 0 and count - taken >= size:
                whole = group.whole_chunks(chunk, count - taken)
                step = min(whole * positions, group.capacity - group.index)
                views = [m[:, taken : taken + step] for m in more]
                self._write(name, group, chunk, whole, views)
            else:
                step = min(size - filled, count - taken)
                for kept, array in zip(group.tail, more, strict=True):
                    kept[:, filled : filled + step] = array[:, taken : taken + step]
                if filled + step == size:
                    self._write(name, group, chunk, 1, [kept[:, :size] for kept in group.tail])
            taken += step
            group.length += step

    def _write(self, name: str, group: _Group, first: int, count: int, views: Views) -> None:
        try:
            self._chunks.write(name, first, count, group.layout, views)
        except (OSError, ValueError) as error:
            raise self._failed("write", name, error) from error
        group.chunks = max(group.chunks, first + count)
        with self._counting:
            self.bytes_written += count * group.layout.nbytes

    def renew(self, name: str, rows: np.ndarray, arrays: Sequence[jax.Array]) -> None:
        group, positions = self._groups[name], arrays[0].shape[-2]
        rows, host = renewed_rows(name, rows, arrays, group.length, group.capacity)
        if rows.size == 0:
            return
        layout = group.layout
        flat = [_flat_rows(rows, shape) for shape in group.shapes]
        views = [
            array.reshape(len(some), positions, array.shape[-1])
            for array, some in zip(host, flat, strict=True)
        ]
        filled = group.index % layout.positions
        newest = min(filled, positions)
        older = spans(group.length - positions, positions - newest, group.capacity)
        for start, source, size in older:
            part = [view[:, source : source + size] for view in views]
            self._renew(name, layout, start, flat, part)
        for kept, some, view in zip(group.tail, flat, views, strict=True):
            kept[some, filled - newest : filled] = view[:, positions - newest :]

    def _renew(
        self, name: str, layout: Layout, start: int, rows: Sequence[np.ndarray], views: Views
    ) -> None:
        count = views[0].shape[1]
        if count == 0:
            return
        try:
            self._chunks.renew(name, start, layout, rows, views)
        except (OSError, ValueError) as error:
            raise self._failed("renew", name, error) from error
        nbytes = len(touched(start, count, layout)) * layout.nbytes
        self._count_read(nbytes)
        with self._counting:
            self.bytes_written += nbytes

    def resize(self, name: str, capacity: int) -> None:
        group = self._groups[name]
        check_resize(name, group.ring, capacity)
        if capacity == group.capacity:
            return
        index = resized_index(group.length, group.capacity, capacity)
        index = index[: min(group.length, capacity)]
        whole = [
            np.empty(shape, dtype)
            for shape, dtype in zip(group.shapes, group.layout.dtypes, strict=True)
        ]
        self._read(name, group, whole)
        kept = [array.take(index, axis=-2) for array in whole]
        self._put(name, kept, capacity, group.length, ring=True)

    def _count_read(self, nbytes: int) -> None:
        with self._counting:
            self.bytes_read += nbytes

    def load(self, name: str, slot: Slot) -> tuple[jax.Array, ...]:
        group = self._groups[name]
        layout = group.layout
        whole = [
            slot.take(size)[:size].view(dtype).reshape(shape)
            for size, dtype, shape in zip(group.sizes, layout.dtypes, group.shapes, strict=True)
        ]
        self._read(name, group, whole)
        return tuple(jax.block_until_ready(jax.device_put(whole, self._device)))

    def _read(self, name: str, group: _Group, whole: Sequence[np.ndarray]) -> None:
        """Fills arrays of the full capacity."""
        layout = group.layout
        views = [w.reshape(s[0], -1, s[2]) for w, s in zip(whole, layout.shapes, strict=True)]
        if group.chunks:
            try:
                self._chunks.read(name, group.chunks, layout, views)
            except (OSError, ValueError) as error:
                raise self._failed("read", name, error) from error
            self._count_read(group.chunks * layout.nbytes)
        filled = group.index % layout.positions
        for view, tail in zip(views, group.tail, strict=True):
            view[:, group.index - filled : group.index] = tail[:, :filled]
            view[:, group.length :] = 0  # what an earlier load left may be of another dtype

    def take(self, name: str, index: jax.Array) -> tuple[jax.Array, ...]:
        """Everything is read: a position of a head is a small part of a disk's page.

        Even one position in ten, of each head, touches nearly every page.
        """
        self._taken.begin(self.slot_nbytes(self._groups[name].sizes))
        taken = take_positions(self.load(name, self._taken), index)
        self._taken.release(taken)
        return taken

    def _failed(self, verb: str, name: str, error: Exception) -> StorageError:
        reason = getattr(error, "strerror", None) or error
        return StorageError(f"cannot {verb} {self._directory / name}: {reason}")

    def discard(self, name: str) -> None:
        if self._groups.pop(name, None) is not None:
            self._chunks.discard(name)

    def close(self) -> None:
        self._groups.clear()
        self._taken.begin()
        self._chunks.close()


def _flat_rows(rows: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Which rows those of the first axis are once the leading axes are flattened."""
    each = math.prod(shape[1:-2])
    return (rows[:, None] * each + np.arange(each)).reshape(-1)
