"""Schedules made from schedules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from scheduling.ops import (
    Barrier,
    Cell,
    Compute,
    ComputeExperts,
    FreeWeights,
    LoadChosen,
    LoadWeights,
    Op,
    Project,
    StoreCache,
    StoreHidden,
)
from scheduling.workload import Workload


def serialize(ops: Iterable[Op], workload: Workload | None = None) -> Iterator[Op]:
    """No overlap: everything waits for the op before it (FlexGen's ``--overlap False``).

    Args:
        workload: Of several stages: everything waits for the op of its stage before it.
    """
    staged = workload is not None and workload.num_stages > 1
    for op in ops:
        yield op
        if workload is not None and staged and not isinstance(op, Barrier):
            yield Barrier(workload.stage_of(op.layer))
        elif op != Barrier():
            yield Barrier()


def serialized(schedule: Callable[[Workload], Iterable[Op]]) -> Callable[[Workload], Iterator[Op]]:
    """The schedule whose ops are those of ``schedule``, serialized."""

    @functools.wraps(schedule)
    def without_overlap(workload: Workload) -> Iterator[Op]:
        return serialize(schedule(workload), workload)

    return without_overlap


def first_n(ops: Iterable[Op], n: int) -> Iterator[Op]:
    """The first ``n`` ops."""
    return islice(ops, n)


def remaining(ops: Iterable[Op], workload: Workload) -> Iterator[Op]:
    """What is left where ``workload.done`` was done before.

    Without the ops of those steps, and without the weights that would be loaded for nothing else.
    """
    if not workload.done:
        return iter(ops)
    return without_idle_barriers(_only(ops, lambda step, batch: step >= workload.first_step(batch)))


def without_idle_barriers(ops: Iterable[Op]) -> Iterator[Op]:
    """Without barriers right behind those that wait for as much: what a filter has left of them.

    An order of nothing but barriers comes to no end here either: validate it before.
    """
    waited: set[int | None] = set()
    for op in ops:
        if not isinstance(op, Barrier):
            waited.clear()
        elif None in waited or op.stage in waited:
            continue
        else:
            waited.add(op.stage)
        yield op


def _only(ops: Iterable[Op], kept: Callable[[int, int], bool]) -> Iterator[Op]:
    """Without the ops whose step and batch are not ``kept``, and the weights loaded for them."""
    held: list[Op | None] = []  # from the first load on of which it is not known yet
    undecided: dict[int, int] = {}  # its layer -> its place among them
    for op in ops:
        if isinstance(op, (LoadChosen, ComputeExperts)):
            there = tuple(batch for batch in op.batches if kept(op.step, batch))
            if there and len(there) < len(op.batches):
                op = dataclasses.replace(op, batches=there)  # of fewer batches
            if isinstance(op, LoadChosen):
                undecided[op.layer] = len(held)
            elif not there:
                continue
            else:
                undecided.pop(op.layer, None)
        elif isinstance(op, LoadWeights):
            undecided[op.layer] = len(held)
        elif isinstance(op, FreeWeights):
            place = undecided.pop(op.layer, None)
            if place is not None:
                held[place] = None
                continue
        elif not isinstance(op, Barrier):
            if not kept(op.step, op.batch):
                continue
            if isinstance(op, (Project, Compute)):
                undecided.pop(op.layer, None)
        held.append(op)
        if not undecided:
            yield from (o for o in held if o is not None)
            held.clear()
    yield from (o for o in held if o is not None)


class Cut:
    """The ops of a schedule up to a step border: where all batches are between their steps.

    Args:
        ops: Of ``workload``, from its beginning.
        due: Asked, where steps begin, whether to end: then none begins any more, and those that
            have begun, as in the other stages of a pipeline, are finished.

    Attributes:
        done: When all was consumed: the steps of each batch that are done, as ``Workload.done``.
        ended: Whether the schedule came to its end.
    """

    def __init__(self, ops: Iterable[Op], workload: Workload, due: Callable[[], bool]) -> None:
        self._ops, self._workload, self._due = ops, workload, due
        self._done = [workload.first_step(b) for b in range(workload.num_batches)]
        self._begun = [done - 1 for done in self._done]  # the step that each batch is at
        self._inside: set[int] = set()  # the batches that are within a step
        self._unstored: set[Op] = set()
        self.ended = False

    @property
    def done(self) -> tuple[int, ...]:
        return tuple(self._done)

    def __iter__(self) -> Iterator[Op]:
        ops = iter(self._ops)
        any_begun = False
        for op in ops:
            if isinstance(op, Cell) and self._begins(op):
                between = not self._inside and not self._unstored
                if any_begun and (between or op.step > max(self._begun)) and self._due():
                    yield from self._rest(ops)
                    return
                any_begun = True
                self._begun[op.batch] = op.step
                self._inside.add(op.batch)
            self._note(op)
            yield op
        self.ended = True

    def _begins(self, op: Cell) -> bool:
        """Whether it is the first of its batch's step."""
        return op.step > self._begun[op.batch]

    def _note(self, op: Op) -> None:
        w = self._workload
        if isinstance(op, (StoreCache, StoreHidden)):
            self._unstored.discard(op)
        elif isinstance(op, Compute):
            if w.has_cache(op.layer) and op.step + 1 < w.num_steps:
                self._unstored.add(StoreCache(op.step, op.layer, op.batch))
            if op.layer == w.num_layers - 1:
                self._unstored.add(StoreHidden(op.step, op.layer, op.batch))
                if op.step == self._begun[op.batch]:  # else the next has begun with a load ahead
                    self._inside.discard(op.batch)
                self._done[op.batch] = op.step + 1

    def _rest(self, ops: Iterator[Op]) -> Iterator[Op]:
        """What finishes the steps that have begun."""
        kept = _only(ops, lambda step, batch: step <= self._begun[batch])
        while self._inside or self._unstored:
            op = next(kept)
            self._note(op)
            yield op
