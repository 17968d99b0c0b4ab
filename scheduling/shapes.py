"""Shapes of blocks: what a linear program says of one, and the placement that it is dealt out to.

The program's solution is rounded by dealing out whole tensors; where that does not fit, it is
solved again with less room.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from scheduling.candidates import Candidate, Dealer
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.linear_program import SPLITS, Solution
from scheduling.policy import Policy, Split, Tier
from scheduling.remembered import Blocks
from scheduling.schedules import Schedule

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "host_attention": (False, True),
    "weight_bits": (None, 8, 4),
    "cache_bits": (None, 8, 4),
    "attention_sparsity": (1.0, 0.1),
}
# Of these, those with which greedy tokens stay the same.
EXACT = ("host_attention",)
# The largest blocks.
_MOST_REQUESTS, _MOST_BATCHES = 256, 32
_BATCHES = (1, 2, 4, 8, 16, 32)
_TRIES = 10
_SOLVING = 1000  # the work of it (``Dealer.work``)
_STEPS = (0, 25, 50, 75, 100)


class Shapes:
    """What is known of the shapes of a job's blocks; arguments as ``scheduling.search.search``.

    Attributes:
        base: A policy of what is fixed.
        allow: The methods that may be chosen.
        counts: Numbers of batches to begin with.
        values: Of the policies of each shape and choice that was asked for, the seconds that the
            program says; None: it has no solution.
    """

    def __init__(
        self,
        blocks: Blocks,
        hardware: Hardware,
        limits: Limits,
        schedule: Schedule,
        requests: int,
        fixed: dict[str, Any],
        allow: Iterable[str],
        near: Policy | None,
    ) -> None:
        self.base = Policy(**fixed)  # names what is unknown or out of range
        self.limits, self.requests, self.fixed, self.near = limits, requests, fixed, near
        self.dealer = Dealer(blocks, hardware, limits, schedule)
        unknown = sorted(set(allow) - set(CHOICES))
        if unknown:
            raise ValueError(
                f"nothing to allow by {', '.join(unknown)}; known: {', '.join(CHOICES)}"
            )
        self.allow = [name for name in CHOICES if name in set(allow) and name not in fixed]
        stages = self.base.num_stages
        # Fewer batches than stages leave stages idle.
        self.counts = _BATCHES if stages == 1 else (stages, 2 * stages, 4 * stages)
        self.most_batches = max(_MOST_BATCHES // stages * stages, self.counts[-1])
        # What is said of weights holds for experts, unless those are said.
        self._together = self.base.experts is None and bool({"weights", "experts"} & set(fixed))
        # By shape and choices: what the program says, and the candidate that it was dealt out to.
        self.values: dict[Policy, float | None] = {}
        self.solved: dict[Policy, Candidate | None] = {}
        self.program = functools.lru_cache(maxsize=None)(self.dealer.program)
        self._first = functools.lru_cache(maxsize=None)(
            lambda policy: self.program(policy).solve(
                limits, dict.fromkeys(Tier, 0.0), fixed, together=self._together
            )
        )

    def differs(self, candidate: Candidate) -> bool:
        """Whether its methods matter: nothing is attended to on the host if all of the cache lies
        on the device."""
        policy = candidate.policy
        chosen = policy.host_attention and "host_attention" in self.allow
        return not (chosen and policy.cache.device == 100)

    def shape(self, policy: Policy) -> Policy:
        """A policy of the same shape and methods, whose splits are not chosen."""
        splits = {kind: getattr(self.base, kind) for kind in (*SPLITS, "experts")}
        return dataclasses.replace(policy, **splits)

    def neighbours(self, policy: Policy, *, both: bool = False) -> Iterator[tuple[int, int]]:
        """Shapes of blocks near its own: half to twice as many rows or batches, up to the most.

        Args:
            both: Also fewer of one and more of the other.
        """
        size, batches = policy.device_batch_size, policy.num_device_batches
        steps = [(a, 1.0) for a in (0.5, 0.75, 1.5, 2.0)] + [(1.0, a) for a in (0.5, 0.75, 1.5, 2)]
        if both:
            steps += [(2.0, 0.5), (0.5, 2.0), (1.5, 0.75), (0.75, 1.5)]
        shapes = [
            (min(int(size * a), _MOST_REQUESTS), min(self._batches(batches * b), self.most_batches))
            for a, b in steps
        ]
        stages = self.base.num_stages
        if stages > 1:
            shapes = [(size, batches + stages), (size, batches - stages), *shapes]
        seen = {(size, batches)}
        for rows, count in shapes:
            if "device_batch_size" in self.fixed:
                rows = size
            if "num_device_batches" in self.fixed:
                count = batches
            whole = rows % (1 if rows <= 4 else 2 if rows <= 8 else 4) == 0
            possible = 1 <= rows <= _MOST_REQUESTS and 1 <= count <= self.most_batches and whole
            if possible and (rows, count) not in seen:
                seen.add((rows, count))
                yield rows, count

    def _batches(self, count: float) -> int:
        """Of several stages as many for each, so that no one waits for another's."""
        stages = self.base.num_stages
        return int(count) if stages == 1 else stages * round(count / stages)

    def value(self, shape: tuple[int, int], choices: Mapping[str, Any]) -> Policy | None:
        """What the program says of a shape, unless the job is too small for it or it is known."""
        if not self.possible(shape):
            return None
        rows, batches = shape
        policy = dataclasses.replace(
            self.base, device_batch_size=rows, num_device_batches=batches, **choices
        )
        if policy not in self.values:
            solution = self._first(policy)
            self.values[policy] = None if solution is None else solution.seconds
        return policy

    def attempt(
        self, shape: tuple[int, int], choices: Mapping[str, Any], within: float
    ) -> Candidate | None:
        """The best of a shape, if it may take less than ``within`` seconds."""
        policy = self.value(shape, choices)
        if policy is None:
            return None
        solution = self._first(policy)
        if policy not in self.solved and solution is not None and solution.bound >= within:
            return None
        return self.solve(policy)

    def possible(self, shape: tuple[int, int]) -> bool:
        """Whether the job has enough requests for blocks of so many rows and batches."""
        rows, batches = shape
        if rows > 1 and rows >= 2 * self.requests and "device_batch_size" not in self.fixed:
            return False
        few = rows * (batches - 1) >= self.requests  # the last batch would be empty
        return not (batches > 1 and few and "num_device_batches" not in self.fixed)

    def solution(self, policy: Policy, fixed: Mapping[str, Any]) -> Solution | None:
        """What the program says of a shape, with these fields kept."""
        self.dealer.work += _SOLVING
        none = dict.fromkeys(Tier, 0.0)
        return self.program(policy).solve(self.limits, none, fixed, together=self._together)

    def solve(self, policy: Policy) -> Candidate | None:
        """The best shares of a shape, dealt out and found to fit."""
        if policy not in self.solved:
            self.solved[policy] = self._solve(policy)
        return self.solved[policy]

    def _solve(self, policy: Policy) -> Candidate | None:
        if not any(name in self.fixed for name in SPLITS):
            found = self.dealer.dealt(policy, {}, {})
            if found is not None:
                return found  # everything on the device
        return self.rounded(policy, self.fixed) or self._in_steps(policy)

    def rounded(
        self,
        policy: Policy,
        fixed: Mapping[str, Any],
        *,
        together: bool | None = None,
        within: float | None = None,
    ) -> Candidate | None:
        """The program's solution, solved with ever less room until it fits as it is dealt out.

        Args:
            fixed: Fields of the policy that are not to be chosen.
            together: Experts lie where the other weights do; None: where those are fixed.
            within: Nothing that is estimated to take as many seconds is wanted; None: anything is.
        """
        if together is None:
            together = self._together
        less, more = dict.fromkeys(Tier, 0.0), dict.fromkeys(Tier, 0.0)
        program, misfits = self.program(policy), 0
        for attempt in range(_TRIES):
            if not attempt and fixed is self.fixed and together is self._together:
                solution = self._first(policy)
            else:
                room = {tier: less[tier] + more[tier] for tier in Tier}
                solution = program.solve(self.limits, room, fixed, together=together)
                self.dealer.work += _SOLVING
            if solution is None:
                if not misfits:
                    break
                # Too much was taken away: what moving takes is less where less of it has to move.
                more = {tier: nbytes / 2 for tier, nbytes in more.items()}
                continue
            if within is not None and solution.bound >= within:
                break
            over: dict[Tier, float] = {}
            found = self.dealer.dealt(policy, solution.splits, over)
            if found is not None:
                return found
            less = {tier: less[tier] + more[tier] for tier in Tier}
            # Ever more: what is too much may be less than what is dealt out at once.
            more = {tier: over.get(tier, 0.0) * 2**misfits for tier in Tier}
            misfits += 1
        return None

    def _in_steps(self, policy: Policy) -> Candidate | None:
        """The best of a few shares: where tensors are so large that no solution can be rounded."""
        found: list[Candidate | None] = []
        for weights, cache in itertools.product(_STEPS, _STEPS):
            if found and found[0] is None:
                return None  # even what takes least does not fit
            splits = {
                "weights": Split(device=weights, disk=100 - weights),
                "cache": Split(device=cache, disk=100 - cache),
                "hidden": Split(device=0, disk=100),
            }
            splits |= {name: self.fixed[name] for name in SPLITS if name in self.fixed}
            found.append(self.dealer.dealt(policy, splits, {}))
        return min(filter(None, found), key=lambda each: each.seconds, default=None)
