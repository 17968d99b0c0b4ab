"""Where the full chunks of sequences lie on disk: plain files, or zarr arrays."""

from __future__ import annotations

import dataclasses
import errno
import math
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from storage.memory import aligned_bytes, round_up

# Large enough for the disk's full speed, small enough to stay in the processor's caches.
_RUN_NBYTES = 8 << 20


Views = Sequence[np.ndarray]


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


def touched(start: int, count: int, layout: Layout) -> range:
    """The chunks that ``count`` positions from ``start`` on lie in."""
    return range(start // layout.positions, -(-(start + count) // layout.positions))


class Chunks(Protocol):
    """Where the full chunks of a group lie."""

    def write(self, name: str, first: int, count: int, layout: Layout, views: Views) -> None:
        """Stores ``count`` chunks from the arrays ``views``, (rows, positions, dim) each.

        The last chunk of a ring may have fewer positions than the layout says.
        """
        ...

    def renew(
        self,
        name: str,
        start: int,
        layout: Layout,
        rows: Sequence[np.ndarray],
        views: Views,
    ) -> None:
        """Replaces positions of stored chunks, from ``start`` on; called as :meth:`write` is.

        Args:
            rows: Of each array, which of its rows: (count,).
            views: What comes there, (count, positions, dim) each.
        """
        ...

    def read(self, name: str, count: int, layout: Layout, views: Views) -> None:
        """Fills the beginning of ``views`` with the first ``count`` chunks, as far as they go."""
        ...

    def discard(self, name: str) -> None: ...

    def close(self) -> None: ...


class RawChunks:
    """One plain file a group, chunk after chunk, read and written past the page cache or not.

    TensorStore took ten times the processor time for the same bytes, which decoding needs.
    """

    def __init__(self, directory: Path, *, direct: bool) -> None:
        self._directory = directory
        self._flags = _direct_flag(directory) if direct else 0
        # Storing and loading are two threads: each has its own bounce buffers. What is renewed is
        # read by the thread that stores. Another stage hands over what it stores on its own thread.
        self._write_buffer = np.empty(0, np.uint8)
        self._writing = threading.Lock()
        self._read_buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._reading = threading.Lock()  # loading and taking may be two threads as well
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="flexgen-copy")

    def write(self, name: str, first: int, count: int, layout: Layout, views: Views) -> None:
        file = self._open(name, os.O_RDWR | os.O_CREAT)
        try:
            with self._writing:
                per_run = max(1, _RUN_NBYTES // layout.nbytes)
                self._write_buffer = _at_least(self._write_buffer, per_run * layout.nbytes)
                for start in range(first, first + count, per_run):
                    chunks = min(per_run, first + count - start)
                    block = self._write_buffer[: chunks * layout.nbytes]
                    for i in range(chunks):
                        at = (start - first + i) * layout.positions
                        chunk = block[i * layout.nbytes : (i + 1) * layout.nbytes]
                        for part, view in zip(layout.parts(chunk), views, strict=True):
                            new = view[:, at : at + layout.positions]
                            part[:, : new.shape[1]] = new
                    self._all(os.pwritev, file, block, start * layout.nbytes)
        finally:
            os.close(file)

    def renew(
        self,
        name: str,
        start: int,
        layout: Layout,
        rows: Sequence[np.ndarray],
        views: Views,
    ) -> None:
        end = start + views[0].shape[1]
        chunks = touched(start, end - start, layout)
        file = self._open(name, os.O_RDWR)
        try:
            with self._writing:
                per_run = max(1, _RUN_NBYTES // layout.nbytes)
                self._write_buffer = _at_least(self._write_buffer, per_run * layout.nbytes)
                for first in chunks[::per_run]:
                    run = range(first, min(first + per_run, chunks.stop))
                    block = self._write_buffer[: len(run) * layout.nbytes]
                    self._all(os.preadv, file, block, first * layout.nbytes)
                    for chunk, number in zip(np.split(block, len(run)), run, strict=True):
                        at = number * layout.positions
                        low, high = max(start, at), min(end, at + layout.positions)
                        for part, some, view in zip(layout.parts(chunk), rows, views, strict=True):
                            part[some, low - at : high - at] = view[:, low - start : high - start]
                    self._all(os.pwritev, file, block, first * layout.nbytes)
        finally:
            os.close(file)

    def read(self, name: str, count: int, layout: Layout, views: Views) -> None:
        file = self._open(name, os.O_RDONLY)
        try:
            with self._reading:
                self._read(file, count, layout, views)
        finally:
            os.close(file)

    def _read(self, file: int, count: int, layout: Layout, views: Views) -> None:
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
        os.pwritev(file, [aligned_bytes(mmap.PAGESIZE, touch=True).data], 0)
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
            room = view[:, at : at + layout.positions]
            room[...] = part[:, : room.shape[1]]


class ZarrChunks:
    """The same through TensorStore: zarr 3 arrays that any zarr implementation reads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, list[Any]] = {}

    def write(self, name: str, first: int, count: int, layout: Layout, views: Views) -> None:
        arrays = self._arrays(name, layout)
        begin = first * layout.positions
        futures = []
        for i, view in enumerate(views):
            end = begin + view.shape[1]
            if end > arrays[i].shape[1]:
                arrays[i] = arrays[i].resize(exclusive_max=[None, end, None]).result()
            futures.append(arrays[i][:, begin:end].write(np.ascontiguousarray(view)))
        for future in futures:
            future.result()

    def renew(
        self,
        name: str,
        start: int,
        layout: Layout,
        rows: Sequence[np.ndarray],
        views: Views,
    ) -> None:
        end = start + views[0].shape[1]
        futures = [
            array[some, start:end].write(np.ascontiguousarray(view))
            for array, some, view in zip(self._arrays(name, layout), rows, views, strict=True)
        ]
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

        end = min(count * layout.positions, views[0].shape[1])
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
