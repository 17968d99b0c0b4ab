"""One array as a directory: zarr version 3, ideally a single uncompressed chunk.

Such an array is readable by any zarr implementation, and at the same time its one chunk file *is*
the array's bytes, which can be mapped or read directly. This module writes that form with bounded
memory and verifies it by its metadata and file size. It knows no layer and no model.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from storage.checksums import TensorChecksum
from storage.json_text import read_json

METADATA_NAME = "zarr.json"


class StoreError(ValueError):
    """A stored array or weight store that is missing, damaged or foreign, or cannot be written."""


class Stamp(NamedTuple):
    """By what it shows that somebody has written to a file, or put another one in its place."""

    nbytes: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        """Of a path or a descriptor.

        Raises:
            OSError: there is none.
        """
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)

    def still_of(self, file: str) -> bool:
        """Whether ``file`` is what it was; cheap, for it is asked at every read.

        Raises:
            OSError: there is none.
        """
        found = os.stat(file)
        return self == (found.st_size, found.st_mtime_ns, found.st_ino)


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """Where an array lies and what it is.

    Attributes:
        directory: The zarr array.
        chunk: The file of the first chunk, the whole array if ``raw``; or a file that has the array
            among others.
        shape: Lengths of the dimensions.
        dtype: As numpy sees it (``ml_dtypes`` for bfloat16).
        nbytes: Of the array, decoded.
        raw: The array is one chunk, uncompressed and little-endian, so that ``chunk`` holds
            exactly its bytes from ``offset`` on. If not, read it through TensorStore.
        offset: In bytes; None: ``chunk`` is the array and nothing else.
        finite: Its values are to be numbers, and have not been looked over yet.
        checksum: Of the bytes, decoded: a :class:`~storage.checksums.TensorChecksum`; None: none
            was taken.
        stamp: Of ``chunk`` when it was described; None: what is there is what is meant.
    """

    directory: Path
    chunk: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int
    raw: bool
    checksum: str | None = None
    offset: int | None = None
    finite: bool = False
    stamp: Stamp | None = dataclasses.field(default=None, compare=False)


# Of zarr's ``data_type``: numpy itself would take "O", "U9" or a structure for one.
_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    **{f"float{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"{u}int{bits}": np.dtype(f"{u}int{bits}") for u in ("", "u") for bits in (8, 16, 32, 64)},
}


def dtype_of(name: str) -> np.dtype[Any]:
    """The numpy dtype of a zarr ``data_type``, bfloat16 included.

    Raises:
        ValueError: there is no such type of numbers.
    """
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"no dtype of numbers: {name!r}; there are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def whole_numbers(values: Any, count: int | None = None) -> tuple[int, ...]:
    """A list that was read from JSON, of lengths or offsets.

    Raises:
        ValueError: it is no list of ``count`` integers (None: of any number) from 0 on.
    """
    if not isinstance(values, list) or count not in (None, len(values)):
        raise ValueError(f"expected a list of whole numbers, got {str(values)[:80]}")
    for value in values:
        if type(value) is not int or value < 0:  # a bool is none
            raise ValueError(f"expected whole numbers from 0 on, got {value!r}")
    return tuple(values)


def _chunk_path(directory: Path, rank: int) -> Path:
    return directory.joinpath("c", *["0"] * rank)


class ArrayWriter:
    """Streams an array's bytes into its one chunk, in C order. Made by :func:`create_array`."""

    def __init__(self, file: ArrayFile) -> None:
        self.file = file
        self._written = 0
        self._checksum = TensorChecksum()
        file.chunk.parent.mkdir(parents=True, exist_ok=True)
        self._chunk = open(file.chunk, "wb", buffering=0)  # noqa: SIM115 - closed by close()

    def append(self, rows: np.ndarray) -> None:
        """Writes the next elements, of any shape.

        Raises:
            StoreError: another dtype, or more elements than the array has.
            OSError: the disk did not take them.
        """
        if rows.dtype != self.file.dtype:
            raise StoreError(
                f"{self.file.chunk}: the array is {self.file.dtype}, got rows of {rows.dtype}"
            )
        if self._written + rows.nbytes > self.file.nbytes:
            raise StoreError(
                f"{self.file.chunk}: more than the {self.file.nbytes} bytes that shape "
                f"{self.file.shape} takes"
            )
        left = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        self._checksum.add(left)
        while left:  # one write call takes at most 2 GiB
            count = self._chunk.write(left)
            self._written += count
            left = left[count:]

    @property
    def checksum(self) -> str:
        """Of what was appended so far."""
        return str(self._checksum)

    def close(self) -> None:
        """Makes the bytes durable.

        Raises:
            StoreError: fewer bytes were appended than the shape takes.
        """
        if self._chunk.closed:
            return
        try:
            if self._written != self.file.nbytes:
                raise StoreError(
                    f"{self.file.chunk}: {self._written} bytes were written, shape "
                    f"{self.file.shape} takes {self.file.nbytes}"
                )
            os.fsync(self._chunk.fileno())
        finally:
            self._chunk.close()

    def abandon(self) -> None:
        """Closes without a check: the array stays incomplete."""
        self._chunk.close()

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def create_array(directory: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayWriter:
    """Begins an array at ``directory``, which must not exist yet or be empty.

    Raises:
        OSError: the directory cannot be written.
    """
    import tensorstore as ts

    dtype = np.dtype(dtype)
    directory.mkdir(parents=True, exist_ok=True)  # a plain OSError where it cannot be
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{directory}/"},
        "metadata": {
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "create": True,
    }
    try:
        ts.open(spec).result()
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(directory / METADATA_NAME)) from error
    nbytes = math.prod(shape) * dtype.itemsize
    chunk = _chunk_path(directory, len(shape))
    return ArrayWriter(ArrayFile(directory, chunk, tuple(shape), dtype, nbytes, raw=True))


def describe_array(directory: Path) -> ArrayFile:
    """Reads the metadata of the array at ``directory`` and checks the size of its one chunk.

    No data are read, so that thousands of arrays take well under a second.

    Raises:
        StoreError: missing, truncated, or no zarr 3 array.
    """
    metadata = directory / METADATA_NAME
    try:
        values = read_json(metadata)
    except OSError as error:
        raise StoreError(
            f"cannot read {metadata}: {error.strerror}; expected the metadata of a stored array: "
            "the store is damaged, remove it and convert the model again"
        ) from error
    except ValueError as error:
        raise StoreError(
            f"{metadata} is not valid JSON ({error}): the store is damaged, remove it and convert "
            "the model again"
        ) from error
    try:
        if values["zarr_format"] != 3 or values["node_type"] != "array":
            raise ValueError(f"zarr_format {values['zarr_format']}, {values['node_type']}")
        shape = whole_numbers(values["shape"])
        dtype = dtype_of(values["data_type"])
        raw = _is_raw(values, shape, dtype)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{metadata}: expected a zarr version 3 array of numbers, got something else "
            f"({error}); it was not written by flexgen-jax, convert the model again"
        ) from error
    nbytes = math.prod(shape) * dtype.itemsize
    chunk, stamp = _chunk_path(directory, len(shape)), None
    if raw:
        try:
            stamp = Stamp.of(chunk)
        except OSError as error:
            raise StoreError(
                f"cannot read {chunk}: {error.strerror}; expected {nbytes} bytes: the store is "
                "damaged, remove it and convert the model again"
            ) from error
        size = stamp.nbytes
        if size != nbytes:
            raise StoreError(
                f"{chunk} is {'truncated' if size < nbytes else 'too long'}: it has {size} bytes, "
                f"expected {nbytes} for {dtype.name} {list(shape)}; the store is damaged, "
                "remove it and convert the model again"
            )
    return ArrayFile(directory, chunk, shape, dtype, nbytes, raw, stamp=stamp)


def _is_raw(values: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether zarr metadata say: one chunk, whose file is the array's bytes as they are."""
    grid, keys, codecs = (values.get(k) for k in ("chunk_grid", "chunk_key_encoding", "codecs"))
    if not (isinstance(grid, dict) and isinstance(keys, dict) and isinstance(codecs, list)):
        return False
    one_chunk = grid.get("name") == "regular" and grid.get("configuration", {}).get(
        "chunk_shape"
    ) == list(shape)
    separator = keys.get("configuration", {}).get("separator", "/")
    plain_name = keys.get("name") == "default" and separator == "/"
    if len(codecs) != 1 or not isinstance(codecs[0], dict) or codecs[0].get("name") != "bytes":
        return False
    endian = codecs[0].get("configuration", {}).get("endian")
    little = endian == "little" or (endian is None and dtype.itemsize == 1)
    return one_chunk and plain_name and little and not values.get("storage_transformers")
