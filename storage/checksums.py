"""Checksums of what is kept on disk and read again.

They find bytes that a disk, a copy or an editor has changed, and are no proof against malice. Lines
and journals have CRC-32. Tensors, of which a run reads gigabytes, have XXH3 of 64 bits, which is
faster than memory is copied.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

_PIECE = 1 << 20


def checksum_of(path: Path) -> int:
    """Of the file ``path``, its size included.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return checksum_between(file, 0, size, zlib.crc32(str(size).encode()))


class TensorChecksum:
    """Of a tensor's bytes, in pieces as they come."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, block: Any) -> None:
        """The next bytes: anything with a contiguous buffer of them."""
        self._hash.update(block)

    def __str__(self) -> str:
        """Hexadecimal, 16 digits."""
        return str(self._hash.hexdigest())


def tensor_checksum(block: Any) -> str:
    """Of all bytes of a tensor at once, as :class:`TensorChecksum` has it."""
    return str(xxhash.xxh3_64_hexdigest(block))


def checksum_between(file: IO[bytes], begin: int, end: int, checksum: int = 0) -> int:
    """Of the bytes ``begin`` to ``end`` of ``file``, as far as it goes.

    Args:
        checksum: Of what stands before them, if they are to be counted with it.
    """
    file.seek(begin)
    while begin < end and (piece := file.read(min(_PIECE, end - begin))):
        checksum, begin = zlib.crc32(piece, checksum), begin + len(piece)
    return checksum


# Bits of the short types that are all set in what is no number, and in nothing else: the
# exponent's; of FP8, which has no infinity, all but the sign.
_EXPONENTS: dict[str, np.generic] = {
    "bfloat16": np.uint16(0x7F80),
    "float16": np.uint16(0x7C00),
    "float8_e4m3fn": np.uint8(0x7F),
}
_PART = 1 << 18  # elements: what stays in a core's cache


def is_finite(values: np.ndarray) -> bool:
    """Whether all floats are numbers: neither NaN nor infinite."""
    flat = values.reshape(-1)
    ones = _EXPONENTS.get(flat.dtype.name)
    if ones is None:
        return bool(np.isfinite(flat).all())
    # By the exponents: five times as fast.
    flat = flat.view(ones.dtype)
    parts = (flat[i : i + _PART] & ones for i in range(0, flat.size, _PART))
    return all(part.max() != ones for part in parts)
