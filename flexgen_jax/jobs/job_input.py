"""The lines of a job's input, one after another: of a file, or of the standard input."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from flexgen_jax.jobs import compressed, parquet, tables

STANDARD = Path("-")  # the standard input, or output
MAX_LINE = 16 * 2**20  # bytes; a longer one is no request
_PIECE = 2**20


class JobError(ValueError):
    """An input or output file that cannot be used; the message says which and why."""


class Line(NamedTuple):
    """A line of the input; ``raw`` is None if it is longer than ``MAX_LINE`` bytes."""

    number: int
    raw: bytes | None


class JobInput:
    """The input of a job. A context manager; :meth:`lines` reads it once, from begin to end.

    Args:
        path: A file of JSON lines, or (``.txt``) of prompts, a line each; ``.gz`` and ``.zst`` are
            uncompressed on the way. ``.parquet``: of rows, each read as the JSON line of what it
            has, like ``.csv`` and ``.tsv`` with a header. ``.json``: also a list of what lines
            have. ``-``: JSON lines from the standard input. A pipe by its name is one, too.

    Attributes:
        is_stream: It can be read once, and nobody knows how much there is.

    Raises:
        JobError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_text = compressed.plain_suffix(path) == ".txt"
        self._ended = False
        self._digest = hashlib.blake2b(digest_size=16)
        self._file: IO[bytes] | None = None
        self.nbytes: int | None = None
        self.is_stream = path == STANDARD
        if path == STANDARD:
            return
        try:
            self._file = path.open("rb")
            status = os.fstat(self._file.fileno())
        except OSError as error:
            raise JobError(f"cannot read {path}: {error.strerror}") from error
        self.is_stream = not stat.S_ISREG(status.st_mode)
        try:
            self._check_form(status.st_size)
        except JobError:
            self._file.close()
            raise
        if not self.is_stream:
            self.nbytes = status.st_size
            self._changed = status.st_mtime_ns

    def _check_form(self, nbytes: int) -> None:
        """What would come out after the model is loaded comes out now."""
        if self.is_stream and self.path.suffix == ".parquet":
            raise JobError(
                f"cannot read {self.path}: Parquet is read from its end, which a pipe does not "
                "have; write it to a file"
            )
        if not (self.is_stream or nbytes) and self.path.suffix in compressed.ENDS:
            raise JobError(f"cannot read {self.path}: damaged, it is empty")

    def identity(self) -> dict[str, Any]:
        """What tells this input from another one: reads all of a file, and nothing of a pipe."""
        if self._file is None or self.is_stream:
            return {"file": "-"}
        with self._errors():
            digest = hashlib.blake2b(digest_size=16)
            while piece := self._file.read(_PIECE):
                digest.update(piece)
            self._file.seek(0)
        return {"bytes": self.nbytes, "digest": digest.hexdigest()}

    def check_rows(self) -> None:
        """Refuses a file none of whose rows can be a request; leaves a stream unread.

        Raises:
            JobError: such as a table without a column of prompts.
        """
        if self.is_stream:
            return
        with JobInput(self.path) as again:
            try:
                next(again.lines(), None)
            except JobError as error:
                if isinstance(error.__cause__, tables.NotRowsError):
                    raise

    @property
    def digest(self) -> str:
        """Hexadecimal, of the lines read so far."""
        return self._digest.hexdigest()

    @property
    def share_read(self) -> float | None:
        """How much of it has been read, in [0, 1]; None: nobody knows."""
        if self._ended:
            return 1.0
        if self._file is None or not self.nbytes:
            return None
        return min(1.0, self._file.tell() / self.nbytes)

    def lines(self) -> Iterator[Line]:
        """Every line that is not blank.

        Raises:
            JobError: the file cannot be read, is damaged, or changed in the meantime.
        """
        file = sys.stdin.buffer if self._file is None else self._file
        with self._errors():
            if self.path.suffix == ".parquet":
                file = parquet.reader(file)
            else:
                file = compressed.reader(file, self.path)
        rows = self._rows(file)
        while True:
            with self._errors():
                row = next(rows, None)
            if row is None:
                break
            yield row
        self._ended = True
        if self._file is None or self.is_stream:
            return
        if os.fstat(self._file.fileno()).st_mtime_ns != self._changed:
            raise JobError(f"{self.path} was changed while it was read: run the job again")

    def _rows(self, file: IO[bytes]) -> Iterator[Line]:
        delimiter = tables.TABLES.get(compressed.plain_suffix(self.path))
        beginning = b""
        if delimiter is None and self._file is not None and not self.is_text:
            beginning = file.peek(1)[:64] if hasattr(file, "peek") else b""
            tables.check_text(beginning)
        if delimiter is not None or tables.is_array(self.path, beginning):
            rows = tables.array_items(file)
            if delimiter is not None:
                rows = tables.table_rows(file, delimiter)
            for number, raw in rows:
                self._digest.update(raw)
                yield Line(number, raw if len(raw) <= MAX_LINE else None)
            return
        number = 0
        while True:
            raw_line, nbytes = self._line(file)
            if not nbytes:
                break
            number += 1
            if raw_line is None or raw_line.strip():
                yield Line(number, raw_line)

    def _line(self, file: IO[bytes]) -> tuple[bytes | None, int]:
        """The next line and its bytes, which of a huge one are counted, not kept."""
        raw = file.readline(MAX_LINE + 1)
        self._digest.update(raw)
        if len(raw) <= MAX_LINE:
            return raw, len(raw)
        nbytes, piece = len(raw), raw
        del raw
        while piece and not piece.endswith(b"\n"):
            piece = file.readline(_PIECE)
            self._digest.update(piece)
            nbytes += len(piece)
        return None, nbytes

    def _errors(self) -> _ReadErrors:
        return _ReadErrors(self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> JobInput:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ReadErrors:
    """Turns what reading raises into a :class:`JobError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, tables.NotRowsError):
            raise JobError(f"cannot read {self._path}: {error}") from error
        if isinstance(error, ImportError):
            raise JobError(f"cannot read {self._path}: {error}") from error
        if isinstance(error, OSError) and error.strerror:
            raise JobError(f"cannot read {self._path}: {error.strerror}") from error
        damaged = (*compressed.errors(self._path), *parquet.errors(self._path))
        if isinstance(error, (OSError, *damaged)):
            raise JobError(f"cannot read {self._path}: damaged, {error}") from error
