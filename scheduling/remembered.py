"""What searches for one job find out of its policies, for those that come after them: with more
room, or on another machine, most of it is the same."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

from scheduling.dependencies import Issue
from scheduling.estimate import (
    Issues,
    Seconds,
    bound_by,
    busiest,
    estimate,
    lanes,
    moving,
    one_after_the_other,
    work_of,
)
from scheduling.few_layers import few_layers
from scheduling.hardware import Hardware
from scheduling.linear_program import CONTENTION, Program
from scheduling.peak import room_nbytes
from scheduling.policy import Policy, Tier
from scheduling.registered import goes_by_shape
from scheduling.schedules import Schedule
from scheduling.transforms import serialized
from scheduling.workload import Workload

# The blocks of a policy, and how many there are like each; the one that takes most memory first.
Blocks = Callable[[Policy], Sequence[tuple[Workload, float]]]

_LARGE = 600  # computations of a step
_LAYERS = 12  # that are simulated
_SHAPES = 16  # whose issues are kept
_POLICIES = 128  # whose blocks are; of what is found of them much more


class Remembered:
    """The blocks of a job's policies (it is called as ``Blocks`` are), and what is found of them.

    What is asked for again is not computed again, but by the least recently used.
    """

    def __init__(self, blocks: Blocks, schedule: Schedule) -> None:
        self.schedule = schedule
        self._blocks = functools.lru_cache(maxsize=_POLICIES)(blocks)
        self.work_and_hosts = functools.lru_cache(maxsize=None)(self._work_and_hosts)
        self.room = functools.lru_cache(maxsize=None)(self._room)
        self.least = functools.lru_cache(maxsize=None)(self._least)
        self.waits = functools.lru_cache(maxsize=None)(self._waits)
        self.whole = functools.lru_cache(maxsize=None)(self._whole)
        self.program = functools.lru_cache(maxsize=None)(self._program)
        self._order = functools.lru_cache(maxsize=None)(self._ordered)

    @classmethod
    def of(cls, blocks: Blocks, schedule: Schedule) -> Remembered:
        """``blocks``, if they are remembered already, under the same schedule."""
        if isinstance(blocks, cls) and blocks.schedule is schedule:
            return blocks
        return cls(blocks, schedule)

    def __call__(self, policy: Policy) -> Sequence[tuple[Workload, float]]:
        return self._blocks(policy)

    def _work_and_hosts(self, policy: Policy) -> tuple[int, int]:
        """What making the blocks and looking at them takes, and how many machines they are on."""
        found = self(policy)
        first = found[0][0]
        return len(found) * work_of(first), max(1, len(set(first.hosts)))

    def _room(self, policy: Policy, *, shared: bool) -> dict[Tier, int]:
        """Bytes of each tier that the largest block takes, as ``room_nbytes`` has them."""
        return room_nbytes(self(policy)[0][0], shared=shared)

    def _least(self, policy: Policy, hardware: Hardware, *, shared: bool) -> float:
        """Seconds of the job if nothing waits for anything, by the busiest lane of each block."""
        total = 0.0
        for workload, count in self(policy):
            found = _lanes(workload, hardware, policy)
            contended = CONTENTION * moving(found) if shared else 0.0
            total += count * (busiest(found) + contended)
        return total

    def _waits(self, policy: Policy, hardware: Hardware) -> tuple[float, int]:
        """By how much longer a few layers and steps take than their busiest lane, as simulated;
        and how many operations that were."""
        few = few_layers(self(policy)[0][0], _LAYERS)
        large = few.num_layers * few.num_batches > _LARGE
        steps = 1 if large and few.num_stages == 1 else 2
        schedule, known = self._order(policy.overlap)
        count = 0

        def issues(workload: Workload) -> Iterable[Issue]:
            nonlocal count
            for issue in known(workload):
                count += 1
                yield issue

        seconds = sum(estimate(schedule, few, hardware, decode_steps=steps, issues=issues))
        return seconds / busiest(_lanes(few, hardware, policy)), count

    def _whole(self, policy: Policy, hardware: Hardware) -> float:
        """Seconds of the job, by simulating all layers and a few steps of each of its blocks."""
        schedule, issues = self._order(policy.overlap)
        return sum(
            count * sum(estimate(schedule, workload, hardware, issues=issues))
            for workload, count in self(policy)
        )

    def _ordered(self, overlap: bool) -> tuple[Schedule, Issues]:
        """The schedule as policies have it, and its issues, of some shapes known already."""
        schedule = self.schedule if overlap else serialized(self.schedule)
        issues = bound_by(schedule)
        if not goes_by_shape(self.schedule):
            return schedule, issues
        # A shape's issues are always the same.
        of_shape = functools.lru_cache(maxsize=_SHAPES)(lambda w: tuple(issues(w)))
        return schedule, lambda w: of_shape(dataclasses.replace(w, sizes=None))

    def _program(self, policy: Policy, hardware: Hardware, *, shared: bool) -> Program:
        """The linear program of a shape."""
        return Program(policy, self, hardware, shared=shared)


def _lanes(
    workload: Workload, hardware: Hardware, policy: Policy
) -> dict[str, tuple[Seconds, Seconds]]:
    found = lanes(workload, hardware)
    return found if policy.overlap else one_after_the_other(found)
