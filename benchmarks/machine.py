"""What a measured process knows of itself and of the machine: memory, bytes read, the disk's speed.

Only the standard library, so that the peers' interpreter, which has none of ours, runs it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memory import held_nbytes

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_DIRECT_CALL = 32 << 20
_PROBE_NBYTES = 1 << 30


def die_with(parent: int) -> None:
    """Has the kernel kill this process when ``parent``, which started it, is gone."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the request took effect
        raise SystemExit("the parent is gone")


def die_first(score: int) -> None:
    """If memory runs out, this process is killed rather than anybody else's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))


def available_nbytes() -> int:
    """Bytes that can be taken without swapping; the page cache counts, since it gives way."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/meminfo has no MemAvailable")


def _files(root: Path) -> list[Path]:
    """The data files under ``root``, largest first; links would count a file twice."""
    files = [f for f in root.rglob("*") if f.is_file() and not f.is_symlink()]
    return sorted(files, key=lambda f: -f.stat().st_size)


def evict(root: Path) -> None:
    """Drops the pages of all files under ``root`` from the page cache."""
    os.sync()  # pages that are not written yet would stay
    for file in _files(root):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cached_share(root: Path) -> float:
    """The share of the bytes under ``root`` in the page cache: pages that anybody maps stay."""
    cached = pages = 0
    for file in _files(root):
        size = file.stat().st_size
        if size < 1 << 20:
            continue
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE) as view:
            flags = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
            # A private mapping may be written, which from_buffer asks for; nothing is.
            address = ctypes.c_char.from_buffer(view)
            failed = _LIBC.mincore(
                ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(size), flags
            )
            del address
            if not failed:
                cached += sum(flag & 1 for flag in flags)
                pages += len(flags)
    return cached / pages if pages else 0.0


def read_bandwidth(root: Path) -> float:
    """Bytes per second of direct reads of the largest files under ``root``, about 1 GB in all."""
    sizes = {file: file.stat().st_size for file in _files(root)}
    # Small files tell of latency; of a small model, the large ones are read several times.
    least = max(sizes.values()) // 64
    large = [file for file, size in sizes.items() if size >= least]
    with mmap.mmap(-1, _DIRECT_CALL) as buffer:
        buffer[:] = bytes(len(buffer))  # faults are no part of the disk's speed
        done, started = 0, time.perf_counter()
        for file in itertools.cycle(large):
            done += _read(file, memoryview(buffer))
            if done >= _PROBE_NBYTES:
                break
        return done / (time.perf_counter() - started)


def _read(file: Path, buffer: memoryview) -> int:
    try:
        handle = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # not every file system has direct I/O; evicted files come from the disk too
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        position = 0
        while got := os.preadv(handle, [buffer], position):
            position += got
            if got % mmap.PAGESIZE:
                break  # the file's end; a direct read beyond an odd position is refused
        return position
    finally:
        os.close(handle)
        buffer.release()


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


def _highest_nbytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def _sampled(seconds: float = 0.02) -> Iterator[list[int]]:
    """The most anonymous and shared memory seen, in a list of one."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(seconds):
            peak[0] = max(peak[0], held_nbytes(os.getpid()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def measured(call: Callable[[], Any], files: Path) -> dict[str, Any]:
    """Runs ``call`` with the pages of ``files`` evicted; its seconds, memory and bytes.

    The disk is probed right before and right after, since its speed is what varies most.
    """
    evict(files)
    cached = cached_share(files)
    speeds = [read_bandwidth(files)]
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: building is not meant
    before = _io()
    with _sampled() as peak:
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
    after = _io()
    highest = _highest_nbytes()
    speeds.append(read_bandwidth(files))
    return {
        "seconds": round(seconds, 3),
        "peak_rss_nbytes": highest,
        "peak_anon_nbytes": peak[0],
        "read_nbytes": after["read_bytes"] - before["read_bytes"],
        "written_nbytes": after["write_bytes"] - before["write_bytes"],
        "cached_share_before": round(cached, 3),
        "disk_gb_per_second": [round(s / 1e9, 3) for s in speeds],
        # The same number of bytes in each: the mean speed is the harmonic mean.
        "disk_bytes_per_second": round(2 / sum(1 / s for s in speeds)),
    }
