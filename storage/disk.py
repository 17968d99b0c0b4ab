"""The disk tier: tensors read from their files each time a layer needs them.

Three ways to read, because no one of them is best everywhere:

- **mapped**: the page cache already holds the bytes (or can: they fit in spare memory). They are
  mapped and aliased, no copy is made, and a warm read costs nothing.
- **direct**: they do not fit. ``O_DIRECT`` into a ring of buffers takes nearly no CPU time, so it
  overlaps with computation, which filling the page cache does not.
- **tensorstore**: the array is not one raw chunk; TensorStore decodes it into the ring.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Literal, get_args

import jax
import numpy as np

from storage.array_file import ArrayFile
from storage.checksums import TensorChecksum, is_finite, tensor_checksum
from storage.descriptors import Descriptors
from storage.memory import ALIGNMENT, available_memory, populate, resident_fraction, round_up
from storage.slots import Slot
from storage.store import StorageError

ReadMode = Literal["auto", "mapped", "direct", "tensorstore"]

RESIDENT = 0.95
_FEW_BYTES = 1 << 18
# What the system reads around a page that is missing: rows cost this much each.
_PAGES_A_ROW = 16
_PIECE = 4 << 20
_MOST_MAPPED = 30_000
_OF_SMALL = 0.25  # of what the page cache may take
_SMALL_READ, _AT_A_TIME = 4 << 20, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiskContext:
    """How the disk is read; the defaults are what measured best.

    Attributes:
        mode: ``auto`` maps a tensor that lies in the page cache, and all tensors if together they
            fill at most ``cache_share`` of the available memory; it reads the others directly.
        direct_nbytes: Bytes of one direct read call.
        cache_share: Share of available memory that ``auto`` lets the page cache take.
        small_nbytes: Tensors below this are always mapped: reading them is all latency, and the
            page cache keeps the few bytes anyway. Unless they are many, as those of experts are.
        chunk_positions: Tokens that the KV cache on disk is written by; as many as are not written
            yet wait in host memory.
        verify: Whether a tensor that has a checksum is held against it when it is first read.
    """

    mode: ReadMode = "auto"
    direct_nbytes: int = 32 << 20
    cache_share: float = 0.5
    small_nbytes: int = 1 << 20
    chunk_positions: int = 16
    verify: bool = True

    def __post_init__(self) -> None:
        if self.mode not in get_args(ReadMode):
            raise ValueError(f"mode must be one of {', '.join(get_args(ReadMode))}: {self.mode!r}")
        if self.direct_nbytes < mmap.PAGESIZE or self.direct_nbytes % mmap.PAGESIZE:
            raise ValueError(f"direct_nbytes must be whole pages, got {self.direct_nbytes}")
        if self.chunk_positions < 1:
            raise ValueError(f"chunk_positions must be at least 1, got {self.chunk_positions}")
        if not 0 <= self.cache_share <= 1:
            raise ValueError(f"cache_share must lie in [0, 1], got {self.cache_share}")


class _OpenTensor:
    """One array file with its handles held open: opening costs as much as a small read."""

    def __init__(self, name: str, file: ArrayFile, verify: bool, descriptors: Descriptors) -> None:
        self.name = name
        self.file = file
        self._descriptors = descriptors
        self._path = os.fspath(file.chunk)
        self.start = file.offset or 0
        # Bytes before the tensor in the page that it begins in.
        self.lead = self.start % mmap.PAGESIZE
        self._unverified = verify and (file.checksum is not None or file.finite)
        self._direct = getattr(os, "O_DIRECT", 0)
        self._region: mmap.mmap | None = None
        self._view: np.ndarray | None = None
        self._populated = False
        self._alias: jax.Array | None = None
        self._tensorstore: Any = None

    def typed(self, block: np.ndarray) -> np.ndarray:
        return block[: self.file.nbytes].view(self.file.dtype).reshape(self.file.shape)

    def mapping(self) -> np.ndarray:
        """The file's pages as a read-only view (uint8); nothing is read yet.

        The tensor begins :attr:`lead` bytes in.

        Reading what a file no longer has would end the process: it is looked at each time.
        """
        if self._view is None or self._region is None:
            with open(self.file.chunk, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                if size < self._end or (self.file.offset is None and size != self._end):
                    raise self._short(size)
                self._region = mmap.mmap(
                    f.fileno(),
                    self.lead + self.file.nbytes,
                    prot=mmap.PROT_READ,
                    offset=self.start - self.lead,
                )
            self._view = np.frombuffer(self._region, np.uint8)
        size = self._region.size()
        if size < self._end:
            raise self._short(size)
        return self._view

    def mapped(self) -> np.ndarray:
        """The tensor in the page cache, every page of it present."""
        view = self.mapping()
        # Asking is 40 times cheaper than populating again what is there; for a few pages that
        # were evicted, the fault of whoever reads them is cheaper still.
        small = self._populated and self.file.nbytes < _FEW_BYTES
        if not (small or (self._populated and resident_fraction(view) == 1.0)):
            populate(view)
            self._populated = True
        self._check_unchanged()
        self._check_content(view[self.lead :])
        return self.typed(view[self.lead :])

    def alias(self, device: Any) -> jax.Array:
        """:meth:`mapped` as an array of the CPU ``device``, made once: it *is* the mapping."""
        view = self.mapped()
        if self._alias is None:
            self._alias = jax.device_put(view, device)
        return self._alias

    @property
    def _end(self) -> int:
        return self.start + self.file.nbytes

    def read_direct(self, block: np.ndarray, call_nbytes: int, *, cached: bool = False) -> None:
        """Reads into the beginning of ``block``: past the page cache, where the system can.

        Args:
            block: Page-aligned; whole pages, as many as the tensor has bytes in.
            cached: Through the page cache instead, where the bytes are.
        """
        try:
            if cached:
                self._read_cached(block.data)
            else:
                self._read_calls(block.data, call_nbytes)
        except OSError as error:
            if error.errno != errno.EINVAL or cached or not self._direct:
                raise
            self._direct = 0  # not every file system has direct I/O
            self._read_calls(block.data, call_nbytes)
        if self.lead and not cached:  # JAX takes over what is aligned only
            ctypes.memmove(block.ctypes.data, block.ctypes.data + self.lead, self.file.nbytes)
        self._check_unchanged()
        self._check_content(block[: self.file.nbytes])

    def _read_calls(self, target: memoryview, call_nbytes: int) -> None:
        position, wanted, first = 0, self.lead + self.file.nbytes, self.start - self.lead
        whole = round_up(wanted)
        with self._descriptors.opened(self._path, os.O_RDONLY | self._direct) as descriptor:
            while position < wanted:
                into = target[position : min(whole, position + call_nbytes)]
                got = os.preadv(descriptor, [into], first + position)
                position += got
                # A direct read stops at the file's end, which need not be a page's end.
                if got == 0 or (got % mmap.PAGESIZE and position < wanted):
                    raise self._short(first + position)

    def _read_cached(self, target: memoryview) -> None:
        position = 0
        with self._descriptors.opened(self._path, os.O_RDONLY) as descriptor:
            while position < self.file.nbytes:
                into = target[position : self.file.nbytes]
                got = os.preadv(descriptor, [into], self.start + position)
                position += got
                if got == 0:
                    raise self._short(self.start + position)

    def read_tensorstore(self, block: np.ndarray) -> None:
        import tensorstore as ts

        target = ts.array(self.typed(block), write=True, copy=False)
        with self._foreign_errors():
            target.write(self._stored()).result()
        self._check_unchanged()
        self._check_content(block[: self.file.nbytes])

    def _stored(self) -> Any:
        import tensorstore as ts

        if self._tensorstore is None:
            kvstore = {"driver": "file", "path": f"{self.file.directory}/"}
            self._tensorstore = ts.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        return self._tensorstore

    def rows(self, rows: np.ndarray) -> np.ndarray:
        if not self.file.raw:
            with self._foreign_errors():
                return np.asarray(self._stored()[rows].read().result())
        if self._unverified:
            self._check_in_pieces()
        self._check_unchanged()
        if rows.size * _PAGES_A_ROW * mmap.PAGESIZE > self.file.nbytes:
            return self.mapped()[rows]
        return self.typed(self.mapping()[self.lead :])[rows]

    @contextlib.contextmanager
    def _foreign_errors(self) -> Iterator[None]:
        """Of TensorStore, which says in many words what it cannot read or decode."""
        try:
            yield
        except ValueError as error:
            why = str(error).partition("\n")[0].partition(" [tensorstore_spec")[0]
            raise StorageError(f"cannot read {self.name}: {why}") from error

    def _check_unchanged(self) -> None:
        """Raises if the file is no longer the one that was opened, or was written to."""
        if self.file.stamp is not None and not self.file.stamp.still_of(self._path):
            raise StorageError(
                f"{self.name} was changed or replaced while it was in use: {self.file.chunk} is "
                "not the file that was opened; what was computed so far stands, the rest would be "
                "of another model. Put the file back and resume, or start over with what is there"
            )

    def _check_content(self, content: np.ndarray) -> None:
        """Raises if ``content``, the tensor's bytes, is not what was written; looks once."""
        if self._unverified:
            if self.file.checksum is not None:
                self._compare(tensor_checksum(content))
            if self.file.finite and not is_finite(self.typed(content)):
                raise self._no_numbers()
            self._unverified = False

    def _check_in_pieces(self) -> None:
        """As :meth:`_check_content`, of what is not wanted in memory."""
        found, left = TensorChecksum(), self.file.nbytes
        with open(self.file.chunk, "rb") as file:
            file.seek(self.start)
            block = np.empty(min(left, _PIECE), np.uint8)
            while left and (got := file.readinto(block[: min(left, _PIECE)].data)):
                found.add(block[:got])
                if self.file.finite and not is_finite(block[:got].view(self.file.dtype)):
                    raise self._no_numbers()
                left -= got
        if self.file.checksum is not None:
            self._compare(str(found))
        self._unverified = False

    def _compare(self, found: str) -> None:
        if found != self.file.checksum:
            raise StorageError(
                f"{self.name} is damaged: the bytes in {self.file.chunk} are not those that were "
                f"written (checksum {found}, expected {self.file.checksum}); 'flexgen-jax verify' "
                "names all that is; convert the model again, or download it again"
            )

    def _no_numbers(self) -> StorageError:
        return StorageError(
            f"{self.name} in {self.file.chunk} has values that are not numbers (NaN or infinity): "
            "nothing that is computed with them would mean anything; download or save the model "
            "again"
        )

    def _short(self, size: int) -> StorageError:
        return StorageError(
            f"short read of {self.name}: {self.file.chunk} gave {size} bytes, expected "
            f"{self._end}; the store is damaged, remove it and convert the model again"
        )

    def close(self) -> None:
        self._region = self._view = self._alias = None
        self._tensorstore = None


class DiskStore:
    """Tensors in array files, read anew at every load."""

    def __init__(
        self,
        files: Mapping[str, ArrayFile],
        context: DiskContext | None = None,
        device: Any = None,
    ) -> None:
        self._context = context or DiskContext()
        self._device = device or jax.local_devices()[0]
        verify = self._context.verify
        self._descriptors = Descriptors()
        self._tensors = {
            name: _OpenTensor(name, file, verify, self._descriptors) for name, file in files.items()
        }
        sizes = [file.nbytes for file in files.values()]
        spare = self._context.cache_share * available_memory()
        # A system maps some 65,000 regions of a process.
        self._few = len(sizes) <= _MOST_MAPPED
        self._fits = sum(sizes) <= spare and self._few
        small = [nbytes for nbytes in sizes if nbytes < self._context.small_nbytes]
        self._small_fit = sum(small) <= _OF_SMALL * spare and self._few
        self._readers: ThreadPoolExecutor | None = None
        self._aliases = self._device.platform == "cpu"
        self.bytes_read = 0

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def slot_nbytes(self, names: Sequence[str]) -> int:
        tensors = [self._tensors[name] for name in names]
        return sum(_pages(t) for t in tensors if not self._always_mapped(t.file))

    def load(self, names: Sequence[str], slot: Slot) -> dict[str, jax.Array]:
        views: dict[str, Any] = {}
        reads: list[tuple[_OpenTensor, np.ndarray]] = []
        for name in names:
            tensor = self._tensors[name]
            self.bytes_read += tensor.file.nbytes
            try:
                mapped = self._mapped(tensor)
                if mapped:
                    aliased = self._aliases and self._aliasable(tensor.file)
                    views[name] = tensor.alias(self._device) if aliased else tensor.mapped()
                    continue
            except OSError as error:
                raise _failed(tensor, error) from error
            block = slot.take(_pages(tensor))
            reads.append((tensor, block))
            views[name] = tensor.typed(block)
        self._read_all(reads)
        if self._aliases:
            for tensor, _ in reads:
                views[tensor.name] = slot.alias(views[tensor.name], self._device)
        # The consumer's result, not this transfer, tells when the slot may be refilled; waiting
        # here makes the copy to an accelerator count as loading, which it is.
        moved = {n: v for n, v in views.items() if not isinstance(v, jax.Array)}
        views.update(jax.block_until_ready(jax.device_put(moved, self._device)))
        return views

    def take(self, name: str, rows: np.ndarray) -> jax.Array:
        """Through the page cache, whose pages of these rows alone are read where they are few."""
        tensor = self._tensors[name]
        try:
            chosen = tensor.rows(rows)
        except OSError as error:
            raise _failed(tensor, error) from error
        self.bytes_read += chosen.nbytes
        return jax.device_put(chosen, self._device)

    def read_into(self, name: str, block: np.ndarray) -> np.ndarray:
        """Reads ``name`` once into ``block`` (page-aligned whole pages) that the caller keeps."""
        tensor = self._tensors[name]
        try:
            if not tensor.file.raw:
                tensor.read_tensorstore(block)
            elif block.nbytes < _pages(tensor):
                tensor.read_direct(block, self._context.direct_nbytes, cached=True)
            else:
                tensor.read_direct(block, self._context.direct_nbytes)
        except OSError as error:
            raise _failed(tensor, error) from error
        return tensor.typed(block)

    def _always_mapped(self, file: ArrayFile) -> bool:
        mode = self._context.mode
        if not file.raw or mode == "tensorstore":
            return False
        if file.nbytes < self._context.small_nbytes and self._small_fit:
            return True
        return self._aliasable(file) and (mode == "mapped" or (mode == "auto" and self._fits))

    def _aliasable(self, file: ArrayFile) -> bool:
        """Whether the device takes the mapping as it lies, or copies what it gets anyway."""
        return not self._aliases or (file.offset or 0) % ALIGNMENT == 0

    def _read_all(self, reads: Sequence[tuple[_OpenTensor, np.ndarray]]) -> None:
        """Small ones several at a time: a disk answers them as quickly as one."""
        if len(reads) > 1 and sum(block.nbytes for _, block in reads) < len(reads) * _SMALL_READ:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(_AT_A_TIME, "flexgen-read")
            # All have ended when this returns or raises: no thread writes into a slot later.
            shares = [reads[n::_AT_A_TIME] for n in range(_AT_A_TIME)]
            futures = [self._readers.submit(self._read_each, share) for share in shares]
            wait(futures)
            for future in futures:
                future.result()
            return
        self._read_each(reads)

    def _read_each(self, reads: Sequence[tuple[_OpenTensor, np.ndarray]]) -> None:
        for tensor, block in reads:
            self._read(tensor, block)

    def _read(self, tensor: _OpenTensor, block: np.ndarray) -> None:
        mode, file = self._context.mode, tensor.file
        try:
            if not file.raw or (mode == "tensorstore" and file.offset is None):
                tensor.read_tensorstore(block)
            else:
                cached = self._is_cached(tensor)
                tensor.read_direct(block, self._context.direct_nbytes, cached=cached)
        except OSError as error:
            raise _failed(tensor, error) from error

    def _is_cached(self, tensor: _OpenTensor) -> bool:
        """Whether to read through the page cache what lies there or may, and cannot be mapped."""
        mode = self._context.mode
        if mode != "auto" or self._aliasable(tensor.file) or not self._few:
            return mode == "mapped"
        return self._fits or resident_fraction(tensor.mapping()) >= RESIDENT

    def _mapped(self, tensor: _OpenTensor) -> bool:
        if self._always_mapped(tensor.file):
            return True
        cacheable = tensor.file.raw and self._context.mode == "auto"
        cacheable = cacheable and self._few and self._aliasable(tensor.file)
        return cacheable and resident_fraction(tensor.mapping()) >= RESIDENT

    def close(self) -> None:
        if self._readers is not None:
            self._readers.shutdown()
            self._readers = None
        for tensor in self._tensors.values():
            tensor.close()
        self._descriptors.close()


def _pages(tensor: _OpenTensor) -> int:
    """Bytes of the pages that the tensor lies in."""
    return round_up(tensor.lead + tensor.file.nbytes)


def _failed(tensor: _OpenTensor, error: OSError) -> StorageError:
    return StorageError(
        f"cannot read {tensor.name} from {tensor.file.chunk}: {error.strerror or error}"
    )
