"""Ops and their costs in, a predicted timeline out.

Streams, needs and slots are the executor's (``scheduling.dependencies``). Each stream works on one
issue at a time; issues of different streams that need one resource at the same moment share it
evenly.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator

from scheduling.cost_model import CostModel, Piece
from scheduling.dependencies import Issue, Stream, bind
from scheduling.hardware import Hardware
from scheduling.ops import Compute, FreeWeights, LoadWeights, Op
from scheduling.timeline import Span, Timeline
from scheduling.workload import Workload


@dataclasses.dataclass
class _Active:
    """An issue that a stream works on: what is left of its pieces."""

    issue: Issue
    start: float
    pieces: deque[Piece]
    left: float  # seconds alone, of the first piece


def simulate(
    ops: Iterable[Op], workload: Workload, hardware: Hardware, *, look_ahead: int | None = None
) -> Timeline:
    """When each op of a schedule would run on ``hardware``.

    Args:
        workload: With sizes, as ``LLM.workload`` and ``plan`` make it.
        look_ahead: Issues that may be waiting or running, as the executor's.

    Raises:
        ScheduleError: the order is not valid.
        ValueError: the workload has no sizes.
    """
    limit = look_ahead or max(64, 4 * (5 * workload.num_batches + 2))
    return Timeline(
        spans=tuple(_Simulation(ops, workload, hardware, limit).run()), label="predicted"
    )


class _Simulation:
    def __init__(
        self, ops: Iterable[Op], workload: Workload, hardware: Hardware, limit: int
    ) -> None:
        self._costs = CostModel(workload, hardware)
        self._issues = bind(ops, workload)
        self._limit = limit
        self._waiting: dict[Stream, deque[Issue]] = {stream: deque() for stream in Stream}
        self._active: dict[Stream, _Active] = {}
        self._done = bytearray()  # by index
        self._pending = 0
        self._exhausted = False
        self._fresh: set[int] = set()  # layers loaded and not computed with yet
        self._now = 0.0

    def run(self) -> Iterator[Span]:
        spans: list[Span] = []
        while True:
            self._begin(spans)
            if not self._active:
                if self._exhausted and not self._pending:
                    break
                raise AssertionError("a bound schedule cannot deadlock")
            self._advance(spans)
        spans.sort(key=lambda span: span.start)
        return iter(spans)

    def _fetch(self) -> bool:
        """More issues into the streams' queues, while there is room; whether any came."""
        came = False
        while not self._exhausted and self._pending < self._limit:
            issue = next(self._issues, None)
            if issue is None:
                self._exhausted = True
                break
            self._done.append(0)
            self._waiting[issue.stream].append(issue)
            self._pending += 1
            came = True
        return came

    def _begin(self, spans: list[Span]) -> None:
        """Starts everything that can start now; what is no work is done at once."""
        again = True
        while again:
            again = self._fetch()
            for stream, queue in self._waiting.items():
                while queue and stream not in self._active:
                    issue = queue[0]
                    if not all(self._done[need] for need in issue.needs):
                        break
                    queue.popleft()
                    pieces = self._pieces(issue.op)
                    if pieces:
                        first = pieces[0][1]
                        self._active[stream] = _Active(issue, self._now, deque(pieces), first)
                    else:
                        self._finish(issue)
                    again = True

    def _pieces(self, op: Op) -> tuple[Piece, ...]:
        if isinstance(op, FreeWeights):
            return ()
        if isinstance(op, LoadWeights):
            self._fresh.add(op.layer)
        unpack = isinstance(op, Compute) and op.layer in self._fresh
        if unpack:
            self._fresh.discard(op.layer)  # type: ignore[union-attr] # a Compute has a layer
        return self._costs.pieces(op, unpack=unpack)

    def _finish(self, issue: Issue) -> None:
        self._done[issue.index] = 1
        self._pending -= 1

    def _advance(self, spans: list[Span]) -> None:
        """To the moment at which the next piece is through."""
        users: dict[str, int] = {}
        for active in self._active.values():
            resource = active.pieces[0][0]
            users[resource] = users.get(resource, 0) + 1
        step = min(a.left * users[a.pieces[0][0]] for a in self._active.values())
        self._now += step
        for stream, active in list(self._active.items()):
            active.left -= step / users[active.pieces[0][0]]
            if active.left > 1e-12 * self._now:
                continue
            active.pieces.popleft()
            if active.pieces:
                active.left = active.pieces[0][1]
                continue
            del self._active[stream]
            spans.append(Span.of(active.issue.op, stream, active.start, self._now))
            self._finish(active.issue)
