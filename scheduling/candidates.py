"""Policies that fit, and how long they are expected to take: what a search chooses among."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

from scheduling.estimate import (
    Seconds,
    bound_by,
    busiest,
    estimate,
    lanes,
    moving,
    one_after_the_other,
)
from scheduling.few_layers import few_layers
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.linear_program import CONTENTION, with_splits
from scheduling.ops import Op
from scheduling.peak import room_nbytes
from scheduling.policy import Policy, Split, Tier
from scheduling.registered import goes_by_shape
from scheduling.transforms import serialized
from scheduling.workload import Workload

# The blocks of a policy, and how many there are like each; the one that takes most memory first.
Blocks = Callable[[Policy], Sequence[tuple[Workload, float]]]

_LARGE = 600  # computations of a step
_LAYERS = 12  # that are simulated
_SHAPES = 16  # whose issues are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A policy that fits.

    Attributes:
        seconds: Of the whole job, estimated.
        simulated: By simulation, or else by what is busiest: less than a simulation finds.
    """

    policy: Policy
    seconds: float
    simulated: bool = False


class Dealer:
    """Deals policies out, tensor by tensor, and sees what fits and how long it takes.

    Attributes:
        work: Done so far: operations simulated, and cells and layers dealt out.
        nearest: Of what did not fit, the smallest excess, in words; None: there was none.
    """

    def __init__(
        self,
        blocks: Blocks,
        hardware: Hardware,
        limits: Limits,
        schedule: Callable[[Workload], Iterable[Op]],
        *,
        overlap: bool,
    ) -> None:
        self.blocks, self.hardware, self.limits = blocks, hardware, limits
        self.overlap = overlap
        self.schedule = schedule if overlap else serialized(schedule)
        self._issues = bound_by(self.schedule)
        if goes_by_shape(schedule):  # a shape's issues are always the same
            of_shape = functools.lru_cache(maxsize=_SHAPES)(lambda w: tuple(self._bound(w)))
            self._issues = lambda w: of_shape(dataclasses.replace(w, sizes=None))
        self.work = 0
        self._least: float | None = None
        self.nearest: str | None = None

    def _bound(self, workload: Workload) -> Iterable:
        return bound_by(self.schedule)(workload)

    def dealt(
        self, policy: Policy, splits: Mapping[str, Split], less: dict[Tier, float]
    ) -> Candidate | None:
        """The policy with these splits, or None: it does not fit, by what is added to ``less``."""
        dealt = with_splits(policy, splits)
        blocks = self.blocks(dealt)
        first = blocks[0][0]
        self.work += len(blocks) * work_of(first)
        over = self.limits.exceeded(room_nbytes(first, shared=self.limits.shared))
        if not over:
            seconds = sum(count * self._seconds(workload) for workload, count in blocks)
            return Candidate(policy=dealt, seconds=seconds)
        excess = sum(over.values())
        if self._least is None or excess < self._least:
            words = ", ".join(f"{t.value} {size(n)}" for t, n in over.items())
            self._least = excess
            self.nearest = f"nearest, {shape_of(policy)}: too much by {words}"
        for tier, nbytes in over.items():
            # What the fullest device or host has too much, all of them are to have less.
            hosts = max(1, len(set(first.hosts)))
            of_device = tier is Tier.DEVICE and not self.limits.shared
            several = policy.num_stages if of_device else hosts
            less[tier] = less.get(tier, 0.0) + 1.05 * nbytes * several
        return None

    def simulated(self, candidate: Candidate) -> Candidate:
        """By how much longer a few layers and steps take than their busiest lane."""
        if candidate.simulated:
            return candidate
        few = few_layers(self.blocks(candidate.policy)[0][0], _LAYERS)
        steps = 1 if few.num_layers * few.num_batches > _LARGE else 2

        def issues(workload: Workload) -> Iterable:
            for issue in self._issues(workload):
                self.work += 1
                yield issue

        seconds = sum(
            estimate(self.schedule, few, self.hardware, decode_steps=steps, issues=issues)
        )
        ratio = seconds / busiest(self._lanes(few))
        return dataclasses.replace(candidate, seconds=candidate.seconds * ratio, simulated=True)

    def _seconds(self, workload: Workload) -> float:
        found = self._lanes(workload)
        contended = CONTENTION * moving(found) if self.limits.shared else 0.0
        return busiest(found) + contended

    def _lanes(self, workload: Workload) -> dict[str, tuple[Seconds, Seconds]]:
        found = lanes(workload, self.hardware)
        return found if self.overlap else one_after_the_other(found)


def work_of(workload: Workload) -> int:
    """What making the sizes of a workload and looking at them takes: cells, and layers."""
    assert workload.sizes is not None
    return len(workload.sizes.cache) + 4 * workload.num_layers


def size(nbytes: float) -> str:
    """Bytes, in words."""
    for unit, each in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= each:
            return f"{nbytes / each:.2f} {unit}"
    return f"{nbytes / 1e3:.2f} kB"


def shape_of(policy: Policy) -> str:
    """The shape of a policy's block, in words."""
    return f"{policy.device_batch_size} x {policy.num_device_batches}"
