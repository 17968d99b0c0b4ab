"""Policies that fit, and how long they are expected to take: what a search chooses among."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.linear_program import Program, with_splits
from scheduling.policy import Policy, Split, Tier
from scheduling.remembered import Blocks, Remembered
from scheduling.schedules import Schedule


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
        self, blocks: Blocks, hardware: Hardware, limits: Limits, schedule: Schedule
    ) -> None:
        self.blocks = Remembered.of(blocks, schedule)
        self.hardware, self.limits = hardware, limits
        self.work = 0
        self._excess: float | None = None
        self.nearest: str | None = None

    def program(self, policy: Policy) -> Program:
        """The linear program of a shape."""
        program = self.blocks.program(policy, self.hardware, shared=self.limits.shared)
        self.work += program.work
        return program

    def dealt(
        self, policy: Policy, splits: Mapping[str, Split], less: dict[Tier, float]
    ) -> Candidate | None:
        """The policy with these splits, or None: it does not fit, by what is added to ``less``."""
        dealt = with_splits(policy, splits)
        work, hosts = self.blocks.work_and_hosts(dealt)
        self.work += work
        shared = self.limits.shared
        over = self.limits.exceeded(self.blocks.room(dealt, shared=shared))
        if not over:
            seconds = self.blocks.least(dealt, self.hardware, shared=shared)
            return Candidate(policy=dealt, seconds=seconds)
        excess = sum(over.values())
        if self._excess is None or excess < self._excess:
            words = ", ".join(f"{t.value} {size(n)}" for t, n in over.items())
            self._excess = excess
            self.nearest = f"nearest, {shape_of(policy)}: too much by {words}"
        for tier, nbytes in over.items():
            # What the fullest device or host has too much, all of them are to have less.
            of_device = tier is Tier.DEVICE and not shared
            several = policy.num_stages if of_device else hosts
            less[tier] = less.get(tier, 0.0) + 1.05 * nbytes * several
        return None

    def simulated(self, candidate: Candidate) -> Candidate:
        """By how much longer a few layers and steps take than their busiest lane."""
        if candidate.simulated:
            return candidate
        ratio, work = self.blocks.waits(candidate.policy, self.hardware)
        self.work += work
        return dataclasses.replace(candidate, seconds=candidate.seconds * ratio, simulated=True)

    def in_whole(self, candidate: Candidate) -> Candidate:
        """By simulating all layers, and a few steps."""
        seconds = self.blocks.whole(candidate.policy, self.hardware)
        return dataclasses.replace(candidate, seconds=seconds, simulated=True)


def size(nbytes: float) -> str:
    """Bytes, in words."""
    for unit, each in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= each:
            return f"{nbytes / each:.2f} {unit}"
    return f"{nbytes / 1e3:.2f} kB"


def shape_of(policy: Policy) -> str:
    """The shape of a policy's block, in words."""
    return f"{policy.device_batch_size} x {policy.num_device_batches}"
