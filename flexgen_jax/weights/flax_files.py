"""Weights as JAX users keep them: Flax's msgpack files, and Orbax checkpoints of params.

Both hand out one tensor at a time: a msgpack file is mapped and its tensors found by their headers,
an Orbax checkpoint is restored leaf by leaf.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 # so that numpy knows bfloat16
import numpy as np

from flexgen_jax.weights.tensor_file import Entry, SourceError

_ARRAY = 1  # Flax's extension type: (shape, name of the dtype, bytes)
_CHUNKED = "__msgpack_chunked_array__"  # an array above a gigabyte, in pieces
_HEADER = 512  # bytes that hold the shape and dtype of any array


class MsgpackFile:
    """What ``flax.serialization.to_bytes`` writes of nested dicts; entries by dotted path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise self._damaged("it is empty")
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._chunks: dict[str, list[Entry]] = {}
        self.entries: dict[str, Entry] = {}
        try:
            end = self._walk(0, ())
        except SourceError:
            raise
        except Exception as error:  # whatever a damaged byte makes of the rest
            raise self._damaged(str(error) or type(error).__name__) from error
        if end != len(self._map):
            raise self._damaged(f"{len(self._map) - end} bytes follow its end")

    def _damaged(self, what: str) -> SourceError:
        return SourceError(
            f"{self._path} is truncated, or no Flax weights ({what}); download the model again"
        )

    def _walk(self, at: int, path: tuple[str, ...]) -> int:
        """Notes the arrays of the value at ``at``; returns where it ends."""
        size = _map_size(self._map, at)
        if size is None:
            return self._note(at, path)
        count, at = size
        for number in range(count):
            key, at = _text(self._map, at)
            if number == 0 and key == _CHUNKED:
                return self._note_chunks(at, count, path)
            at = self._walk(at, (*path, key))
        return at

    def _note(self, at: int, path: tuple[str, ...]) -> int:
        kind, begin, end = _extension(self._map, at)
        if kind != _ARRAY:
            raise ValueError(f"{'.'.join(path)} is not an array")
        if end > len(self._map):
            raise ValueError(f"it has {len(self._map)} bytes of {end} or more")
        shape, dtype, data = self._array_header(begin)
        if end - data != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{'.'.join(path)} of shape {shape} has {end - data} bytes")
        self.entries[".".join(path)] = Entry(shape, dtype, at)
        return end

    def _note_chunks(self, at: int, count: int, path: tuple[str, ...]) -> int:
        import msgpack

        # {marker: true, "shape": {"0": 3, ...}, "chunks": {"0": array, ...}}: the marker is a byte.
        name, at = ".".join(path), at + 1
        shape: tuple[int, ...] = ()
        for _ in range(count - 1):
            key, at = _text(self._map, at)
            if key == "shape":
                unpacker = msgpack.Unpacker(strict_map_key=False)
                unpacker.feed(self._map[at : at + _HEADER])
                sizes = unpacker.unpack()
                at += unpacker.tell()
                shape = tuple(sizes[str(i)] for i in range(len(sizes)))
            else:
                at = self._walk(at, (name, "chunks"))
        pieces = [k for k in self.entries if k.startswith(f"{name}.chunks.")]
        pieces.sort(key=lambda k: int(k.rpartition(".")[2]))
        taken = {k: self.entries.pop(k) for k in pieces}
        first = taken[pieces[0]]
        self.entries[name] = Entry(shape, first.dtype, first.offset)
        self._chunks[name] = list(taken.values())
        return at

    def _array_header(self, begin: int) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """Shape, dtype, and where the bytes begin, of the array whose content begins there."""
        import msgpack

        unpacker = msgpack.Unpacker()
        unpacker.feed(self._map[begin : begin + _HEADER])
        if unpacker.read_array_header() != 3:
            raise ValueError("an array without shape, dtype and bytes")
        shape, name = tuple(unpacker.unpack()), unpacker.unpack()
        data = begin + unpacker.tell()
        _, width = _BYTES[self._map[data]]
        return shape, np.dtype(name), data + 1 + width

    def array(self, key: str) -> np.ndarray:
        chunks = self._chunks.get(key)
        if chunks is None:
            return self._view(self.entries[key])
        pieces = [self._view(chunk).reshape(-1) for chunk in chunks]
        return np.concatenate(pieces).reshape(self.entries[key].shape)

    def _view(self, entry: Entry) -> np.ndarray:
        if self._map.size() < len(self._map):  # what it no longer has would end the process
            raise self._damaged(f"{self._map.size()} bytes now, and had {len(self._map)} before")
        _, begin, _ = _extension(self._map, entry.offset)
        shape, dtype, data = self._array_header(begin)
        # Not aligned as numpy likes it: a copy of one tensor is.
        raw = self._map[data : data + math.prod(shape) * dtype.itemsize]
        return np.frombuffer(raw, dtype).reshape(shape)

    def release(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)


# msgpack's headers that occur here: first byte -> (struct of the length, bytes of it).
_BYTES = {0xC4: (">B", 1), 0xC5: (">H", 2), 0xC6: (">I", 4)}
_EXTENSIONS = {0xC7: (">B", 1), 0xC8: (">H", 2), 0xC9: (">I", 4)}
_MAPS = {0xDE: (">H", 2), 0xDF: (">I", 4)}
_TEXTS = {0xD9: (">B", 1), 0xDA: (">H", 2), 0xDB: (">I", 4)}


def _length(data: mmap.mmap, at: int, form: tuple[str, int]) -> tuple[int, int]:
    """The length that follows the first byte, and what follows that."""
    (length,) = struct.unpack_from(form[0], data, at + 1)
    return length, at + 1 + form[1]


def _map_size(data: mmap.mmap, at: int) -> tuple[int, int] | None:
    first = data[at]
    if 0x80 <= first <= 0x8F:
        return first & 0x0F, at + 1
    return _length(data, at, _MAPS[first]) if first in _MAPS else None


def _text(data: mmap.mmap, at: int) -> tuple[str, int]:
    first = data[at]
    size, at = (first & 0x1F, at + 1) if 0xA0 <= first <= 0xBF else _length(data, at, _TEXTS[first])
    return data[at : at + size].decode(), at + size


def _extension(data: mmap.mmap, at: int) -> tuple[int, int, int]:
    """Its type, and where its content begins and ends."""
    first = data[at]
    if 0xD4 <= first <= 0xD8:  # of 1, 2, 4, 8 or 16 bytes
        return data[at + 1], at + 2, at + 2 + (1 << (first - 0xD4))
    if first not in _EXTENSIONS:
        raise ValueError(f"byte {at} begins neither a dict nor an array")
    size, at = _length(data, at, _EXTENSIONS[first])
    return data[at], at + 1, at + 1 + size


class OrbaxParams:
    """An Orbax checkpoint of a nested dict of arrays; entries by dotted path."""

    def __init__(self, path: Path) -> None:
        import orbax.checkpoint as ocp

        self._path, self._ocp = path, ocp
        try:
            with self._checkpointer() as checkpointer:
                tree = checkpointer.metadata(path.absolute()).item_metadata.tree
            self._leaves = dict(_leaves(tree))
            self.entries = {
                key: Entry(tuple(leaf.shape), np.dtype(leaf.dtype), number)
                for number, (key, leaf) in enumerate(self._leaves.items())
            }
        except Exception as error:  # whatever Orbax raises
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> SourceError:
        reason = str(error).partition("\n")[0]
        return SourceError(
            f"{self._path} is not a complete Orbax checkpoint of params ({reason}); save it again"
        )

    def _checkpointer(self) -> Any:
        return self._ocp.Checkpointer(self._ocp.PyTreeCheckpointHandler())

    def array(self, key: str) -> np.ndarray:
        kind: Any = self._ocp.RestoreArgs(restore_type=np.ndarray)
        item: Any = self._leaves[key]
        for part in reversed(key.split(".")):
            item, kind = {part: item}, {part: kind}
        arguments = self._ocp.args.PyTreeRestore(item=item, restore_args=kind, partial_restore=True)
        try:
            with self._checkpointer() as checkpointer:
                found = checkpointer.restore(self._path.absolute(), args=arguments)
        except Exception as error:  # whatever Orbax and TensorStore raise
            raise self._damaged(error) from error
        for part in key.split("."):
            found = found[part]
        return np.asarray(found)

    def release(self) -> None:
        pass


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield ".".join(path), tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*path, str(key)))
