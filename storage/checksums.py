"""Checksums of what is kept on disk and read again.

CRC-32: it finds bytes that a disk, a copy or an editor has changed, and is no proof against malice.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import IO

_PIECE = 1 << 20


def checksum_of(path: Path) -> int:
    """Of the file ``path``, its size included.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return checksum_between(file, 0, size, zlib.crc32(str(size).encode()))


def checksum_between(file: IO[bytes], begin: int, end: int, checksum: int = 0) -> int:
    """Of the bytes ``begin`` to ``end`` of ``file``, as far as it goes.

    Args:
        checksum: Of what stands before them, if they are to be counted with it.
    """
    file.seek(begin)
    while begin < end and (piece := file.read(min(_PIECE, end - begin))):
        checksum, begin = zlib.crc32(piece, checksum), begin + len(piece)
    return checksum
