"""The linear program over the nine shares of a block of one shape (paper, section 4.3), and three
more where there are experts.

Given the shape, each phase takes as long as its busiest lane; lanes are linear in the shares, and
so is what lies in each tier.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scheduling.estimate import Seconds, lanes, one_after_the_other, work_of
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.peak import transient_nbytes
from scheduling.policy import Policy, Split, Tier
from scheduling.sizes import Sizes
from scheduling.workload import Workload

SPLITS = ("weights", "cache", "hidden")
TIERS = tuple(Tier)
# What a tier faster than need be is worth: enough to break ties.
_TIE = 1e-3
_SCALE = 1e9  # bytes and seconds within a few orders of each other
# Where host and device are one processor, moving takes this share of its time from computing.
CONTENTION = 0.2


def with_splits(policy: Policy, splits: Mapping[str, Split]) -> Policy:
    """``policy`` with some of its splits."""
    changes: dict[str, Any] = dict(splits)
    return dataclasses.replace(policy, **changes)


class Solution(NamedTuple):
    """Shares, and how long a job takes with them if nothing waits for anything.

    Attributes:
        seconds: As the program has it, of which it is the least: whole tensors may take longer.
        bound: No placement of this shape takes less.
    """

    splits: dict[str, Split]
    seconds: float
    bound: float


class Program:
    """The linear program of one shape.

    Variables: the share of each of weights, cache, hidden states and, apart from the weights,
    experts in each tier; then the seconds of prefill and of decode, and the GB of a slot.
    """

    def __init__(
        self,
        policy: Policy,
        blocks: Callable[[Policy], Sequence[tuple[Workload, float]]],
        hardware: Hardware,
        *,
        shared: bool,
    ) -> None:
        self.shared = shared  # device and host are one memory
        if policy.num_groups is None:  # the same in all tiers, since time is to be linear in them
            policy = dataclasses.replace(policy, num_groups=policy.num_stages)
        pure = {}
        for tier in TIERS:
            everything = Split(**{t.value: 100 if t is tier else 0 for t in TIERS})
            whole = with_splits(policy, dict.fromkeys(SPLITS, everything))
            whole = dataclasses.replace(whole, experts=None)  # where the weights lie
            (pure[tier], times), *others = blocks(whole)
            # Blocks like the first; of a job with shorter ones it is not known what bounds it.
            self.times = 0.0 if others else times
            self.blocks = times + sum(count for _, count in others)
        self.work = sum(map(work_of, pure.values()))  # of making it
        w, sizes = pure[Tier.DEVICE], _sizes(pure[Tier.DEVICE])
        self.kinds: tuple[str, ...] = SPLITS
        if w.experts is not None:
            self.kinds = (*SPLITS, "experts")
        self.shares = len(TIERS) * len(self.kinds)
        units = np.zeros(w.num_layers, bool)
        if w.experts is not None:
            units[list(w.experts.layers)] = True
        experts = sizes.loads.only(np.flatnonzero(units)).total(Tier.DEVICE)
        self.nbytes = {
            "weights": sum(sum(stage.values()) for stage in sizes.resident) - experts,
            "experts": experts,
            "cache": sum(
                count * cell.position_nbytes * cell.kept(sizes.batches[number].capacity)
                for number, cell, count in sizes.cells.counts()
            ),
            "hidden": w.num_stages * sum(b.largest_hidden_nbytes for b in sizes.batches),
        }
        found = {tier: lanes(workload, hardware) for tier, workload in pure.items()}
        if not policy.overlap:
            found = {tier: one_after_the_other(f) for tier, f in found.items()}
        self.num_stages, self.weight_slots = w.num_stages, w.weight_slots
        self.hosts = max(1, len(set(w.hosts)))
        stages = [w.layers_of(stage) for stage in range(w.num_stages)]
        self.idle = sum(transient_nbytes(w, n, shared=shared) for n in range(w.num_stages))
        self.workspace = max(b.workspace for b in sizes.batches)
        self.workspace += sum(
            b.routed_nbytes * max(b.prompt_len, b.longest_prompt) for b in sizes.batches
        )
        self.buffers = sum(  # of a cache that is all on disk
            count * cell.position_nbytes * sizes.chunk_positions
            for _, cell, count in _sizes(pure[Tier.DISK]).cells.counts()
        )
        self.slots: dict[tuple[str, Tier], int] = {}
        for (kind, of_experts), tier in itertools.product(
            (("weights", False), ("experts", True)), TIERS
        ):
            loads = _sizes(pure[tier]).loads
            self.slots[kind, tier] = sum(
                loads.only(n.start + np.flatnonzero(units[n.start : n.stop] == of_experts)).most(
                    [tier]
                )
                for n in stages
            )
        self._times(found)

    def _row(self) -> np.ndarray:
        return np.zeros(self.shares + 3)

    def _times(self, found: Mapping[Tier, Mapping[str, tuple[Seconds, Seconds]]]) -> None:
        rows, limits = [], []
        count = self.shares
        weight = self._row()
        weight[:count] = [0, 1e-9, 2e-9] * len(self.kinds)  # of what costs nothing, the nearest
        for phase in (0, 1):
            base = found[Tier.DEVICE]["compute"][phase]
            names = {
                lane for kinds in found.values() for kind in kinds.values() for lane in kind[phase]
            }
            for lane in sorted(names):
                row = self._row()
                for i, kind in enumerate(self.kinds):
                    for j, tier in enumerate(TIERS):
                        row[3 * i + j] = found[tier][kind][phase].get(lane, 0.0)
                        if kind == "cache":  # attention is where the cache is
                            row[3 * i + j] += found[tier]["compute"][phase].get(
                                lane, 0.0
                            ) - base.get(lane, 0.0)
                weight[:count] += np.maximum(row[:count], 0)
                row[count + phase] = -1
                rows.append(row)
                limits.append(-base.get(lane, 0.0))
        self.rows, self.upper = rows, limits
        # Each second of moving is in two lanes, the stream's and the link's.
        self.cost = (CONTENTION / 2 if self.shared else _TIE) * weight
        self.cost[count : count + 2] = 1

    def memory(
        self, limits: Limits, less: Mapping[Tier, float]
    ) -> tuple[list[np.ndarray], list[float]]:
        """What lies in each tier, and the slots and buffers that moving it takes.

        The last rows say how large a slot is: at least as the largest that moves; of weights, the
        share of it that does.

        Of several stages together: that no one of them has more than its own is seen when the
        shares are dealt out.
        """
        device, host, disk = self._row(), self._row(), self._row()
        for i, kind in enumerate(self.kinds):
            for j, row in enumerate((device, host, disk)):
                row[3 * i + j] = self.nbytes[kind]
        device[-1] = self.weight_slots * _SCALE
        slots = []
        for kind in ("weights", "experts")[: 1 + ("experts" in self.kinds)]:
            slot = self._row()
            slot[-1] = -_SCALE
            first = 3 * self.kinds.index(kind)
            for j, tier in enumerate(TIERS[1:], 1):
                if not (self.shared and tier is Tier.HOST):
                    slot[first + j] += self.slots[kind, tier]
            slots.append(slot)
        host[5] = self.buffers
        devices = self.hosts if self.shared else self.num_stages
        room = [
            devices * limits.device - self.idle - self.num_stages * self.workspace,
            self.hosts * limits.host,
            self.hosts * limits.disk,
        ]
        room[0 if self.shared else 1] -= self.hosts * limits.aside
        rows = [device, host, disk, *slots]
        if self.shared:
            # Buffers beyond the host's own room come out of the one memory.
            tail = host[5]
            host = host.copy()
            host[5] = 0
            device[5] += tail
            rows[1] = host
        most = [r - less[tier] for r, tier in zip(room, TIERS, strict=True)]
        return rows, most + [0.0] * len(slots)

    def solve(
        self,
        limits: Limits,
        less: Mapping[Tier, float],
        fixed: Mapping[str, Any],
        *,
        together: bool = False,
    ) -> Solution | None:
        """The best shares; None: there are none.

        Args:
            less: Than the limits, so much room.
            fixed: Fields of the policy; of these splits there is nothing to choose.
            together: Experts are to lie where the other weights do.
        """
        from scipy.optimize import linprog  # slow to import

        rows, room = self.memory(limits, less)
        equal = [self._row() for _ in self.kinds]
        bounds: list[tuple[float, float | None]]
        bounds = [(0.0, 1.0)] * self.shares + [(0.0, None)] * 3
        for i, kind in enumerate(self.kinds):
            equal[i][3 * i : 3 * i + 3] = 1
            if fixed.get(kind) is not None:
                shares = fixed[kind].shares()
                for j, tier in enumerate(TIERS):
                    bounds[3 * i + j] = (shares[tier] / 100, shares[tier] / 100)
        total = [1.0] * len(self.kinds)
        if "experts" in self.kinds and together:
            for j in range(len(TIERS)):
                row = self._row()
                row[j], row[3 * self.kinds.index("experts") + j] = 1, -1
                equal.append(row)
                total.append(0.0)
        solution = linprog(
            self.cost,
            A_ub=np.vstack([*self.rows, *(row / _SCALE for row in rows)]),
            b_ub=np.array([*self.upper, *(r / _SCALE for r in room)]),
            A_eq=np.vstack(equal),
            b_eq=np.array(total),
            bounds=bounds,
            method="highs",
        )
        if solution.x is None or not solution.success:
            return None
        splits = {
            kind: fixed.get(kind) or _split(solution.x[3 * i : 3 * i + 3])
            for i, kind in enumerate(self.kinds)
            if not (kind == "experts" and together)
        }
        least = float(sum(solution.x[self.shares : self.shares + 2]))
        return Solution(splits, solution.fun * self.blocks, least * self.times)


def _split(shares: np.ndarray) -> Split:
    """In tenths of a percent; what rounding leaves goes to the slowest tier that has any."""
    tenths = [math.floor(1000 * float(s) + 1e-6) for s in np.clip(shares, 0, 1)]
    slowest = max(j for j in range(3) if shares[j] > 1e-9)
    tenths[slowest] += 1000 - sum(tenths)
    return Split(**{tier.value: t / 10 for tier, t in zip(TIERS, tenths, strict=True)})


def _sizes(workload: Workload) -> Sizes:
    assert workload.sizes is not None
    return workload.sizes
