"""Sequences on disk: whole chunks along the sequence, the newest positions in host memory.

Writing token by token would rewrite a chunk for every token, so a chunk is written once, when it
is full; the positions after the last full chunk (the tail) are few and stay in host memory. Loading
reads the filled chunks only and brings them, with the tail, into the layout that is computed with.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from storage.disk import DiskContext
from storage.memory import aligned_bytes, available_memory, round_up
from storage.slots import Slot
from storage.store import StorageError, check_capacity

# Large enough for the disk's full speed, small enough to stay in the processor's caches.
_RUN_NBYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a group of arrays is cut into chunks.

    Attributes:
        shapes: Of one chunk of each array, leading axes flattened: (rows, positions, dim).
        dtypes: Of each array.
    """

    shapes: tuple[tuple[int, int, int], ...]
    dtypes: tuple[np.dtype[Any], ...]

    @property
    def positions(self) -> int:
        return self.shapes[0][1]

    @property
    def nbytes(self) -> int:
        """Of a chunk of all arrays together, in whole pages."""
        sizes = (math.prod(s) * d.itemsize for s, d in zip(self.shapes, self.dtypes, strict=True))
        return round_up(sum(sizes))

    def parts(self, chunk: np.ndarray) -> list[np.ndarray]:
        """The arrays' shares of a chunk's bytes."""
        parts, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            end = start + math.prod(shape) * dtype.itemsize
            parts.append(chunk[start:end].view(dtype).reshape(shape))
            start = end
        return parts


class Chunks(Protocol):
    """Where the full chunks of a group lie."""

    def write(self, name: str, first: int, count: int, layout: Layout, views: Views) -> None:
        """Stores ``count`` chunks from the arrays ``views``, (rows, positions, dim) each."""
        ...

    def read(self, name: str, count: int, layout: Layout, views: Views) -> None:
        """Fills the beginning of ``views`` with the first ``count`` chunks."""
        ...

    def discard(self, name: str) -> None: ...

    def close(self) -> None: ...


Views = Sequence[np.ndarray]


class RawChunks:
    """One plain file a group, chunk after chunk, read and written past the page cache or not.

    TensorStore took ten times the processor time for the same bytes, which decoding needs.
    """

    def __init__(self, directory: Path, *, direct: bool) -> None:
        self._directory = directory
        self._flags = _direct_flag(directory) if direct else 0
        # Storing and loading are two threads: each has its own bounce buffers.
        self._write_buffer = np.empty(0, np.uint8)
        self._read_buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="flexgen-copy")

    def write(self, name: str, first: int, count: int, layout: Layout, views: Views) -> None:
        file = self._open(name, os.O_RDWR | os.O_CREAT)
        try:
            per_run = max(1, _RUN_NBYTES // layout.nbytes)
            self._write_buffer = _at_least(self._write_buffer, per_run * layout.nbytes)
            for start in range(first, first + count, per_run):
                chunks = min(per_run, first + count - start)
                block = self._write_buffer[: chunks * layout.nbytes]
                for i in range(chunks):
                    at = (start - first + i) * layout.positions
                    chunk = block[i * layout.nbytes : (i + 1) * layout.nbytes]
                    for part, view in zip(layout.parts(chunk), views, strict=True):
                        part[...] = view[:, at : at + layout.positions]
                self._all(os.pwritev, file, block, start * layout.nbytes)
        finally:
            os.close(file)

    def read(self, name: str, count: int, layout: Layout, views: Views) -> None:
        file = self._open(name, os.O_RDONLY)
        # While one run of chunks is read, the one before is copied to where it belongs.
        copies: list[Future[None]] = []
        try:
            per_run = max(1, _RUN_NBYTES // layout.nbytes)
            for run, start in enumerate(range(0, count, per_run)):
                chunks = min(per_run, count - start)
                if run >= 2:
                    copies[run - 2].result()
                buffer = _at_least(self._read_buffers[run % 2], per_run * layout.nbytes)
                self._read_buffers[run % 2] = buffer
                block = buffer[: chunks * layout.nbytes]
                self._all(os.preadv, file, block, start * layout.nbytes)
                copies.append(self._copier.submit(_spread, block, start, chunks, layout, views))
        finally:
            os.close(file)
            for copy in copies:
                copy.result()

    def _open(self, name: str, flags: int) -> int:
        return os.open(self._directory / name, flags | self._flags | os.O_CLOEXEC, 0o600)

    @staticmethod
    def _all(call: Callable[..., int], file: int, block: np.ndarray, offset: int) -> None:
        left = block.data
        while left:
            count = call(file, [left], offset)
            if count == 0 or (count % mmap.PAGESIZE and count < len(left)):
                raise OSError(errno.EIO, f"{len(left) - count} of {block.nbytes} bytes are missing")
            left, offset = left[count:], offset + count

    def discard(self, name: str) -> None:
        (self._directory / name).unlink(missing_ok=True)

    def close(self) -> None:
        self._copier.shutdown()
        for path in self._directory.iterdir():
            path.unlink()


def _direct_flag(directory: Path) -> int:
    """``O_DIRECT`` where the file system has it, else 0."""
    flag, path = getattr(os, "O_DIRECT", 0), directory / "probe"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | flag, 0o600)
    except OSError:
        return 0
    try:
        os.pwritev(file, [aligned_bytes(mmap.PAGESIZE, touch=True)], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return 0
        raise
    finally:
        os.close(file)
        path.unlink()
    return flag


def _at_least(buffer: np.ndarray, nbytes: int) -> np.ndarray:
    return buffer if buffer.nbytes >= nbytes else aligned_bytes(round_up(nbytes), touch=True)


def _spread(block: np.ndarray, start: int, chunks: int, layout: Layout, views: Views) -> None:
    for i in range(chunks):
        at = (start + i) * layout.positions
        chunk = block[i * layout.nbytes : (i + 1) * layout.nbytes]
        for part, view in zip(layout.parts(chunk), views, strict=True):
            view[:, at : at + layout.positions] = part


class ZarrChunks:
    """The same through TensorStore: zarr 3 arrays that any zarr implementation reads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, list[Any]] = {}

    def write(self, name: str, first: int, count: int, layout: Layout, views: Views) -> None:
        arrays = self._arrays(name, layout)
        begin, end = first * layout.positions, (first + count) * layout.positions
        futures = []
        for i, view in enumerate(views):
            if end > arrays[i].shape[1]:
                arrays[i] = arrays[i].resize(exclusive_max=[None, end, None]).result()
            futures.append(arrays[i][:, begin:end].write(np.ascontiguousarray(view)))
        for future in futures:
            future.result()

    def _arrays(self, name: str, layout: Layout) -> list[Any]:
        import tensorstore as ts

        if name not in self._open:
            self._open[name] = [
                ts.open(
                    {
                        "driver": "zarr3",
                        "kvstore": {
                            "driver": "file",
                            "path": f"{self._directory}/{name}/{i}/",
                            "file_io_sync": False,
                        },
                        "metadata": {
                            "shape": [shape[0], 0, shape[2]],
                            "data_type": dtype.name,
                            "chunk_grid": {
                                "name": "regular",
                                "configuration": {"chunk_shape": list(shape)},
                            },
                            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                        },
                        "create": True,
                        "delete_existing": True,
                    }
                ).result()
                for i, (shape, dtype) in enumerate(zip(layout.shapes, layout.dtypes, strict=True))
            ]
        return self._open[name]

    def read(self, name: str, count: int, layout: Layout, views: Views) -> None:
        import tensorstore as ts

        end = count * layout.positions
        futures = [
            ts.array(view[:, :end], write=True, copy=False).write(array[:, :end])
            for array, view in zip(self._open[name], views, strict=True)
        ]
        for future in futures:
            future.result()

    def discard(self, name: str) -> None:
        self._open.pop(name, None)
        shutil.rmtree(self._directory / name, ignore_errors=True)

    def close(self) -> None:
        for name in list(self._open):
            self.discard(name)


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
        self.free_load = self.free_store = False
        self.bytes_read = self.bytes_written = 0

    @property
    def nbytes(self) -> int:
        return sum(sum(group.sizes) for group in list(self._groups.values()))

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
        return tuple(jax.block_until_ready(jax.device_put(whole, self._device)))

    def _failed(self, verb: str, name: str, error: Exception) -> StorageError:
        reason = getattr(error, "strerror", None) or error
        return StorageError(f"cannot {verb} {self._directory / name}: {reason}")

    def discard(self, name: str) -> None:
        if self._groups.pop(name, None) is not None:
            self._chunks.discard(name)

    def close(self) -> None:
        self._groups.clear()
        self._chunks.close()
