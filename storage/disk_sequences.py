"""Sequences on disk: whole chunks along the sequence, the newest positions in host memory.

Writing token by token would rewrite a chunk for every token, so a chunk is written once, when it
is full; the positions after the last full chunk (the tail) are few and stay in host memory. Loading
reads the filled chunks only and brings them, with the tail, into the layout that is computed with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from storage.chunks import Chunks, Layout, RawChunks, Views, ZarrChunks
from storage.device import take_positions
from storage.disk import DiskContext
from storage.memory import available_memory, round_up
from storage.slots import Slot
from storage.store import StorageError, check_capacity


@dataclasses.dataclass
class _Group:
    shapes: tuple[tuple[int, ...], ...]  # at full capacity
    layout: Layout
    capacity: int
    length: int
    chunks: int  # written
    tail: list[np.ndarray]  # (rows, positions, dim)

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

    @property
    def nbytes(self) -> int:
        return sum(sum(group.sizes) for group in list(self._groups.values()))

    @property
    def buffered_nbytes(self) -> int:
        """Bytes of host memory that tails take."""
        return sum(tail.nbytes for group in list(self._groups.values()) for tail in group.tail)

    def slot_nbytes(self, sizes: Sequence[int]) -> int:
        return sum(map(round_up, sizes))

    def put(self, name: str, arrays: Sequence[jax.Array], capacity: int) -> None:
        length = arrays[0].shape[-2]
        check_capacity(name, 0, length, capacity)
        # What cannot grow is one chunk: nothing of it needs to wait in host memory.
        positions = capacity if length == capacity else self._positions
        shapes = tuple((*a.shape[:-2], capacity, a.shape[-1]) for a in arrays)
        layout = Layout(
            tuple((math.prod(s[:-2]), positions, s[-1]) for s in shapes),
            tuple(np.dtype(a.dtype) for a in arrays),
        )
        group = self._groups.get(name)
        if group is None or (group.layout, group.shapes) != (layout, shapes):
            self._chunks.discard(name)
            tail = [
                np.zeros((s[0], 0 if length == capacity else positions, s[2]), d)
                for s, d in zip(layout.shapes, layout.dtypes, strict=True)
            ]
            group = _Group(shapes, layout, capacity, 0, 0, tail)
        group.length = group.chunks = 0
        self._groups[name] = group
        self._add(name, group, arrays)

    def append(self, name: str, arrays: Sequence[jax.Array]) -> None:
        group = self._groups[name]
        check_capacity(name, group.length, arrays[0].shape[-2], group.capacity)
        self._add(name, group, arrays)

    def _add(self, name: str, group: _Group, arrays: Sequence[jax.Array]) -> None:
        positions = group.layout.positions
        more = [
            np.asarray(a).reshape(s[0], -1, s[2])
            for a, s in zip(arrays, group.layout.shapes, strict=True)
        ]
        count, taken = more[0].shape[1], 0
        while taken < count:
            filled = group.length - group.chunks * positions
            if filled == 0 and count - taken >= positions:
                whole = (count - taken) // positions
                self._write(name, group, whole, [m[:, taken:] for m in more])
                step = whole * positions
            else:
                step = min(positions - filled, count - taken)
                for kept, array in zip(group.tail, more, strict=True):
                    kept[:, filled : filled + step] = array[:, taken : taken + step]
                if filled + step == positions:
                    self._write(name, group, 1, group.tail)
            taken += step
            group.length += step

    def _write(self, name: str, group: _Group, count: int, views: Views) -> None:
        views = [view[:, : count * group.layout.positions] for view in views]
        try:
            self._chunks.write(name, group.chunks, count, group.layout, views)
        except (OSError, ValueError) as error:
            raise self._failed("write", name, error) from error
        group.chunks += count
        self.bytes_written += count * group.layout.nbytes

    def load(self, name: str, slot: Slot) -> tuple[jax.Array, ...]:
        group = self._groups[name]
        layout = group.layout
        whole = [
            slot.take(size)[:size].view(dtype).reshape(shape)
            for size, dtype, shape in zip(group.sizes, layout.dtypes, group.shapes, strict=True)
        ]
        views = [w.reshape(s[0], -1, s[2]) for w, s in zip(whole, layout.shapes, strict=True)]
        if group.chunks:
            try:
                self._chunks.read(name, group.chunks, layout, views)
            except (OSError, ValueError) as error:
                raise self._failed("read", name, error) from error
            self.bytes_read += group.chunks * layout.nbytes
        start = group.chunks * layout.positions
        for view, tail in zip(views, group.tail, strict=True):
            view[:, start : group.length] = tail[:, : group.length - start]
            view[:, group.length :] = 0  # what an earlier load left may be of another dtype
        return tuple(jax.block_until_ready(jax.device_put(whole, self._device)))

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
