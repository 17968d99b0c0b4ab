"""What matters of the file system that a directory is on: its kind, direct I/O, locks, room."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

from storage.memory import PAGE, aligned_bytes

IN_MEMORY = frozenset({"tmpfs", "ramfs"})
NETWORK = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"}
    | {"smb3", "smbfs", "fuse.ceph", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSystem:
    """Of one directory.

    Attributes:
        kind: As the system calls it (``ext4``, ``nfs4``, ...); None: it does not tell.
        free: Bytes that this user may still write.
        direct_io: Whether files can be read past the page cache (``O_DIRECT``).
        locks: Whether files can be locked, which conversions and runs need.
    """

    kind: str | None
    free: int
    direct_io: bool
    locks: bool

    @property
    def in_memory(self) -> bool:
        """What is put there takes memory."""
        return self.kind in IN_MEMORY

    @property
    def network(self) -> bool:
        """It lies on another machine."""
        return self.kind in NETWORK


def existing(directory: Path) -> Path:
    """``directory``, or of the directories above it the nearest that exists."""
    directory = Path(os.path.abspath(directory))
    return next(path for path in (directory, *directory.parents) if os.path.exists(path))


def file_system(directory: Path) -> FileSystem:
    """Looks at ``directory`` with a file of one page, which is removed again.

    Raises:
        OSError: no file can be written there.
    """
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-doctor-", dir=directory) as scratch:
        file = Path(scratch) / "page"
        file.write_bytes(bytes(PAGE))
        return FileSystem(
            kind=_kind(directory),
            free=shutil.disk_usage(directory).free,
            direct_io=_direct(file),
            locks=_locks(file),
        )


def _direct(file: Path) -> bool:
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    try:
        handle = os.open(file, os.O_RDONLY | flag)
    except OSError:
        return False
    try:
        return os.preadv(handle, [aligned_bytes(1 << 20)[:PAGE].data], 0) == PAGE
    except OSError:
        return False
    finally:
        os.close(handle)


def _locks(file: Path) -> bool:
    with file.open("rb+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
    return True


def _kind(directory: Path) -> str | None:
    """The type of the mount with the longest path that ``directory`` is below."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    real = directory.resolve()
    found: tuple[int, str] | None = None
    for line in lines:
        mount, _, source = line.partition(" - ")
        # Spaces and the like are written as \ooo.
        point = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), mount.split()[4]))
        # Of two mounts on one point the later hides the earlier.
        if real.is_relative_to(point) and (found is None or len(point.parts) >= found[0]):
            found = len(point.parts), source.split()[0]
    return found[1] if found else None
