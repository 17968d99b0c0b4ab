"""The one loop: runs any valid schedule and measures it.

Owns threads, order and time; knows neither model nor tier. What an op *does* is the business of
the ``Effects`` it is given.

Each stream of each pipeline stage is a thread that performs its issues in order. An issue starts
when the issues it needs (``scheduling.dependencies``, the same that the validator and the simulator
use) are done. A computation is done when it is dispatched, since what comes after it works on its
results, which JAX makes wait by itself; when the results become ready is watched by one more thread
of each stream that computes, which measures its spans.
"""

from __future__ import annotations

import queue
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from scheduling.dependencies import Issue, Lane, Stream, bind, wait_reason
from scheduling.ops import Op
from scheduling.simulate import look_ahead_of
from scheduling.timeline import Span, Timeline
from scheduling.workload import Workload

# Seconds that an interrupted run waits for an op under way. Batch systems kill after 30.
PATIENCE = 10.0

OnComputed = Callable[[Op], None]


class Effects(Protocol):
    """What the ops of a schedule do. Each method is called on the thread of the op's stream."""

    def make_room(self, issue: Issue) -> None:
        """Waits until what the op overwrites is no longer read, and what it moves is computed.

        Not counted as its work.
        """
        ...

    def perform(self, issue: Issue) -> Any:
        """Does the op; returns JAX arrays that are ready when its work is, or None: done now."""
        ...

    def effortless(self, op: Op) -> bool:
        """True for an op that is no work at all here: it takes neither a thread nor time."""
        ...

    def wanted(self, op: Op) -> bool:
        """False for an op that has become needless (its batch is finished): it is skipped."""
        ...

    def finished(self) -> bool:
        """True when nothing more is wanted: the schedule is not consumed further."""
        ...


class ExecutionError(RuntimeError):
    """An op that failed.

    Attributes:
        op: The op. What went wrong with it is the ``__cause__``.
    """

    def __init__(self, op: Op, cause: BaseException) -> None:
        super().__init__(f"{op} failed: {cause}")
        self.op = op


class _Cancelled(Exception):
    """Raised on a waiting thread when the run ends early."""


class _Place(NamedTuple):
    """An issue by its lane and its number there, and why something waits for it."""

    lane: Lane
    place: int
    reason: str


class _Run:
    """The state of one execution that its threads share."""

    def __init__(self, effects: Effects, on_computed: OnComputed | None) -> None:
        self.effects, self.on_computed = effects, on_computed
        self.changed = threading.Condition()
        self.done: dict[Lane, int] = {}  # how many issues of each lane are done
        self.failure: tuple[Op, BaseException] | None = None
        self.cancelled = False
        self.spans: list[Span] = []
        self.origin = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.origin

    def wait_until_done(self, places: Iterable[_Place]) -> str | None:
        """Why it had to wait, if it had to: for what came last."""
        reason = None
        with self.changed:
            waiting = [p for p in places if self.done.get(p.lane, 0) <= p.place]
            while waiting and not self.cancelled:
                reason = waiting[0].reason
                self.changed.wait()
                waiting = [p for p in waiting if self.done.get(p.lane, 0) <= p.place]
            if self.cancelled:
                raise _Cancelled
        return reason

    def mark_done(self, lane: Lane) -> None:
        with self.changed:
            self.done[lane] = self.done.get(lane, 0) + 1
            self.changed.notify_all()

    def cancel(self, failure: tuple[Op, BaseException] | None = None) -> None:
        with self.changed:
            self.failure = self.failure or failure
            self.cancelled = True
            self.changed.notify_all()

    def record(
        self, issue: Issue, start: float, end: float, wait: str | None, waited: float
    ) -> None:
        self.spans.append(Span.of(issue, start, end, wait, waited))


class _Worker(threading.Thread):
    """Performs the issues of one lane, in order."""

    def __init__(self, run: _Run, lane: Lane, watch: _Watch) -> None:
        stage, stream = lane
        super().__init__(name=f"flexgen-{stage}-{stream.value}", daemon=True)
        self._run, self._lane, self._watch = run, lane, watch
        self.op: Op | None = None  # what it is at
        self.queue: queue.SimpleQueue[tuple[Issue, list[_Place]] | None] = queue.SimpleQueue()

    def run(self) -> None:
        run = self._run
        while (item := self.queue.get()) is not None:
            issue, places = item
            try:
                since = run.now()
                reason = run.wait_until_done(places)
                if run.effects.wanted(issue.op):
                    self.op = issue.op
                    run.effects.make_room(issue)
                    start = run.now()
                    ready = run.effects.perform(issue)
                    waited = start - since if reason else 0.0
                    if ready is None:
                        run.record(issue, start, run.now(), reason, waited)
                    else:
                        self._watch.queue.put((issue, start, ready, reason))
            except _Cancelled:
                return
            except BaseException as error:
                run.cancel((issue.op, error))
                return
            self.op = None
            run.mark_done(self._lane)


class _Watch(threading.Thread):
    """Waits for results in the order of their dispatch: one device computes one thing at a time.

    Attention has a watch of its own, since a host may compute it meanwhile.
    """

    def __init__(self, run: _Run, lane: Lane) -> None:
        stage, stream = lane
        super().__init__(name=f"flexgen-{stage}-watch {stream.value}", daemon=True)
        self._run = run
        self.queue: queue.SimpleQueue[tuple[Issue, float, Any, str | None] | None] = (
            queue.SimpleQueue()
        )

    def run(self) -> None:
        previous = 0.0
        while (item := self.queue.get()) is not None:
            issue, start, ready, reason = item
            try:
                jax.block_until_ready(ready)
                if self._run.on_computed is not None:
                    self._run.on_computed(issue.op)
            except BaseException as error:
                self._run.cancel((issue.op, error))
                return
            del ready, item  # results must not outlive their last reader by waiting here
            end = self._run.now()
            # Dispatching runs ahead: the stream stood still only while nothing was left to do.
            waited = max(0.0, start - previous) if reason else 0.0
            reason = reason if waited else None
            self._run.record(issue, max(start, previous), end, reason, waited)
            previous = end


# An op's kind, its lane, and whether it crosses stages.
_Kind = tuple[type, Lane, bool]


def _end(
    run: _Run, threads: Sequence[_Worker | _Watch], interrupt: KeyboardInterrupt | None
) -> None:
    """Waits for the threads, the watch last: none may outlive the run.

    Unless somebody wants it to end, and a thread does not come back: the disk may never answer.
    """
    deadline = None if interrupt is None else time.monotonic() + PATIENCE
    while any(thread.is_alive() for thread in threads):
        try:
            for thread in threads:
                thread.queue.put(None)
                thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except KeyboardInterrupt as error:
            run.cancel()
            interrupt, deadline = error, deadline or time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() >= deadline:
            break
    if interrupt is None:
        return
    # A watch waits for what a worker's op would compute.
    stuck = [str(t.op) for t in threads if isinstance(t, _Worker) and t.is_alive() and t.op]
    stuck = stuck or [t.name for t in threads if t.is_alive()]
    if stuck:
        interrupt.add_note(f"{', '.join(stuck)} did not come back: a disk or a device may hang")
    raise interrupt


def execute(
    ops: Iterable[Op],
    workload: Workload,
    effects: Effects,
    *,
    look_ahead: int | None = None,
    on_computed: OnComputed | None = None,
) -> Timeline:
    """Runs ``ops`` to the end, or until ``effects`` is finished.

    Args:
        look_ahead: How many issues may be waiting or running; None: as simulated.
        on_computed: Told of each computation when its results are there; on a thread of its own.

    Returns:
        The measured timeline; seconds count from the call.

    Raises:
        ScheduleError: the order is not valid; nothing beyond the valid part has run. Callers that
            want nothing to run at all call :func:`scheduling.validate` before.
        ExecutionError: an op failed; all threads have ended.
        KeyboardInterrupt: likewise; unless a note to it says which op does not come back.
    """
    limit = look_ahead or look_ahead_of(workload)
    run = _Run(effects, on_computed)
    watches: dict[Lane, _Watch] = {}
    workers: dict[Lane, _Worker] = {}
    issued: dict[Lane, int] = {}
    # Where each issue stands in its lane, by index: 6 bytes an issue, for blocks of millions.
    kinds: list[_Kind] = []
    number: dict[_Kind, int] = {}
    kind_at, place_at = array("H"), array("I")
    # An effortless issue is done when what it needs is: it stands for those places.
    stands_for: dict[int, dict[Lane, _Place]] = {}

    def places_of(issue: Issue) -> dict[Lane, _Place]:
        latest: dict[Lane, _Place] = {}
        for need in issue.needs:
            kind, need_lane, crosses = kinds[kind_at[need]]
            reason = wait_reason(type(issue.op), kind, crosses=crosses)
            places = stands_for.get(need)
            if places is None:
                places = {need_lane: _Place(need_lane, place_at[need], reason)}
            for lane, found in places.items():
                if lane not in latest or found.place > latest[lane].place:
                    latest[lane] = found._replace(reason=reason)
        return latest

    def watch_of(stage: int, stream: Stream) -> _Watch:
        lane = stage, stream if stream is Stream.ATTEND else Stream.COMPUTE
        if lane not in watches:
            watches[lane] = _Watch(run, lane)
            watches[lane].start()
        return watches[lane]

    total = 0
    interrupt: KeyboardInterrupt | None = None
    try:
        for issue in bind(ops, workload):
            with run.changed:
                while total - sum(run.done.values()) >= limit and not run.cancelled:
                    run.changed.wait()
            if run.cancelled or effects.finished():
                break
            lane = issue.lane
            kind = type(issue.op), lane, issue.crosses
            if kind not in number:
                number[kind] = len(kinds)
                kinds.append(kind)
            kind_at.append(number[kind])
            place_at.append(issued.get(lane, 0))
            places = places_of(issue)
            if effects.effortless(issue.op):
                stands_for[issue.index] = places
                continue
            worker = workers.get(lane)
            if worker is None:
                worker = workers[lane] = _Worker(run, lane, watch_of(*lane))
                worker.start()
            issued[lane] = issued.get(lane, 0) + 1
            places.pop(lane, None)  # its own lane is in order anyway
            worker.queue.put((issue, list(places.values())))
            total += 1
        with run.changed:
            while total > sum(run.done.values()) and not run.cancelled:
                run.changed.wait()
    except BaseException as error:
        run.cancel()
        interrupt = error if isinstance(error, KeyboardInterrupt) else None
        raise
    finally:
        _end(run, [*workers.values(), *watches.values()], interrupt)
    if run.failure is not None:
        (op, cause), run.failure = run.failure, None
        try:
            raise ExecutionError(op, cause) from cause
        finally:
            del cause  # or an error's traceback would hold itself, and with it all that ran
    run.spans.sort(key=lambda span: span.start)
    return Timeline(spans=tuple(run.spans), label="measured")
