"""What goes over the wire: a text of JSON and the bytes of arrays. Reading it runs no code.

A frame is a mark, the lengths of the two parts, a checksum of both, and they themselves. Knows
nothing of what is said.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from storage.json_text import parse_json

_MARK = b"flexgen1"
_HEAD = struct.Struct("<8sIQQ")  # mark, checksum, bytes of the text, bytes of the arrays
_DTYPES = {"int32", "float32"}
HEAD_NBYTES = _HEAD.size


class MessageError(ValueError):
    """What came is no message, or not one that was expected."""


def frame(kind: str, content: Any, arrays: Sequence[np.ndarray] = ()) -> bytes:
    """A message: what kind it is, plain JSON, and arrays of int32 or float32."""
    shapes = [[array.dtype.name, list(array.shape)] for array in arrays]
    text = json.dumps([kind, shapes, content], allow_nan=False).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    check = zlib.crc32(data, zlib.crc32(text))
    return _HEAD.pack(_MARK, check, len(text), len(data)) + text + data


def unframed(came: bytes) -> tuple[str, Any, list[np.ndarray]]:
    """The inverse of :func:`frame`; what follows a frame is not looked at.

    Raises:
        MessageError: it is none; the message says what came instead.
    """
    if len(came) < _HEAD.size or not came.startswith(_MARK):
        raise MessageError(
            f"expected a message of flexgen-jax, got {len(came)} bytes that begin with "
            f"{bytes(came[:16])!r}"
        )
    _, check, text_nbytes, nbytes = _HEAD.unpack_from(came)
    end = _HEAD.size + text_nbytes + nbytes
    if end > len(came):
        raise MessageError(f"expected a message of {end} bytes, got {len(came)}")
    body = memoryview(came)[_HEAD.size : end]
    if zlib.crc32(body) != check:
        raise MessageError("a message came damaged: its checksum is not that of its content")
    try:
        kind, shapes, content = parse_json(bytes(body[:text_nbytes]))
        if not isinstance(kind, str):
            raise ValueError("a kind that is not text")
        return kind, content, _arrays(shapes, body[text_nbytes:])
    except (ValueError, TypeError) as error:
        raise MessageError(f"a message that cannot be read came: {error}") from error


def _arrays(shapes: Any, data: memoryview) -> list[np.ndarray]:
    found, offset = [], 0
    for dtype, shape in shapes:
        sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if dtype not in _DTYPES or not sizes:
            raise ValueError(f"an array of {reprlib.repr(dtype)} {reprlib.repr(shape)}")
        nbytes = 4 * math.prod(shape)
        if offset + nbytes > len(data):
            raise ValueError("arrays with more elements than came")
        found.append(np.frombuffer(data[offset : offset + nbytes], dtype).reshape(shape))
        offset += nbytes
    if offset != len(data):
        raise ValueError("more bytes than the arrays have")
    return found
