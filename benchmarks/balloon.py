"""Leaves the machine only so much memory, page cache included, by locking the rest.

For machines where a process may not limit its own control group. What is left is shared by
everything that runs: keep the machine quiet. The balloon is filled once and never adjusted.

    python benchmarks/balloon.py --leave 2147483648    # until its standard input closes
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from machine import available_nbytes, die_first, die_with

_CHUNK = 64 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)


def _swaps() -> bool:
    return len(Path("/proc/swaps").read_text().splitlines()) > 1


def _lock(region: mmap.mmap) -> bool:
    """Touches and locks ``region``. Without swap, what is touched stays even if not locked."""
    address = ctypes.c_char.from_buffer(region)
    locked = _LIBC.mlock(ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(len(region)))
    if locked == 0:
        return True
    if _swaps():
        raise SystemExit(f"cannot lock memory: {os.strerror(ctypes.get_errno())}; raise ulimit -l")
    region[:: mmap.PAGESIZE] = b"\1" * (len(region) // mmap.PAGESIZE)
    return False


def fill(leave: int) -> tuple[list[mmap.mmap], bool]:
    """Takes memory chunk by chunk, giving the page cache time to shrink."""
    regions, locked = [], True
    # Decided now, and again at every chunk: others may take memory meanwhile, and theirs it stays.
    for _ in range(max(0, available_nbytes() - leave) // _CHUNK):
        if available_nbytes() - _CHUNK < leave:
            break
        region = mmap.mmap(-1, _CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        locked = _lock(region) and locked
        regions.append(region)
        time.sleep(0.002)
    return regions, locked


@contextlib.contextmanager
def balloon(leave: int) -> Iterator[dict[str, int]]:
    """While entered, about ``leave`` bytes are available to everything on the machine.

    Raises:
        RuntimeError: it could not be filled, or was killed meanwhile, so that there was no limit.
    """
    command = [sys.executable, __file__, "--leave", str(leave), "--parent", str(os.getpid())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the balloon ended with {process.wait()}")
        yield json.loads(line)
        if process.poll() is not None:
            raise RuntimeError(f"the balloon ended with {process.returncode} during the run")
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leave", type=int, required=True, help="bytes")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="dies with this process")
    args = parser.parse_args()
    die_with(args.parent)
    # Rather than anybody's work, but after the measured process, which asks to be killed first.
    die_first(900)
    regions, locked = fill(args.leave)
    held = len(regions) * _CHUNK
    state = {"held_nbytes": held, "locked": locked, "available_nbytes": available_nbytes()}
    print(json.dumps(state), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
