"""A directory for one run's temporary files, which outlives neither the run nor its process.

A process that is killed cannot clean up behind itself. So each scratch directory holds a lock
that the system releases with its process, and whoever makes the next one removes those that
nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from storage.store import StorageError

PREFIX = "scratch-"
_LOCK = "lock"


class Scratch:
    """A context manager; :attr:`path` is the directory.

    Args:
        parent: Where it is made; created if need be.

    Raises:
        StorageError: it cannot be made there.
    """

    def __init__(self, parent: Path) -> None:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            remove_stale(parent)
            self.path, self._lock = _make_and_lock(parent)
        except OSError as error:
            raise StorageError(
                f"cannot make a directory for temporary files in {parent}: {error.strerror}; "
                "choose another offload directory"
            ) from error

    def require(self, nbytes: int, what: str) -> None:
        """Checks the free space before a run rather than in the middle of it.

        Raises:
            StorageError: less than ``nbytes`` is free.
        """
        free = shutil.disk_usage(self.path).free
        if nbytes > free:
            raise StorageError(
                f"{what} need {nbytes / 1e9:.2f} GB on disk and {self.path.parent} has "
                f"{free / 1e9:.2f} GB free; free some, choose another offload directory or smaller "
                "blocks"
            )

    def close(self) -> None:
        """Removes the directory and all in it."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_and_lock(parent: Path) -> tuple[Path, int]:
    """Makes a directory below ``parent``; returns it and the file that holds its lock.

    Before the lock is held, another process may take the directory for a stale one: then it is
    gone once the lock is ours, and the next one is made.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (path / _LOCK).exists():
            return path, lock
        os.close(lock)


def remove_stale(parent: Path) -> list[Path]:
    """Removes the scratch directories of processes that are gone; returns them."""
    removed = []
    for path in parent.glob(PREFIX + "*"):
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # being made just now, or not ours
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
        finally:
            os.close(lock)
    return removed
