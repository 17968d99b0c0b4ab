"""Safetensors, mapped."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from flexgen_jax.weights.tensor_file import CODE_DTYPES, DTYPES, Entry, SourceError
from storage.array_file import whole_numbers
from storage.json_text import parse_json

_READ = {**DTYPES, **CODE_DTYPES}
_MAX_HEADER = 32 << 20  # bytes: of 300,000 tensors; the format allows 100,000,000
_PER_TENSOR = 16  # bytes of a header, at least, that each of its brackets takes


class SafetensorsFile:
    """The documented format: 8 bytes of header length, a JSON header, the tensors' bytes.

    The tensors lie one after another, from the header's end to the file's, each byte in one of
    them.

    Read here rather than through the safetensors library because that hands out copies of whole
    tensors or keeps every page of the file resident.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            nbytes = int.from_bytes(file.read(8), "little")
            if nbytes > _MAX_HEADER:
                raise self._not_one(f"its header would have {nbytes} bytes of {_MAX_HEADER}")
            if size < 8 + nbytes:
                raise self._truncated(f"{size} bytes, its header alone takes {8 + nbytes}")
            self._data_at = 8 + nbytes
            try:
                content = file.read(nbytes)
                # Brackets by the million become objects that take a hundred times as much.
                if content.count(b"[") + content.count(b"{") > 2 + nbytes // _PER_TENSOR:
                    raise ValueError("its header has more parts than tensors could have")
                text = content.decode()
                del content
                if not text.startswith("{"):
                    raise ValueError("its header does not begin with '{'")
                header = parse_json(text)
                header.pop("__metadata__", None)
                places = {key: _place(key, values) for key, values in header.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._not_one(str(error) or type(error).__name__) from error
            self._check(places, size - self._data_at)
            self.entries = {
                key: self._entry(key, header[key], begin, end)
                for key, (begin, end) in places.items()
            }
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def _truncated(self, what: str) -> SourceError:
        return SourceError(f"{self._path} is truncated: it has {what}; download the model again")

    def _not_one(self, why: str) -> SourceError:
        return SourceError(
            f"{self._path} is not a safetensors file: {why}; download the model again"
        )

    def _check(self, places: dict[str, tuple[int, int]], nbytes: int) -> None:
        """Whether the tensors take the ``nbytes`` of data without a gap and without an overlap."""
        at = 0
        for key, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
            if begin != at:
                how = "overlaps the one before" if begin < at else "leaves a gap before it"
                raise self._not_one(f"tensor {key} {how}: it begins at {begin}, expected {at}")
            at = end
        if at > nbytes:
            raise self._truncated(
                f"{self._data_at + nbytes} bytes, its header promises {self._data_at + at}"
            )
        if at < nbytes:
            raise self._not_one(f"{nbytes - at} bytes follow its last tensor")

    def _entry(self, key: str, values: dict[str, Any], begin: int, end: int) -> Entry:
        if values["dtype"] not in _READ:
            raise SourceError(
                f"{self._path}: tensor {key} has dtype {values['dtype']}; readable are "
                f"{', '.join(_READ)}"
            )
        dtype, shape = _READ[values["dtype"]], tuple(values["shape"])
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise self._not_one(f"tensor {key} of shape {list(shape)} has {end - begin} bytes")
        return Entry(shape, dtype, self._data_at + begin)

    def array(self, key: str) -> np.ndarray:
        entry = self.entries[key]
        if self._map.size() < len(self._map):  # what it no longer has would end the process
            raise self._truncated(f"{self._map.size()} bytes now, and had {len(self._map)} before")
        start = entry.offset // mmap.PAGESIZE * mmap.PAGESIZE
        nbytes = math.prod(entry.shape) * entry.dtype.itemsize
        self._map.madvise(mmap.MADV_WILLNEED, start, entry.offset + nbytes - start)
        return np.ndarray(entry.shape, entry.dtype, self._map, entry.offset)

    def release(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)


def _place(key: str, values: dict[str, Any]) -> tuple[int, int]:
    """Where a tensor lies, counted from the header's end."""
    if not isinstance(values["dtype"], str):
        raise ValueError(f"tensor {key} has dtype {values['dtype']!r}")
    try:
        whole_numbers(values["shape"])
        begin, end = whole_numbers(values["data_offsets"], 2)
    except ValueError as error:
        raise ValueError(f"tensor {key}: {error}") from error
    if begin > end:
        raise ValueError(f"tensor {key} ends at {end}, before it begins at {begin}")
    return begin, end
