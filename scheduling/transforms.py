"""Schedules made from schedules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from scheduling.ops import Barrier, Op
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
