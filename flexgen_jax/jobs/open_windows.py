"""The windows of a job that are on their way: several, where requests enter as others leave."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from logging import WARNING
from typing import Any

from flexgen_jax.jobs.asked import Asked
from flexgen_jax.jobs.dialects import dump, failed_record
from flexgen_jax.jobs.results import Position, Results
from flexgen_jax.jobs.windows import Task, Window, Windows
from flexgen_jax.logs import event
from flexgen_jax.report import Sum
from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.requests.request import Request

MESSAGES, MESSAGE = 3, 300  # so many, of so many characters


class OpenWindow:
    """A window, and which of its requests are not finished.

    Attributes:
        number, requests, errors, last_line: Of the window.
        unfinished: As it began here: without those that an earlier process has finished.
        left: The places in the input of those that are not finished yet.
    """

    def __init__(self, window: Window, results: Results) -> None:
        self.window, self.number, self.requests = window, window.number, window.requests
        self.errors, self.last_line = window.errors, window.last_line
        self._first = window.requests[0].index if window.requests else 0
        of_each = zip(window.asked, window.requests, strict=True)
        self.unfinished = [r for asked, r in of_each if not results.has(asked.line)]
        self.left = {request.index for request in self.unfinished}
        self._parts: dict[int, dict[int, RequestOutput]] = {}  # by line, of several prompts

    def answered(
        self, index: int, output: RequestOutput
    ) -> tuple[Asked, list[Request], list[RequestOutput]] | None:
        """Takes what a request has come to, by its place in the input; all of its line, if that
        has an answer now."""
        self.left.discard(index)
        asked = self.window.asked[index - self._first]
        parts = self._parts.setdefault(asked.line, {})
        parts[index] = output
        if len(parts) < len(asked.prompts):
            return None
        del self._parts[asked.line]
        places = sorted(parts)
        requests = [self.window.requests[place - self._first] for place in places]
        return asked, requests, [parts[place] for place in places]


class OpenWindows:
    """Windows are begun in order, and ended in order. Reading and keeping may be two threads.

    Args:
        results: Where what is finished goes.
        failures: Is told of the first requests that have no answer.

    Attributes:
        total: Of the job's reports.
    """

    def __init__(
        self,
        windows: Windows,
        task: Task,
        results: Results,
        total: Sum,
        failures: list[str],
    ) -> None:
        self._failures = failures
        self._source, self._windows, self._task = windows, iter(windows), task
        self._results, self.total = results, total
        self._begun_before = deque(results.begun)
        self._open: deque[OpenWindow] = deque()
        self._lock = threading.RLock()

    def next(self) -> OpenWindow | None:
        """Begins the next one; None: there is none.

        Raises:
            JobError: the input cannot be read, or is another one than before.
        """
        with self._lock:
            window = next(self._windows, None)
            if window is None:
                return None
            if self._begun_before:
                begun = self._begun_before.popleft()
                there = window.last_line, window.digest
                self._source.expect(*there, begun.last_line, begun.digest)
            else:
                self._results.begin_window(window.number, window.last_line, window.digest)
            for line, error in window.errors.items():
                event("bad line", level=WARNING, line=line, message=str(error))
            self._open.append(OpenWindow(window, self._results))
            return self._open[-1]

    def keep(self, finished: Mapping[int, RequestOutput], sums: Mapping[str, Any]) -> None:
        """Makes finished requests safe, by their place in the input; ``sums``: of their report."""
        with self._lock:
            records = {}
            for window in self._open:
                for index in sorted(window.left & finished.keys()):
                    whole = window.answered(index, finished[index])
                    if whole is not None:
                        records[whole[0].line] = dump(self._record(*whole))
            self._results.add_part(records, sums)
            event("results kept", records=len(records))

    def _record(
        self, asked: Asked, requests: list[Request], outputs: list[RequestOutput]
    ) -> dict[str, Any]:
        why = next((output.error for output in outputs if output.error is not None), None)
        if why is None:
            return self._task.answer(asked, requests, outputs)
        event("request failed", level=WARNING, line=asked.line, message=why)
        self._failures.append(f"line {asked.line}: {why}"[:MESSAGE])
        del self._failures[MESSAGES:]
        return failed_record(asked, why)

    def end(self) -> None:
        """Ends the first windows, as far as all of theirs is finished."""
        with self._lock:
            while self._open and not self._open[0].left:
                ended = self._open.popleft().window
                self._results.end_window(ended.error_records(), self._after(ended))

    def _after(self, window: Window) -> Position:
        before = self._results.position
        messages = [f"line {line}: {error}" for line, error in window.errors.items()]
        return Position(
            windows=window.number + 1,
            line=window.last_line,
            digest=window.digest,
            requests=before.requests + len(window.requests),
            errors=before.errors + len(window.errors),
            messages=(*before.messages, *(m[:MESSAGE] for m in messages))[:MESSAGES],
            nbytes=before.nbytes,
            sums=self.total.sums(),
        )
