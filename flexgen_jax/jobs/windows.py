"""Requests in windows: so many are read, checked and grouped together, whatever comes after.

A window holds what fits in memory at ease. Its requests are sorted by length and cut into blocks,
so the grouping is a function of the input, the policy and nothing else: a job that goes on after a
kill computes the very batches that it would have computed without.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

from flexgen_jax.arguments import shown
from flexgen_jax.jobs.asked import Asked, LineError
from flexgen_jax.jobs.dialects import dump, error_record, parse_line, parse_text
from flexgen_jax.jobs.job_input import MAX_LINE, JobError, JobInput, Line
from flexgen_jax.planning.window_size import WindowSize
from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.requests.request import Request


class Task(Protocol):
    """What a line asks to be done: completing, or scoring."""

    def request(self, index: int, asked: Asked) -> Request:
        """Of the first prompt. Raises ValueError: what is wrong with it."""
        ...

    def answer(
        self, asked: Asked, requests: Sequence[Request], outputs: Sequence[RequestOutput]
    ) -> dict[str, Any]:
        """Of all the prompts of a line."""
        ...

    def at(self, begun: int) -> Self:
        """The same task, of a job that was begun then: in seconds since 1970."""
        ...

    def identity(self) -> dict[str, Any]:
        """What its answers depend on, beside model, policy and input."""
        ...


@dataclasses.dataclass
class Window:
    """Lines of the input, checked: ``asked[i]`` is what ``requests[i]`` is of.

    A line with several prompts has a request for each.

    Attributes:
        number: Counts windows from 0.
        errors: Line -> what is wrong with it.
        last_line: The number of its last line; ``digest``: of the input up to its end.
    """

    number: int
    asked: list[Asked]
    requests: list[Request]
    errors: dict[int, LineError]
    last_line: int = 0
    digest: str = ""

    def error_records(self) -> dict[int, bytes]:
        return {line: dump(error_record(line, error)) for line, error in self.errors.items()}


class Windows:
    """Reads a job's input window by window.

    Args:
        number, index: How many windows and requests came before.
    """

    def __init__(
        self, source: JobInput, task: Task, size: WindowSize, *, number: int = 0, index: int = 0
    ) -> None:
        self._source, self._task, self._size = source, task, size
        self._number, self._index = number, index
        self._ids = _Ids()
        self._lines = source.lines()

    def skip(self, last_line: int, digest: str) -> None:
        """Passes over what an earlier process has finished.

        Raises:
            JobError: it is not what lies there now.
        """
        number = 0
        while number < last_line:
            line = next(self._lines, None)
            if line is None:
                break
            number = line.number
            self._asked(line)
        self.expect(number, self._source.digest, last_line, digest)

    def expect(self, line: int, digest: str, last_line: int, digest_then: str) -> None:
        """Refuses to mix results of two inputs."""
        if last_line and (line, digest) != (last_line, digest_then):
            raise JobError(
                f"{self._source.path} is not the input that the job was started with: its first "
                f"{last_line} lines are others; give that one, or start over with --restart"
            )

    def close(self) -> None:
        self._ids.close()

    def __enter__(self) -> Windows:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Window]:
        while (window := self._next()) is not None:
            yield window

    def _next(self) -> Window | None:
        window = Window(self._number, [], [], {})
        nbytes = lines = more = 0
        while not self._size.reached(len(window.requests), nbytes, lines, more=more):
            line = next(self._lines, None)
            if line is None:
                break
            lines += 1
            window.last_line, window.digest = line.number, self._source.digest
            found = self._checked(line, self._index + len(window.requests))
            if isinstance(found, LineError):
                window.errors[line.number] = found
            else:
                nbytes += len(line.raw or b"")
                asked, requests = found
                window.asked += [asked] * len(requests)
                window.requests += requests
                more += sum(request.params.n - 1 for request in requests)
        self._number += 1
        self._index += len(window.requests)
        return window if lines else None

    def _asked(self, line: Line) -> Asked | LineError:
        """What a line asks. Whoever gets an answer or an error under an id has used it."""
        try:
            if line.raw is None:
                raise LineError("invalid_request", f"the line is longer than {MAX_LINE} bytes")
            asked = (parse_text if self._source.is_text else parse_line)(line.raw, line.number)
        except LineError as error:
            self._ids.use(line.number if error.id is None else error.id, line.number)
            return error
        used = self._ids.use(asked.id, line.number)
        if used is None:
            return asked
        implicit = " (a line without an id has its number)" if asked.id == line.number else ""
        message = f"id {shown(asked.id)} was used on line {used}{implicit}"
        return LineError("invalid_request", message, asked.id, asked.openai)

    def _checked(self, line: Line, index: int) -> tuple[Asked, list[Request]] | LineError:
        asked = self._asked(line)
        if isinstance(asked, LineError):
            return asked
        try:
            places = range(len(asked.prompts))
            return asked, [self._task.request(index + n, asked.alone(n)) for n in places]
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            kind = getattr(error, "kind", "invalid_request")
            return LineError(kind, str(error), asked.id, asked.openai)


class _Ids:
    """Which ids were used, and where: on disk, should there be many."""

    def __init__(self) -> None:
        # A file that nobody else sees. Whoever needs the next window reads it, one at a time.
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE used (id BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID")

    def use(self, used_id: Any, line: int) -> int | None:
        """Marks ``used_id``; the line that used it before, if any."""
        if isinstance(used_id, float) and used_id.is_integer():
            used_id = int(used_id)
        text = json.dumps(used_id, ensure_ascii=True).encode()
        key = hashlib.blake2b(text, digest_size=16).digest()
        done = self._db.execute("INSERT OR IGNORE INTO used VALUES (?, ?)", (key, line))
        if done.rowcount:
            return None
        (first,) = self._db.execute("SELECT line FROM used WHERE id = ?", (key,)).fetchone()
        return first

    def close(self) -> None:
        self._db.close()
