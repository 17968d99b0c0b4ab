"""Host memory: aligned allocation, and how much of it this process may still take.

Alignment matters: ``jax.device_put`` aliases a NumPy array on the CPU only if its data start on a
64-byte boundary; direct I/O wants whole pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from pathlib import Path

import numpy as np

PAGE = mmap.PAGESIZE
ALIGNMENT = 64  # of what JAX aliases on the CPU
_MAPPED_FROM = 1 << 20
_LIBRARIES = 150_000_000  # resident pages of Python's, JAX's and TensorStore's files, measured


def round_up(nbytes: int, multiple: int = PAGE) -> int:
    """The least multiple of ``multiple`` that is not below ``nbytes``."""
    return -(-nbytes // multiple) * multiple


def aligned_bytes(nbytes: int, *, touch: bool = False) -> np.ndarray:
    """Uninitialised ``uint8`` memory of ``nbytes`` bytes, page-aligned when large.

    Large blocks are their own anonymous mapping, so that freeing them returns them to the system,
    with huge pages where the system has them.

    Args:
        touch: Write every page now: the first write to a fresh page costs eight times a later one.
    """
    if nbytes >= _MAPPED_FROM:
        region = mmap.mmap(-1, round_up(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                region.madvise(mmap.MADV_HUGEPAGE)
        block = np.frombuffer(region, np.uint8)[:nbytes]
    else:
        raw = np.empty(nbytes + PAGE, np.uint8)
        start = -raw.ctypes.data % PAGE
        block = raw[start : start + nbytes]
    if touch:
        block[:] = 0
    return block


_libc = ctypes.CDLL(None, use_errno=True)
_MADV_POPULATE_READ = 22  # Linux 5.14; not in Python's mmap module


def populate(block: np.ndarray) -> None:
    """Brings a file mapping's pages into memory; waits for the disk without holding the GIL.

    Raises:
        OSError: the file has become shorter, or cannot be read.
    """
    if block.nbytes == 0:
        return
    address = ctypes.c_void_p(block.ctypes.data)
    ctypes.set_errno(0)
    if _libc.madvise(address, ctypes.c_size_t(block.nbytes), _MADV_POPULATE_READ) == 0:
        return
    if ctypes.get_errno() == errno.EFAULT:  # what touching it would be killed for
        raise OSError(errno.EIO, "the file became shorter, or its disk failed")
    block[::PAGE].max()  # an older kernel: touch a byte of each page


def resident_fraction(block: np.ndarray) -> float:
    """The share of a page-aligned file mapping that already lies in the page cache, in [0, 1]."""
    pages = -(-block.nbytes // PAGE)
    if pages == 0:
        return 1.0
    flags = np.zeros(pages, np.uint8)
    failed = _libc.mincore(
        ctypes.c_void_p(block.ctypes.data),
        ctypes.c_size_t(block.nbytes),
        flags.ctypes.data_as(ctypes.c_void_p),
    )
    return 0.0 if failed else int(np.count_nonzero(flags & 1)) / pages


def resident_memory() -> int:
    """Bytes of memory that this process holds for itself; 0 where the system does not tell.

    Pages of mapped files are not in it, which the system takes back when it needs them, but for
    those of libraries, which are always in use: about 150 MB.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssShmem"):
            found[name] = int(value.split()[0]) * 1024
    return sum(found.values()) + _LIBRARIES if found else 0


def give_back() -> None:
    """Returns to the system what has been freed, but is kept for the next allocation.

    GNU's allocator keeps an area for each thread, and of each what lies between things that are
    still there: a third on top of what a run holds.
    """
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def _meminfo(field: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _cgroup_file(name: str) -> int | None:
    """A value of this process's memory cgroup (v2, then v1); None where there is no limit."""
    v1 = {"memory.max": "memory.limit_in_bytes", "memory.current": "memory.usage_in_bytes"}
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    groups = [line.split(":", 2) for line in own]
    candidates = [f"/sys/fs/cgroup{path}/{name}" for n, _, path in groups if n == "0"]
    candidates += [f"/sys/fs/cgroup/{name}", f"/sys/fs/cgroup/memory/{v1[name]}"]
    for candidate in candidates:
        try:
            text = Path(candidate).read_text().strip()
        except OSError:
            continue
        if text == "max" or int(text) > 1 << 60:
            return None
        return int(text)
    return None


def memory_limit() -> int | None:
    """Bytes that this process's cgroup allows; None: no limit."""
    return _cgroup_file("memory.max")


def total_memory() -> int:
    """Bytes of the machine, whoever has them."""
    return _meminfo("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes this process can take without swapping: the system's estimate, cgroup limit respected.

    Page cache counts as available: the kernel gives it up on demand.
    """
    system = _meminfo("MemAvailable")
    if system is None:
        system = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limit, used = _cgroup_file("memory.max"), _cgroup_file("memory.current")
    return system if limit is None else max(0, min(system, limit - (used or 0)))
