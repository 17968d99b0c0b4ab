"""Schedules made from schedules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from scheduling.ops import (
    Barrier,
    Compute,
    FreeWeights,
    LoadWeights,
    Op,
    StoreCache,
    StoreHidden,
)
from scheduling.workload import Workload


def serialize(ops: Iterable[Op]) -> Iterator[Op]:
    """No overlap: everything waits for the op before it (FlexGen's ``--overlap False``)."""
    for op in ops:
        yield op
        yield Barrier()


def serialized(schedule: Callable[[Workload], Iterable[Op]]) -> Callable[[Workload], Iterator[Op]]:
    """The schedule whose ops are those of ``schedule``, serialized."""

    @functools.wraps(schedule)
    def without_overlap(workload: Workload) -> Iterator[Op]:
        return serialize(schedule(workload))

    return without_overlap


def first_n(ops: Iterable[Op], n: int) -> Iterator[Op]:
    """The first ``n`` ops."""
    return islice(ops, n)


def remaining(ops: Iterable[Op], workload: Workload) -> Iterator[Op]:
    """What is left where ``workload.done`` was done before.

    Without the ops of those steps, and without the weights that would be loaded for nothing else.
    """
    if not workload.done:
        yield from ops
        return
    held: list[Op | None] = []  # from the first load on of which it is not known yet
    undecided: dict[int, int] = {}  # its layer -> its place among them
    for op in ops:
        if isinstance(op, LoadWeights):
            undecided[op.layer] = len(held)
        elif isinstance(op, FreeWeights):
            place = undecided.pop(op.layer, None)
            if place is not None:
                held[place] = None
                continue
        elif not isinstance(op, Barrier):
            if op.step < workload.first_step(op.batch):
                continue
            if isinstance(op, Compute):
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
        due: Asked at each border whether to end there.

    Attributes:
        done: When all was consumed: the steps of each batch that are done, as ``Workload.done``.
        ended: Whether the schedule came to its end.
    """

    def __init__(self, ops: Iterable[Op], workload: Workload, due: Callable[[], bool]) -> None:
        self._ops, self._workload, self._due = ops, workload, due
        self._done = [workload.first_step(b) for b in range(workload.num_batches)]
        self.ended = False

    @property
    def done(self) -> tuple[int, ...]:
        return tuple(self._done)

    def __iter__(self) -> Iterator[Op]:
        w, last = self._workload, self._workload.num_layers - 1
        begun = False
        inside: set[int] = set()  # the batches that are within a step
        unstored: set[Op] = set()
        for op in self._ops:
            if isinstance(op, Compute):
                if not inside and not unstored and begun and self._due():
                    return
                begun = True
                if w.has_cache(op.layer) and op.step + 1 < w.num_steps:
                    unstored.add(StoreCache(op.step, op.layer, op.batch))
                if op.layer < last:
                    inside.add(op.batch)
                else:
                    unstored.add(StoreHidden(op.step, op.layer, op.batch))
                    inside.discard(op.batch)
                    self._done[op.batch] = op.step + 1
            elif isinstance(op, (StoreCache, StoreHidden)):
                unstored.discard(op)
            yield op
        self.ended = True
