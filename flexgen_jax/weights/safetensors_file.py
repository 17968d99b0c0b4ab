"""Safetensors, mapped."""

from __future__ import annotations

import json
import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from flexgen_jax.weights.tensor_file import DTYPES, Entry, SourceError


class SafetensorsFile:
    """The documented format: 8 bytes of header length, a JSON header, the tensors' bytes.

    Read here rather than through the safetensors library because that hands out copies of whole
    tensors or keeps every page of the file resident.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_nbytes = int.from_bytes(file.read(8), "little")
            if size < 8 + header_nbytes:
                raise self._damaged(f"{size} bytes, its header alone takes {8 + header_nbytes}")
            try:
                header = json.loads(file.read(header_nbytes))
                header.pop("__metadata__", None)
                self._data_at = 8 + header_nbytes
                self.entries = {key: self._entry(key, v) for key, v in header.items()}
                end = max((v["data_offsets"][1] for v in header.values()), default=0)
            except SourceError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise SourceError(f"{path} is no safetensors file: {error}") from error
            if size < self._data_at + end:
                raise self._damaged(f"{size} bytes, its header promises {self._data_at + end}")
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def _damaged(self, what: str) -> SourceError:
        return SourceError(f"{self._path} is truncated: it has {what}; download the model again")

    def _entry(self, key: str, values: dict[str, Any]) -> Entry:
        if values["dtype"] not in DTYPES:
            raise SourceError(
                f"{self._path}: tensor {key} has dtype {values['dtype']}; readable are "
                f"{', '.join(DTYPES)}"
            )
        dtype, shape = DTYPES[values["dtype"]], tuple(values["shape"])
        begin, end = values["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {key} of shape {list(shape)} has {end - begin} bytes")
        return Entry(shape, dtype, self._data_at + begin)

    def array(self, key: str) -> np.ndarray:
        entry = self.entries[key]
        start = entry.offset // mmap.PAGESIZE * mmap.PAGESIZE
        nbytes = math.prod(entry.shape) * entry.dtype.itemsize
        self._map.madvise(mmap.MADV_WILLNEED, start, entry.offset + nbytes - start)
        return np.ndarray(entry.shape, entry.dtype, self._map, entry.offset)

    def release(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)
