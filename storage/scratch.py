"""A directory for one run's temporary files, which outlives neither the run nor its process.

A process that is killed cannot clean up behind itself. So each scratch directory holds a lock
that the system releases with its process, and whoever makes the next one removes those that
nobody holds. What is removed is ours by three signs: the name, the lock, and what the lock says.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from storage.store import StorageError

PREFIX = "flexgen-jax-scratch-"
_LOCK = "flexgen-jax.lock"
_MARK = b"A run of flexgen-jax keeps its temporary files here; without it they are removed.\n"


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
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            self._lock = _make_lock(self.path / _LOCK)
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


def _make_lock(path: Path) -> int:
    """Makes the file that holds the lock; returns its descriptor.

    The mark comes when the lock is held: before, nobody takes the directory for a stale one.
    """
    lock = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.write(lock, _MARK)
    return lock


def remove_stale(parent: Path) -> list[Path]:
    """Removes the scratch directories of processes that are gone; returns them."""
    removed = []
    for path in parent.glob(PREFIX + "*"):
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            lock = os.open(path / _LOCK, flags)
        except OSError:
            continue  # being made just now, or not ours
        try:
            if path.is_symlink() or not _is_marked(lock):
                continue
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
        finally:
            os.close(lock)
    return removed


def _is_marked(lock: int) -> bool:
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        return False  # a pipe, say
    return os.pread(lock, len(_MARK) + 1, 0) == _MARK
