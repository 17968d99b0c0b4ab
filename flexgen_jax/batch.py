"""A job: a file of requests in, a file of results out.

A bad line becomes one error record; the others run. Results are kept in ``OUT.partial`` as their
blocks finish, and take their final name, in input order, when the job is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from logging import WARNING
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flexgen_jax.dialects import Asked, LineError, answer, error_record, parse_line
from flexgen_jax.logs import event
from flexgen_jax.outputs import RequestOutput
from flexgen_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from flexgen_jax.blocks import Request
    from flexgen_jax.llm import LLM


class JobError(ValueError):
    """An input or output file that cannot be used; the message says which and why."""


@dataclasses.dataclass
class Job:
    """The lines of an input file, checked: ``asked[i]`` is what ``requests[i]`` answers."""

    asked: list[Asked]
    requests: list[Request]
    errors: dict[int, dict[str, Any]]  # line number -> record

    @property
    def max_new_tokens(self) -> int:
        """The most tokens that the job can generate."""
        return sum(r.params.max_tokens for r in self.requests)


def read_job(llm: LLM, path: Path, defaults: SamplingParams) -> Job:
    """Reads and checks every line of ``path``. Blank lines are passed over.

    Raises:
        JobError: the file cannot be read.
    """
    job = Job([], [], {})
    seen: dict[Any, int] = {}
    for line, raw in input_lines(path):
        try:
            asked = parse_line(raw, line)
            try:
                if asked.id in seen:
                    raise LineError(
                        "invalid_request", f"id {asked.id!r} was used on line {seen[asked.id]}"
                    )
                params = defaults.updated(asked.sampling)
                request = llm.request(len(job.requests), asked.prompt, params)
            except ValueError as error:
                kind = getattr(error, "kind", "invalid_request")
                raise LineError(kind, str(error), asked.id, asked.openai) from error
        except LineError as error:
            job.errors[line] = error_record(line, error)
        else:
            seen[asked.id] = line
            job.asked.append(asked)
            job.requests.append(request)
    return job


def input_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank.

    Raises:
        JobError: the file cannot be read.
    """
    try:
        with path.open("rb") as f:
            for number, raw in enumerate(f, 1):
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise JobError(f"cannot read {path}: {error.strerror}") from error


class Results:
    """Collects the records of a job. A context manager: entering proves ``path`` writable.

    What an earlier job left in ``OUT.partial`` is moved to ``OUT.partial.old`` when there is
    something to write, and not before.

    Raises:
        JobError: the output cannot be written, or another job is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # a link stays one
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._records: dict[int, dict[str, Any]] = {}
        self._file: IO[str] | None = None
        self._earlier = False

    def __enter__(self) -> Results:
        if self.path.is_dir():
            raise JobError(f"cannot write {self.path}: it is a directory")
        if self.path.exists() and not self.path.is_file():
            raise JobError(f"cannot write {self.path}: it is not a regular file")
        self._file = self._opened()
        self._earlier = os.fstat(self._file.fileno()).st_size > 0
        return self

    def _opened(self) -> IO[str]:
        try:
            file = self.partial.open("a", encoding="utf-8")
        except OSError as error:
            raise JobError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise JobError(f"cannot write {self.path}: another job is writing it") from None
        return file

    def _begin(self) -> IO[str]:
        assert self._file is not None
        if self._earlier:
            os.replace(self.partial, self.partial.with_name(self.partial.name + ".old"))
            self._file.close()
            self._file, self._earlier = self._opened(), False
        return self._file

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: dict[int, dict[str, Any]]) -> None:
        """Keeps ``records`` (line number -> record), durably.

        Raises:
            JobError: the disk did not take them.
        """
        try:
            file = self._begin()
            file.writelines(map(_dump, records.values()))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise JobError(f"cannot write {self.partial}: {error.strerror}") from error
        self._records.update(records)

    def finish(self) -> None:
        """Writes all records in input order under the final name.

        Raises:
            JobError: the disk did not take them; they are in ``partial``.
        """
        try:
            self._begin()
            self._finish()
        except OSError as error:
            raise JobError(
                f"cannot write {self.path}: {error.strerror}; the results are in {self.partial}"
            ) from error
        event("results written", path=str(self.path), records=len(self))

    def _finish(self) -> None:
        ordered = self.path.with_name(self.path.name + ".ordered")
        with ordered.open("w", encoding="utf-8") as f:
            f.writelines(_dump(self._records[line]) for line in sorted(self._records))
            f.flush()
            os.fsync(f.fileno())
        os.replace(ordered, self.path)
        self.partial.unlink()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            if not self._records and not self._earlier:  # nothing worth keeping
                self.partial.unlink(missing_ok=True)
            # What could not be written is not tried again: it was said already.
            with contextlib.suppress(OSError):
                self._file.close()


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def run_job(
    llm: LLM,
    job: Job,
    results: Results,
    *,
    model: str,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Runs the good lines of ``job`` and writes a record for every line to ``results``."""
    results.add(job.errors)
    for line, record in job.errors.items():
        event("bad line", level=WARNING, line=line, message=record["error"]["message"])

    def keep(finished: list[RequestOutput]) -> None:
        done = [(job.asked[int(o.request_id)], o) for o in finished]
        results.add({asked.line: answer(asked, output, model) for asked, output in done})

    if job.requests:
        llm.run(job.requests, progress=progress, on_block=keep)
    results.finish()
