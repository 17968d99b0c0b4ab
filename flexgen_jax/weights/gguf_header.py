"""Whether a GGUF's header can be what it says, before a reader believes its counts.

The package ``gguf`` goes through as many entries as a header claims to have, also beyond the end of
the file: for hours, if the count is large enough. This walks the header once and believes nothing.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

MAX_ENTRIES = 1 << 16  # of metadata, or tensors
MAX_ELEMENTS = 1 << 23  # of a list: a vocabulary's merges are a hundredth of it
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_DIMENSIONS = 4


def check_header(path: Path) -> None:
    """Raises:
    ValueError: it ends early, or claims what no model has.
    OSError: it cannot be read.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        _Walk(data).header()


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._size = data, 0, len(data)

    def header(self) -> None:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; read are 2 and 3, of this byte order")
        tensors, fields = self._number("<Q"), self._number("<Q")
        if max(tensors, fields) > MAX_ENTRIES:
            raise ValueError(f"it claims to have {tensors} tensors and {fields} fields")
        for _ in range(fields):
            self._string()
            self._value(self._number("<I"))
        for _ in range(tensors):
            self._string()
            dimensions = self._number("<I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor claims to have {dimensions} dimensions")
            self._skip(8 * dimensions + 4 + 8)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            inner, count = self._number("<I"), self._number("<Q")
            if count > MAX_ELEMENTS:
                raise ValueError(f"a list claims to have {count} elements")
            if inner == _STRING:
                for _ in range(count):
                    self._string()
            else:
                self._skip(count * self._size_of(inner))
        else:
            self._skip(self._size_of(kind))

    @staticmethod
    def _size_of(kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"there is no kind {kind} of values")
        return _SIZES[kind]

    def _string(self) -> None:
        self._skip(self._number("<Q"))

    def _number(self, form: str) -> int:
        found: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return found

    def _take(self, count: int) -> bytes:
        begin = self._at
        self._skip(count)
        return self._data[begin : self._at]

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise ValueError(f"it ends after {self._size} bytes, in the midst of its header")
        self._at += count
