"""Parquet files, read as lines of JSON: a row a line, without its nulls."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from flexgen_jax.jobs.tables import check_columns

_ROWS = 1024  # at a time


def reader(file: IO[bytes]) -> IO[bytes]:
    """What ``file`` holds, as JSON lines; no more of it than some rows is in memory.

    Raises:
        ImportError: no pyarrow; the message says how to get it.
        NotRowsError: no column can be a prompt.

    Raises on reading:
        Those of :func:`errors`.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(
            f"Parquet needs pyarrow ({error}): pip install 'flexgen-jax[ray]'"
        ) from error
    rows = ParquetFile(file)
    check_columns(rows.schema_arrow.names)
    return io.BufferedReader(_Lines(rows))


def errors(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    if path.suffix != ".parquet":
        return ()
    from pyarrow.lib import ArrowException

    return (ArrowException,)


class _Lines(io.RawIOBase):
    def __init__(self, rows: Any) -> None:
        self._lines = _lines(rows)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            line = next(self._lines, None)
            if line is None:
                return 0
            self._rest = memoryview(line)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _lines(rows: Any) -> Iterator[bytes]:
    for batch in rows.iter_batches(batch_size=_ROWS):
        for row in batch.to_pylist():
            values = {name: value for name, value in row.items() if value is not None}
            # What JSON has no word for (dates, bytes) becomes text, which no field takes.
            yield json.dumps(values, default=str).encode() + b"\n"
