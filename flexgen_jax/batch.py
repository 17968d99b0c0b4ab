"""A job: a file of requests in, a file of results out.

A bad line becomes one error record; the others run. Results are kept in ``OUT.partial`` as their
blocks finish, and take their final name, in input order, when the job is done.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flexgen_jax.dialects import Asked, LineError, answer, error_record, parse_line
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
    for line, raw in _lines(path):
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


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as f:
            for number, raw in enumerate(f, 1):
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise JobError(f"cannot read {path}: {error.strerror}") from error


class Results:
    """Collects the records of a job. A context manager: entering proves ``path`` writable.

    Raises:
        JobError: the output cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._records: dict[int, dict[str, Any]] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> Results:
        if self.path.is_dir():
            raise JobError(f"cannot write {self.path}: it is a directory")
        try:
            self._file = self.partial.open("w", encoding="utf-8")
        except OSError as error:
            raise JobError(f"cannot write {self.path}: {error.strerror}") from error
        return self

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: dict[int, dict[str, Any]]) -> None:
        """Keeps ``records`` (line number -> record), durably."""
        assert self._file is not None
        for record in records.values():
            self._file.write(_dump(record))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._records.update(records)

    def finish(self) -> None:
        """Writes all records in input order under the final name."""
        ordered = self.path.with_name(self.path.name + ".ordered")
        with ordered.open("w", encoding="utf-8") as f:
            f.writelines(_dump(self._records[line]) for line in sorted(self._records))
            f.flush()
            os.fsync(f.fileno())
        os.replace(ordered, self.path)
        self.partial.unlink()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            if not self._records:  # nothing worth keeping
                self.partial.unlink(missing_ok=True)


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

    def keep(finished: list[RequestOutput]) -> None:
        done = [(job.asked[int(o.request_id)], o) for o in finished]
        results.add({asked.line: answer(asked, output, model) for asked, output in done})

    if job.requests:
        llm.run(job.requests, progress=progress, on_block=keep)
    results.finish()
