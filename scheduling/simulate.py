"""Ops and their costs in, a predicted timeline out.

Streams, needs and slots are the executor's (``scheduling.dependencies``). Each stream of a stage
works on one issue at a time; issues of different streams that need one resource at the same moment
share it evenly.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import deque
from collections.abc import Iterable, Iterator

from scheduling.cost_model import CostModel, Piece
from scheduling.dependencies import Issue, Stream, bind, wait_reason
from scheduling.hardware import Hardware
from scheduling.ops import Compute, ComputeExperts, FreeWeights, LoadChosen, LoadWeights, Op
from scheduling.reported import Given, name_of, naming, reported
from scheduling.timeline import Span, Timeline
from scheduling.workload import Workload

_NUMBER = {stream: number for number, stream in enumerate(Stream)}


@dataclasses.dataclass
class _Active:
    """An issue that a stream works on: what is left of its pieces."""

    issue: Issue
    start: float
    pieces: deque[Piece]
    left: float  # seconds alone, of the first piece
    wait: str | None
    waited: float


def simulate(
    ops: Given, workload: Workload, hardware: Hardware, *, look_ahead: int | None = None
) -> Timeline:
    """When each op of a schedule would run on ``hardware``.

    Args:
        ops: Of the schedule, or the schedule itself.
        workload: With sizes, as ``Plan.workload`` has them.
        look_ahead: Issues that may be waiting or running, as the executor's.

    Raises:
        ScheduleError: the order is not valid.
        ValueError: no workload, or one without sizes.
    """
    if not isinstance(workload, Workload):
        raise ValueError(f"expected a Workload, got {workload!r}; the operations come first")
    limit = look_ahead or look_ahead_of(workload)
    with naming(name_of(ops)):
        run = _Simulation(reported(ops, workload), workload, hardware, limit)
        return Timeline(spans=tuple(run.run()), label="predicted")


def look_ahead_of(workload: Workload) -> int:
    """Issues that may be waiting or running: about four layers' worth of every stage.

    So a load two layers ahead is never held up by the batches in between.
    """
    return max(64, 4 * (5 * workload.num_batches + 2)) * workload.num_stages


class _Simulation:
    def __init__(
        self, ops: Iterable[Op], workload: Workload, hardware: Hardware, limit: int
    ) -> None:
        self._costs = CostModel(workload, hardware)
        self._issues = bind(ops, workload)
        self._limit = limit
        # By stage and stream, as an index: hashing an enum's members a million times is slow.
        lanes = workload.num_stages * len(Stream)
        self._waiting: list[deque[Issue]] = [deque() for _ in range(lanes)]
        self._active: dict[int, _Active] = {}
        self._look: set[int] = set()  # lanes whose next issue may have become ready
        self._blocked: dict[int, set[int]] = {}  # index -> the lanes that wait for it
        # By index: what kind of op it is, whether it crosses stages, when it was done, and whether.
        self._kinds: list[type] = []
        self._crosses = bytearray()
        self._ends = array("d")
        self._done = bytearray()
        self._free_since = [0.0] * lanes  # when each stream came to its next issue
        self._pending = 0
        self._exhausted = False
        self._fresh: set[int] = set()  # layers loaded and not computed with yet
        self._now = 0.0

    def run(self) -> Iterator[Span]:
        spans: list[Span] = []
        while True:
            self._begin()
            if not self._active:
                if self._exhausted and not self._pending:
                    break
                raise AssertionError("a bound schedule cannot deadlock")
            self._advance(spans)
        spans.sort(key=lambda span: span.start)
        return iter(spans)

    def _fetch(self) -> None:
        """More issues into the streams' queues, while there is room."""
        while not self._exhausted and self._pending < self._limit:
            issue = next(self._issues, None)
            if issue is None:
                self._exhausted = True
                break
            self._done.append(0)
            self._ends.append(0.0)
            self._kinds.append(type(issue.op))
            self._crosses.append(issue.crosses)
            lane = _lane(issue)
            self._waiting[lane].append(issue)
            self._look.add(lane)
            self._pending += 1

    def _begin(self) -> None:
        """Starts everything that can start now; what is no work is done at once."""
        done, active, look = self._done, self._active, self._look
        self._fetch()
        while look:
            lane = look.pop()
            queue = self._waiting[lane]
            while queue and lane not in active:
                issue = queue[0]
                if not all(map(done.__getitem__, issue.needs)):
                    missing = next(n for n in issue.needs if not done[n])
                    self._blocked.setdefault(missing, set()).add(lane)
                    break
                queue.popleft()
                pieces = self._pieces(issue.op)
                if pieces:
                    active[lane] = _Active(
                        issue,
                        self._now,
                        deque(pieces),
                        pieces[0][1],
                        *self._waited(issue, self._free_since[lane]),
                    )
                else:
                    self._finish(issue)
            if not look:
                self._fetch()

    def _pieces(self, op: Op) -> tuple[Piece, ...]:
        if isinstance(op, FreeWeights):
            return ()
        if isinstance(op, (LoadWeights, LoadChosen)):
            self._fresh.add(op.layer)
        unpack = isinstance(op, (Compute, ComputeExperts)) and op.layer in self._fresh
        if unpack:
            self._fresh.discard(op.layer)  # type: ignore[union-attr] # a Compute has a layer
        return self._costs.pieces(op, unpack=unpack)

    def _waited(self, issue: Issue, since: float) -> tuple[str | None, float]:
        """What an issue that starts now waited for last, and for how long its stream stood."""
        waited = self._now - since
        if waited <= 1e-9 * self._now or not issue.needs:
            return None, 0.0
        last = max(issue.needs, key=self._ends.__getitem__)
        crosses = bool(self._crosses[last])
        return wait_reason(type(issue.op), self._kinds[last], crosses=crosses), waited

    def _finish(self, issue: Issue) -> None:
        self._done[issue.index] = 1
        self._ends[issue.index] = self._now
        self._pending -= 1
        self._look.add(_lane(issue))
        self._look.update(self._blocked.pop(issue.index, ()))

    def _advance(self, spans: list[Span]) -> None:
        """To the moment at which the next piece is through."""
        active = list(self._active.items())
        users: dict[str, int] = {}
        for _, one in active:
            resource = one.pieces[0][0]
            users[resource] = users.get(resource, 0) + 1
        step = min([one.left * users[one.pieces[0][0]] for _, one in active])
        self._now += step
        for lane, one in active:
            one.left -= step / users[one.pieces[0][0]]
            if one.left > 1e-12 * self._now:
                continue
            one.pieces.popleft()
            if one.pieces:
                one.left = one.pieces[0][1]
                continue
            del self._active[lane]
            self._free_since[lane] = self._now
            spans.append(Span.of(one.issue, one.start, self._now, one.wait, one.waited))
            self._finish(one.issue)


def _lane(issue: Issue) -> int:
    return issue.stage * len(_NUMBER) + _NUMBER[issue.stream]
