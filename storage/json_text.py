"""JSON on a disk: read within bounds, wrong in one way only, and sealed where it must not change.

A sealed line is a JSON object whose last entry is a checksum of what stands before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# No config, index or manifest of a model comes near it; parsing takes some twenty times as much.
MAX_NBYTES = 32 << 20

_SEAL = b', "check": "%08x"}\n'
_SEAL_NBYTES = len(_SEAL % 0)


def parse_json(data: bytes | str) -> Any:
    """The value that ``data`` is the JSON of.

    Raises:
        ValueError: it is none, or nested deeper than anything that is meant.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, most: int = MAX_NBYTES) -> Any:
    """The value in the file ``path``, which may have ``most`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or larger.
    """
    with open(path, "rb") as file:
        # No more than there is: so much is allocated first. A pipe does not know.
        size = os.fstat(file.fileno()).st_size or most
        data = file.read(min(size, most) + 1)
    if len(data) > most:
        raise ValueError(f"more than {most} bytes")
    return parse_json(data)


def digest_of(values: Any) -> str:
    """Hexadecimal; the same for the same JSON values, however they are written."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sealed(values: Mapping[str, Any]) -> bytes:
    """``values``, which are not empty, as a line with their checksum."""
    body = json.dumps(values, allow_nan=False).encode()[:-1]
    return body + _SEAL % zlib.crc32(body)


def unsealed(line: bytes) -> dict[str, Any]:
    """The inverse of :func:`sealed`.

    Raises:
        ValueError: the line is torn, or was changed.
    """
    body = line[:-_SEAL_NBYTES]
    if line[len(body) :] != _SEAL % zlib.crc32(body):
        raise ValueError("its checksum is not that of its content")
    values: dict[str, Any] = parse_json(body + b"}")
    return values
