"""Ops and their costs in, a predicted timeline out.

Streams, needs and slots are the executor's (``scheduling.dependencies``). Each stream of a stage
works on one issue at a time; issues of different streams that need one resource at the same moment
share it evenly.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from scheduling.cost_model import CostModel
from scheduling.dependencies import Issue, Stream, bind, wait_reason
from scheduling.hardware import Hardware
from scheduling.in_order import InOrder
from scheduling.reported import Given, name_of, naming, reported
from scheduling.timeline import Span, Timeline
from scheduling.workload import Workload

_NUMBER = {stream: number for number, stream in enumerate(Stream)}


class Worked(NamedTuple):
    """An issue that was work: when it ran, and since when its stream had come to it."""

    issue: Issue
    start: float
    end: float
    since: float


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
    with naming(name_of(ops)):
        run = Simulation(bind(reported(ops, workload), workload), workload, hardware, look_ahead)
        spans = [run.span(worked) for worked in run.run()]
    spans.sort(key=lambda span: span.start)
    return Timeline(spans=tuple(spans), label="predicted")


def look_ahead_of(workload: Workload) -> int:
    """Issues that may be waiting or running: about four layers' worth of every stage.

    So a load two layers ahead is never held up by the batches in between.
    """
    return max(64, 4 * (5 * workload.num_batches + 2)) * workload.num_stages


class Simulation:
    """One run of ``issues``, which are numbered from 0 without a gap, on a machine.

    Args:
        look_ahead: As ``simulate`` takes it.

    Raises:
        ValueError: the workload has no sizes.
    """

    def __init__(
        self,
        issues: Iterable[Issue],
        workload: Workload,
        hardware: Hardware,
        look_ahead: int | None = None,
    ) -> None:
        self._costs = InOrder(CostModel(workload, hardware))
        self._issues = iter(issues)
        self._limit = look_ahead or look_ahead_of(workload)
        # By stage and stream, as an index.
        lanes = workload.num_stages * len(Stream)
        self._waiting: list[deque[Issue]] = [deque() for _ in range(lanes)]
        # What each lane works on: seconds alone that are left of a piece, its resource, the pieces
        # behind it, the issue, and when that began.
        self._active: dict[int, list] = {}
        self._free_since = [0.0] * lanes  # when each stream came to its next issue
        self._look: set[int] = set()  # lanes whose next issue may have become ready
        # By index: the lane, what kind of op it is, whether it crosses stages, when it was done,
        # and whether; of those that wait, for how many, and of what is waited for, who does.
        self._lanes = array("h")
        self._kinds: list[type] = []
        self._crosses = bytearray()
        self._ends = array("d")
        self._done = bytearray()
        self._unmet: dict[int, int] = {}
        self._blocks: dict[int, list[int]] = {}
        self._pending = 0
        self._now = 0.0

    def run(self) -> Iterator[Worked]:
        """Everything that was work, as it ends."""
        active, now = self._active, self._now
        users: dict[str, int] = {}
        while True:
            self._begin(users)
            if not active:
                if self._pending:
                    raise AssertionError("a bound schedule cannot deadlock")
                return
            # To the moment at which the next piece is through.
            step = min([one[0] * users[one[1]] for one in active.values()])
            now = self._now = self._now + step
            through = []
            for lane, one in active.items():
                one[0] -= step / users[one[1]]
                if one[0] <= 1e-12 * now:
                    through.append(lane)
            for lane in through:
                one = active[lane]
                users[one[1]] -= 1
                behind = one[2]
                if behind:
                    one[1], one[0] = behind[0]
                    one[2] = behind[1:]
                    users[one[1]] = users.get(one[1], 0) + 1
                    continue
                del active[lane]
                issue = one[3]
                yield Worked(issue, one[4], now, self._free_since[lane])
                self._free_since[lane] = now
                self._finish(issue.index, lane)

    def _fetch(self) -> None:
        """More issues into the streams' queues, while there is room."""
        done, lanes, waiting, number = self._done, self._lanes, self._waiting, _NUMBER
        look, blocks = self._look, self._blocks
        room = self._limit - self._pending
        if room <= 0:
            return
        fetched = 0
        for issue in self._issues:
            index = issue.index
            lane = issue.stage * len(number) + number[issue.stream]
            lanes.append(lane)
            done.append(0)
            self._ends.append(0.0)
            self._kinds.append(type(issue.op))
            self._crosses.append(issue.crosses)
            waiting[lane].append(issue)
            unmet = 0
            for need in issue.needs:
                if not done[need]:
                    unmet += 1
                    blocks.setdefault(need, []).append(index)
            if unmet:
                self._unmet[index] = unmet
            else:
                look.add(lane)
            fetched += 1
            if fetched == room:
                break
        self._pending += fetched

    def _begin(self, users: dict[str, int]) -> None:
        """Starts everything that can start now; what is no work is done at once.

        Args:
            users: Resource -> how many work on it.
        """
        active, look, unmet, waiting = self._active, self._look, self._unmet, self._waiting
        self._fetch()
        while look:
            lane = look.pop()
            queue = waiting[lane]
            while queue and lane not in active:
                issue = queue[0]
                if issue.index in unmet:
                    break
                queue.popleft()
                pieces = self._costs.pieces(issue.op)
                if pieces:
                    resource, seconds = pieces[0]
                    active[lane] = [seconds, resource, pieces[1:], issue, self._now]
                    users[resource] = users.get(resource, 0) + 1
                else:
                    self._finish(issue.index, lane)
            if not look:
                self._fetch()

    def _finish(self, index: int, lane: int) -> None:
        self._done[index] = 1
        self._ends[index] = self._now
        self._pending -= 1
        self._look.add(lane)
        unmet = self._unmet
        for other in self._blocks.pop(index, ()):
            left = unmet[other] - 1
            if left:
                unmet[other] = left
            else:
                del unmet[other]
                self._look.add(self._lanes[other])

    def span(self, worked: Worked) -> Span:
        """What ran, with what it waited for last, and for how long its stream stood."""
        issue, start, end, since = worked
        waited = start - since
        if waited <= 1e-9 * start or not issue.needs:
            return Span.of(issue, start, end, None, 0.0)
        last = max(issue.needs, key=self._ends.__getitem__)
        crosses = bool(self._crosses[last])
        reason = wait_reason(type(issue.op), self._kinds[last], crosses=crosses)
        return Span.of(issue, start, end, reason, waited)
