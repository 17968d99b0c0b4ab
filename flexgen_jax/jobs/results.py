"""What a job has finished: on disk before it counts, and in the order of the input in the end.

``OUT.partial`` is the journal: what job it is, how far the finished windows reach, and of those
that were begun the records as they finish. ``OUT.ordered`` grows by whole windows, in order, and
takes the name ``OUT`` when the job is done; the journal, then short, becomes ``OUT.job``, by which
a finished output is known again. ``OUT.checkpoint`` may hold the state of the block that was
running. No output is replaced that is another job's, or nobody's, unless that is asked for. Each
step leaves files from which the next process goes on, wherever it is killed; what somebody else
has put there is refused, or kept aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import sys
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from logging import WARNING
from pathlib import Path
from typing import IO, Any, Protocol

from flexgen_jax.engine import snapshots
from flexgen_jax.jobs.beside import MARK, Beside, check_regular, in_the_way
from flexgen_jax.jobs.compressed import Packer
from flexgen_jax.jobs.job_input import STANDARD, JobError
from flexgen_jax.logs import event
from storage.array_file import whole_numbers
from storage.checksums import checksum_between
from storage.json_text import parse_json, sealed, unsealed

_FORMAT = 3  # 1 had no checksums; 2 had one window at a time
_LONGEST = 64 << 20  # bytes of what job it is


@dataclasses.dataclass(frozen=True)
class Position:
    """How far the finished windows reach.

    Attributes:
        windows: How many they are. ``line``, ``digest``: of the input, up to their end.
        requests: Of them, those that were run. ``errors``: the others; ``messages``: of the first.
        nbytes: Of the output; ``checksum``: of so many bytes of it.
        sums: Of the reports of their blocks.
    """

    windows: int = 0
    line: int = 0
    digest: str = ""
    requests: int = 0
    errors: int = 0
    messages: tuple[str, ...] = ()
    nbytes: int = 0
    checksum: int = 0
    sums: Mapping[str, Any] | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Position:
        """The inverse of ``dataclasses.asdict``, through JSON.

        Raises:
            KeyError, TypeError, ValueError: it is no position.
        """
        found = cls(**{**values, "messages": tuple(map(str, values["messages"]))})
        counts = [found.windows, found.line, found.requests, found.errors]
        whole_numbers([*counts, found.nbytes, found.checksum])
        if not isinstance(found.sums, (dict, type(None))) or not isinstance(found.digest, str):
            raise ValueError("a position without sums or digest")
        return found


@dataclasses.dataclass(frozen=True)
class Begun:
    """A window that was begun, and its lines' end."""

    number: int
    last_line: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Plain."""
        return {"window": self.number, "last_line": self.last_line, "digest": self.digest}


class Results(Protocol):
    """Where the records of a job go. A context manager: entering proves that it can be written.

    Attributes:
        begun: The windows that were begun and not ended, in order.
        unsummed: Of the reports of what is finished of them; the position knows of the others.
    """

    position: Position
    begun: list[Begun]
    unsummed: list[Mapping[str, Any]]
    header: Mapping[str, Any] | None
    done: bool
    finished: bool  # all is there, from an earlier process
    snapshots: Path | None  # where the state of a running block may be kept

    @property
    def requests_finished(self) -> int:
        """How many requests are safe."""
        ...

    def begin(self, header: Mapping[str, Any]) -> None:
        """A new job. ``header`` says which."""

    def begin_window(self, number: int, last_line: int, digest: str) -> None: ...

    def has(self, line: int) -> bool:
        """Whether there is a record of a line of a window that was begun."""
        ...

    def add_part(self, records: Mapping[int, bytes], sums: Mapping[str, Any]) -> None:
        """Keeps records (line -> record) of windows that were begun, durably."""

    def end_window(self, errors: Mapping[int, bytes], position: Position) -> None:
        """Puts the records of the first of the begun windows in order.

        Args:
            errors: Those of its bad lines.
            position: With the sums of all that is finished, of the other windows, too.
        """

    def finish(self) -> None: ...

    def __enter__(self) -> Results: ...

    def __exit__(self, *_: object) -> None: ...


def results(path: Path, *, restart: bool = False, force: bool = False) -> Results:
    """Results in the file ``path``, or for ``-`` on the standard output."""
    return StreamResults() if path == STANDARD else FileResults(path, restart=restart, force=force)


class _Spool:
    """Records in a file, found again by their line."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[int, int]] = {}

    def add(self, lines: Iterable[int], sizes: Iterable[int], offset: int) -> None:
        """Records of ``lines`` lie one after another from ``offset`` on."""
        for line, size in zip(lines, sizes, strict=True):
            self._places[line] = offset, size
            offset += size

    def __contains__(self, line: int) -> bool:
        return line in self._places

    def __len__(self) -> int:
        return len(self._places)

    def write_ordered(
        self, file: IO[bytes], errors: Mapping[int, bytes], last_line: int, out: IO[bytes]
    ) -> None:
        """Writes the records up to ``last_line``, which are here no more."""
        for line in sorted({*(n for n in self._places if n <= last_line), *errors}):
            if line in errors:
                out.write(errors[line])
            else:
                out.write(self._read(file, line))

    def _read(self, file: IO[bytes], line: int) -> bytes:
        offset, size = self._places[line]
        file.seek(offset)
        return file.read(size)

    def after(self, file: IO[bytes], last_line: int) -> dict[int, bytes]:
        """The records of later lines."""
        return {n: self._read(file, n) for n in self._places if n > last_line}


def _part(records: Mapping[int, bytes], sums: Mapping[str, Any] | None) -> tuple[bytes, bytes]:
    """An entry of the journal, and what follows it; ``sums``: None: the position has them."""
    payload = b"".join(records.values())
    entry = {
        "lines": list(records),
        "sizes": list(map(len, records.values())),
        "crc32": zlib.crc32(payload),
        "sums": sums,
    }
    return sealed(entry), payload


class FileResults:
    """Results in a file. Only one job at a time may have the same.

    Args:
        restart: Start over, whatever an earlier process has finished.
        force: Replace the output even if no job has written it, or it was changed afterwards.

    Raises:
        JobError: the output cannot be written, or must not be replaced; another job is writing it;
            or what an earlier one left is damaged.
    """

    def __init__(self, path: Path, *, restart: bool = False, force: bool = False) -> None:
        self._beside = beside = Beside(path)
        self.path, self.partial, self.ordered = beside.output, beside.partial, beside.ordered
        self.snapshots: Path | None = beside.snapshots
        self.position = Position()
        self.begun: list[Begun] = []
        self.unsummed: list[Mapping[str, Any]] = []
        self.header: Mapping[str, Any] | None = None
        self.done = self.finished = False
        self._restart, self._force = restart, force
        self._foreign = self._ordering = False
        self._packer = Packer(self.path)
        self._out: IO[bytes] | None = None  # holds the lock
        self._journal: IO[bytes] | None = None
        self._spool = _Spool()

    def __enter__(self) -> FileResults:
        if self.path.is_dir():
            raise JobError(f"cannot write {self.path}: it is a directory")
        if self.path.exists() and not self.path.is_file():
            raise JobError(f"cannot write {self.path}: it is not a regular file")
        check_regular(self.ordered)
        with self._errors(self.path):
            self._out = self._locked()
        try:
            self._beside.check_files()
            self._foreign = not self._beside.has_journal()
            if self._foreign:
                self._refuse_ordered()
            elif not self._restart:
                self._read()
            if self.header is None:
                self._look_at_output()
        except BaseException:
            self._close()
            raise
        return self

    def _refuse_ordered(self) -> None:
        """No job has begun to write there: if it has bytes, they are somebody else's."""
        assert self._out is not None
        if os.fstat(self._out.fileno()).st_size:
            raise in_the_way(self.ordered, "it has content, and no unfinished job has written it")

    def _close(self) -> None:
        """Leaves no empty file that would only have held the lock."""
        with contextlib.suppress(OSError):
            assert self._out is not None
            status = os.fstat(self._out.fileno())
            if not status.st_size and os.path.samestat(status, self.ordered.stat()):
                self.ordered.unlink()
        for file in (self._journal, self._out):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()

    def _locked(self) -> IO[bytes]:
        while True:
            file = self.ordered.open("ab+")
            try:
                _lock(file)
                if self.path.exists():  # a job that has just finished has its lock there
                    with self.path.open("rb") as output:
                        _lock(output)
            except BlockingIOError:
                file.close()
                raise JobError(f"cannot write {self.path}: another job is writing it") from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.ordered.stat()):
                    return file
            file.close()

    def _read(self) -> None:
        try:
            self._journal = self.partial.open("r+b")
        except OSError as error:
            raise JobError(f"cannot read {self.partial}: {error.strerror}") from error
        header = self._read_header(self._journal)
        self._read_entries(self._journal)
        if not (self.position.nbytes or self._ordering):
            self._refuse_ordered()
        if not self._worth_keeping():
            return  # as if it had never begun
        self.header = header
        assert self._out is not None
        if self.done and self.position.nbytes and not os.fstat(self._out.fileno()).st_size:
            if not self.path.exists():
                raise JobError(f"{self.ordered} is gone; start over with --restart")
            with self._errors(self.path), self.path.open("rb") as output:
                self._check_output(self.path, output)  # it has its name already
        else:
            self._check_output(self.ordered, self._out)
            self._check_replaceable()

    def _look_at_output(self) -> None:
        """Before a job begins: what has the output's name is finished, or is replaced, or not."""
        found = self._finished_job()
        if found is not None and not (self._restart or self._force):
            self.header, self.position = found
            self.done = self.finished = True
        elif found is None and not self._force and _stamp(self.path) is not None:
            raise JobError(
                f"{self.path} exists, and is not what a job has written there; give another "
                "output, or --force to replace it"
            )

    def _finished_job(self) -> tuple[dict[str, Any], Position] | None:
        """What job the output is the whole result of, if of one."""
        try:
            with self._beside.finished.open("rb") as file, self.path.open("rb") as output:
                header, position, done = self._parsed_header(file)
                same = done and os.fstat(output.fileno()).st_size == position.nbytes
                if same and checksum_between(output, 0, position.nbytes) == position.checksum:
                    return header, position
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            pass  # somebody else's, as far as one can tell
        return None

    def _check_replaceable(self) -> None:
        """Refuses to replace what was not there when the job began."""
        assert self.header is not None
        there = _stamp(self.path)
        if there is not None and there != self.header.get("replaces") and not self._force:
            raise JobError(
                f"{self.path} appeared or was changed after this job was started; move it away, "
                "or give --force to replace it"
            )

    def _check_output(self, path: Path, file: IO[bytes]) -> None:
        """Refuses an output that is not what the journal says was written."""
        size, known = os.fstat(file.fileno()).st_size, self.position
        if size < known.nbytes:
            raise JobError(
                f"{path} is damaged: it has {size} bytes of {known.nbytes}; start over with "
                "--restart"
            )
        with self._errors(path):
            if checksum_between(file, 0, known.nbytes) != known.checksum:
                raise JobError(
                    f"{path} is damaged: the first {known.nbytes} bytes are not those that were "
                    "written; start over with --restart"
                )

    def _read_header(self, journal: IO[bytes]) -> dict[str, Any]:
        """What job it is, and its position: written at one stroke, they are never torn."""
        try:
            header, self.position, self.done = self._parsed_header(journal)
        except JobError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise JobError(
                f"{self.partial} is damaged: {error}; start over with --restart"
            ) from error
        return header

    def _parsed_header(self, journal: IO[bytes]) -> tuple[dict[str, Any], Position, bool]:
        """Likewise, and whether that is all of it.

        Raises:
            JobError: of another version.
            AttributeError, KeyError, TypeError, ValueError: damaged.
        """
        line, following = journal.readline(_LONGEST), journal.readline(_LONGEST)
        try:
            of_this_version = parse_json(line)[MARK] == _FORMAT
        except (ValueError, KeyError):
            of_this_version = True  # as far as can be said
        if not of_this_version:
            raise JobError(
                f"{self.partial} is of another version of flexgen-jax: finish the job with that "
                "one, or start over with --restart"
            )
        header, first = unsealed(line), unsealed(following)
        if not all(isinstance(part, dict) for part in header["identity"].values()):
            raise ValueError("an identity of no parts")
        return header, Position.from_json(first["position"]), bool(first["done"])

    def _read_entries(self, journal: IO[bytes]) -> None:
        """Reads up to the first entry that is torn, and drops it with what follows."""
        good = journal.tell()
        # A power cut may leave anything; what is not an entry was not finished.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            while self._take(unsealed(journal.readline()), journal):
                good = journal.tell()
        journal.truncate(good)
        journal.seek(good)

    def _take(self, entry: dict[str, Any], journal: IO[bytes]) -> bool:
        if "window" in entry:
            number, last_line = whole_numbers([entry["window"], entry["last_line"]])
            self.begun.append(Begun(number, last_line, entry["digest"]))
        elif "lines" in entry and self.begun:
            if entry["sums"] is not None:
                whole_numbers([entry["sums"]["requests"]])
            lines, sizes = whole_numbers(entry["lines"]), whole_numbers(entry["sizes"])
            offset = journal.tell()
            if offset + sum(sizes) > os.fstat(journal.fileno()).st_size:
                return False
            if zlib.crc32(journal.read(sum(sizes))) != entry["crc32"]:
                return False
            self._spool.add(lines, sizes, offset)
            if entry["sums"] is not None:
                self.unsummed.append(entry["sums"])
        elif "ordering" in entry:
            self._ordering = True
        else:
            return False
        return True

    @property
    def requests_finished(self) -> int:
        return self.position.requests + len(self._spool)

    def has(self, line: int) -> bool:
        return line in self._spool

    def _drop_snapshots(self) -> None:
        assert self.snapshots is not None
        snapshots.remove(self.snapshots)

    def _worth_keeping(self) -> bool:
        finished = self.requests_finished or self.position.line or self.done
        assert self.snapshots is not None
        return bool(finished) or snapshots.are_kept_in(self.snapshots)

    def begin(self, header: Mapping[str, Any]) -> None:
        self.header = {MARK: _FORMAT, **header, "replaces": _stamp(self.path)}
        assert self._out is not None
        with self._errors(self.partial):
            if self._foreign and self.partial.exists():  # nobody knows what it is
                aside = self._beside.keep_aside()
                event("kept aside", level=WARNING, path=str(self.partial), to=aside.name)
            self._foreign = False
            self._out.truncate(0)
            self._drop_snapshots()
            self._replace_journal()

    def _replace_journal(self) -> None:
        """Begins the journal with how far the windows reach, at one stroke."""
        assert self.header is not None
        position = {"position": dataclasses.asdict(self.position), "done": self.done}
        later: dict[int, bytes] = {}
        if self._journal is not None and self.begun:
            later = self._spool.after(self._journal, self.position.line)
        spool = _Spool()
        with self._beside.new.open("wb") as file:
            file.write(sealed(self.header) + sealed(position))
            file.writelines(sealed(begun.to_json()) for begun in self.begun)
            if later:
                entry, payload = _part(later, None)
                file.write(entry)
                spool.add(later, map(len, later.values()), file.tell())
                file.write(payload)
            _sync(file)
        os.replace(self._beside.new, self.partial)
        _sync_directory(self.path.parent)
        if self._journal is not None:
            self._journal.close()
        self._journal = self.partial.open("r+b")
        self._journal.seek(0, os.SEEK_END)
        self._spool, self._ordering = spool, False

    def begin_window(self, number: int, last_line: int, digest: str) -> None:
        begun = Begun(number, last_line, digest)
        self._append(sealed(begun.to_json()))
        self.begun.append(begun)

    def _append(self, data: bytes) -> int:
        """Writes an entry durably; returns where it ends."""
        assert self._journal is not None
        with self._errors(self.partial):
            self._journal.seek(0, os.SEEK_END)
            self._journal.write(data)
            _sync(self._journal)
            return self._journal.tell()

    def add_part(self, records: Mapping[int, bytes], sums: Mapping[str, Any]) -> None:
        entry, payload = _part(records, sums)
        end = self._append(entry + payload)
        self._spool.add(records, map(len, records.values()), end - len(payload))
        self.unsummed.append(sums)

    def end_window(self, errors: Mapping[int, bytes], position: Position) -> None:
        assert self._out is not None
        assert self._journal is not None
        self._begin_ordering()
        with self._errors(self.ordered):
            with self._packer.member(self._out) as member:
                self._spool.write_ordered(self._journal, errors, position.line, member)
            _sync(self._out)
            self.position = self._with_output(position)
        del self.begun[0]
        self.unsummed = []
        with self._errors(self.partial):
            self._replace_journal()

    def _with_output(self, position: Position) -> Position:
        """``position`` with all of the output, of which :attr:`position` knows the beginning."""
        assert self._out is not None
        before, nbytes = self.position, os.fstat(self._out.fileno()).st_size
        checksum = checksum_between(self._out, before.nbytes, nbytes, before.checksum)
        return dataclasses.replace(position, nbytes=nbytes, checksum=checksum)

    def _begin_ordering(self) -> None:
        """What counts is what the journal knows of; but from now on all that is there is ours."""
        assert self._out is not None
        if not self.position.nbytes:
            self._append(sealed({"ordering": True}))
        with self._errors(self.ordered):
            self._out.truncate(self.position.nbytes)

    def finish(self) -> None:
        assert self._out is not None
        if self.finished:
            return
        with self._errors(self.path):
            if not self.done:
                if not self.position.nbytes:
                    self._begin_ordering()
                    with self._packer.member(self._out):
                        pass  # nothing, in the form of the file
                    _sync(self._out)
                    self.position = self._with_output(self.position)
                self.done = True
                self._replace_journal()
            if os.fstat(self._out.fileno()).st_size or not self.position.nbytes:
                self._check_replaceable()
                os.replace(self.ordered, self.path)
                _sync_directory(self.path.parent)
            else:
                self.ordered.unlink()
            os.replace(self.partial, self._beside.finished)
            self._drop_snapshots()
        self.header = None
        records = self.position.requests + self.position.errors
        event("results written", path=str(self.path), records=records)

    def _errors(self, path: Path) -> _WriteErrors:
        return _WriteErrors(path)

    def __exit__(self, *_: object) -> None:
        # What could not be written is not tried again: it was said already.
        with contextlib.suppress(OSError):
            if self.header is not None and not self._worth_keeping():
                self.partial.unlink()
        self._close()


class StreamResults:
    """Results on the standard output, window by window; nothing to go on from."""

    def __init__(self) -> None:
        self.position = Position()
        self.begun: list[Begun] = []
        self.unsummed: list[Mapping[str, Any]] = []
        self.header: Mapping[str, Any] | None = None
        self.done = self.finished = False
        self.snapshots: Path | None = None
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 # closed on exit
        self._spool = _Spool()
        self._written = _Flushed()

    def __enter__(self) -> StreamResults:
        return self

    @property
    def requests_finished(self) -> int:
        return self._written.count  # lines with an error included

    def has(self, line: int) -> bool:
        return False

    def begin(self, header: Mapping[str, Any]) -> None:
        self.header = header

    def begin_window(self, number: int, last_line: int, digest: str) -> None:
        self.begun.append(Begun(number, last_line, digest))

    def add_part(self, records: Mapping[int, bytes], sums: Mapping[str, Any]) -> None:
        with _WriteErrors(Path(tempfile.gettempdir())):
            offset = self._file.seek(0, os.SEEK_END)
            self._file.writelines(records.values())
            self._file.flush()
        self._spool.add(records, map(len, records.values()), offset)

    def end_window(self, errors: Mapping[int, bytes], position: Position) -> None:
        try:
            with _WriteErrors(STANDARD):
                out: Any = self._written
                self._spool.write_ordered(self._file, errors, position.line, out)
        except JobError:
            # What is left in the buffer would be tried again, and said again, on the way out.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise
        later = self._spool.after(self._file, position.line)
        self._spool = _Spool()
        self._file.seek(0)
        self._file.truncate(0)
        self.position = position
        del self.begun[0]
        if later:
            self.add_part(later, {})

    def finish(self) -> None:
        self.done = True

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Flushed:
    """The standard output, a record at a time, so that one knows how many were written."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, record: bytes) -> None:
        sys.stdout.buffer.write(record)
        sys.stdout.flush()
        self.count += 1


class _WriteErrors:
    """Turns what writing raises into a :class:`JobError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, (OSError, ImportError)):
            why = getattr(error, "strerror", None) or error
            where = "the standard output" if self._path == STANDARD else self._path
            raise JobError(f"cannot write {where}: {why}") from error


def _stamp(path: Path) -> list[int] | None:
    """Tells a file from what comes to lie there later; None: nothing there could be lost."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino] if status.st_size else None


def _lock(file: IO[bytes]) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
