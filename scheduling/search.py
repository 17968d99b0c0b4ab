"""The best policy for a job: block shapes by enumeration, percentages by a linear program, and then
the integer placement and the simulation of the best and of what is near (``scheduling.climb``), so
that what is promised is what will run.

The program's solution is rounded by dealing out whole tensors; where that does not fit, it is
solved again with less room.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from scheduling.candidates import Blocks, Candidate, Dealer, shape_of, size, work_of
from scheduling.climb import climb, pure_starts
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.linear_program import SPLITS, Program, Solution
from scheduling.ops import Op
from scheduling.policy import Policy, Split, Tier
from scheduling.workload import Workload

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "host_attention": (False, True),
    "weight_bits": (None, 8, 4),
    "cache_bits": (None, 8, 4),
    "attention_sparsity": (1.0, 0.1),
}
# Of these, those with which greedy tokens stay the same.
EXACT = ("host_attention",)
# Where looking begins, and where it ends.
_SIZES, _MOST_REQUESTS = (1, 4, 16, 64, 256), 256
_BATCHES, _MOST_BATCHES = (1, 4, 16), 32
# How many are dealt out, of which methods, and simulated.
_DEALT, _DEALT_OF_EACH = 8, 2
_SIMULATED, _ALSO_SIMULATED = 3, 3
_CLOSE = 1.03  # what an estimate may be off by
_TRIES = 10
_SOLVING = 1000  # the work of it (``Dealer.work``)
_STEPS = (0, 25, 50, 75, 100)


class NothingFitsError(ValueError):
    """There is no policy within the limits; the message says what the least would take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        best: The policy to run.
        others: The others that were simulated, the best first.
        considered: How many shapes and choices were looked at.
    """

    best: Candidate
    others: tuple[Candidate, ...]
    considered: int

    def why(self) -> str:
        """One line for a person."""
        text = f"best of {self.considered} considered"
        if self.others:
            other = self.others[0]
            longer = other.seconds / self.best.seconds
            text += f"; next: {shape_of(other.policy)}, {longer:.2f} times as long"
        return text


def search(
    blocks: Blocks,
    hardware: Hardware,
    limits: Limits,
    *,
    schedule: Callable[[Workload], Iterable[Op]],
    requests: int,
    fixed: Mapping[str, Any] | None = None,
    allow: Iterable[str] = (),
    near: Policy | None = None,
    uphill: bool = True,
) -> Found:
    """The policy with which a job of ``requests`` takes the least time within ``limits``.

    Args:
        blocks: Knows the model: what the job's blocks are under a policy.
        schedule: That will run. Steps are taken to follow one another (``estimate``).
        fixed: Fields of the policy that are given.
        allow: Of ``CHOICES``: methods that may be used though they change results slightly, or
            where attention is computed; without, only what is fixed is.
        near: Whose block's shape looking begins with, which is quicker; None: from a grid.
        uphill: Go on from the best to what simulation finds faster; without, only whether anything
            fits is certain.

    Raises:
        NothingFitsError: no policy within the limits.
        ValueError: an unknown field or choice.
    """
    fields = dict(fixed or {})
    return _Search(blocks, hardware, limits, schedule, requests, fields, allow, near).run(uphill)


def _promising(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best few, and with experts, of other batch sizes what comes close: it may wait less."""
    found = list(candidates[:_SIMULATED])
    if found[0].policy.experts is None:
        return found
    sizes = {c.policy.device_batch_size for c in found}
    for candidate in candidates[_SIMULATED:]:
        if len(found) == _SIMULATED + _ALSO_SIMULATED:
            break
        rows = candidate.policy.device_batch_size
        if rows not in sizes and candidate.seconds <= _CLOSE * candidates[0].seconds:
            sizes.add(rows)
            found.append(candidate)
    return found


class _Search:
    def __init__(
        self,
        blocks: Blocks,
        hardware: Hardware,
        limits: Limits,
        schedule: Callable[[Workload], Iterable[Op]],
        requests: int,
        fixed: dict[str, Any],
        allow: Iterable[str],
        near: Policy | None,
    ) -> None:
        self.base = Policy(**fixed)  # names what is unknown or out of range
        self.limits, self.requests, self.fixed, self.near = limits, requests, fixed, near
        self.dealer = Dealer(blocks, hardware, limits, schedule, overlap=self.base.overlap)
        unknown = sorted(set(allow) - set(CHOICES))
        if unknown:
            raise ValueError(
                f"nothing to allow by {', '.join(unknown)}; known: {', '.join(CHOICES)}"
            )
        self.allow = [name for name in CHOICES if name in set(allow) and name not in fixed]
        stages = self.base.num_stages
        # Fewer batches than stages leave stages idle.
        self.counts = _BATCHES if stages == 1 else (stages, 2 * stages, 4 * stages)
        self.most_batches = max(_MOST_BATCHES, self.counts[-1])
        # What is said of weights holds for experts, unless those are said.
        self._together = self.base.experts is None and bool({"weights", "experts"} & set(fixed))
        # By shape and choices: what the program says, and the candidate that it was dealt out to.
        self.values: dict[Policy, float | None] = {}
        self.solved: dict[Policy, Candidate | None] = {}
        self.program = functools.lru_cache(maxsize=None)(self._program)
        self._first = functools.lru_cache(maxsize=None)(
            lambda policy: self.program(policy).solve(
                dict.fromkeys(Tier, 0.0), fixed, together=self._together
            )
        )

    def _program(self, policy: Policy) -> Program:
        dealer = self.dealer
        program = Program(policy, dealer.blocks, dealer.hardware, self.limits)
        dealer.work += sum(map(work_of, program.pure.values()))
        return program

    def run(self, uphill: bool) -> Found:
        choices = [{}, *self._choices()]
        if self.near is not None:  # others are tried uphill
            choices = [{name: getattr(self.near, name) for name in self.allow}]
        for chosen in choices:
            self._look(chosen)
        fitting = self._fitting(choices)
        promising = _promising(list(filter(self.differs, fitting)) or fitting)
        for candidate in promising[:_SIMULATED]:
            promising += self._before_experts(candidate)
        if self.near is None and uphill:
            promising += pure_starts(self)
        elif self.near is not None:
            splits = {kind: getattr(self.near, kind) for kind in (*SPLITS, "experts")} | self.fixed
            shape = self.value(_shape(self.near), {n: getattr(self.near, n) for n in self.allow})
            same = None if shape is None else self.dealer.dealt(shape, splits, {})
            promising += [] if same is None else [same]
        best, *others = climb(self, promising) if uphill else promising
        return Found(best=best, others=tuple(others), considered=len(self.values))

    def _fitting(self, choices: Sequence[Mapping[str, Any]]) -> list[Candidate]:
        """Of the shapes that the program likes best, those that fit as dealt out, the best first.

        Raises:
            NothingFitsError: none of all does.
        """
        wanted = self._ranked({})[:_DEALT]
        for chosen in choices[1:]:
            wanted += [p for p in self._ranked(chosen)[:_DEALT_OF_EACH] if p not in wanted]
        found = [c for c in map(self.solve, wanted) if c is not None]
        if not found:
            found = [c for c in map(self.solve, self.values) if c is not None]
        if not found:
            raise self._nothing_fits()
        return sorted(found, key=_seconds)

    def differs(self, candidate: Candidate) -> bool:
        """Whether its methods matter: nothing is attended to on the host if all of the cache lies
        on the device."""
        policy = candidate.policy
        chosen = policy.host_attention and "host_attention" in self.allow
        return not (chosen and policy.cache.device == 100)

    def _before_experts(self, candidate: Candidate) -> list[Candidate]:
        """The same shape with what every pass uses on the device before any experts are.

        Those are the other weights, and maybe cache and hidden states. The program deals in
        shares, and where links have time to spare it leaves some of them elsewhere; but that is
        whole tensors, which a pass may wait for.
        """
        policy = candidate.policy
        if policy.experts is None:
            return []
        found = []
        for kinds in (("weights",), SPLITS):
            near = {kind: Split() for kind in kinds} | self.fixed
            if any(getattr(policy, kind) != near[kind] for kind in kinds):
                found.append(self.rounded(self.shape(policy), near, together=False))
        return [c for c in found if c is not None]

    def shape(self, policy: Policy) -> Policy:
        """A policy of the same shape and methods, whose splits are not chosen."""
        splits = {kind: getattr(self.base, kind) for kind in (*SPLITS, "experts")}
        return dataclasses.replace(policy, **splits)

    def _look(self, choices: Mapping[str, Any]) -> None:
        """A coarse grid of shapes, or those near the best so far; then uphill."""
        if self.near is not None:
            self.value(_shape(self.near), choices)
        elif choices:
            for best in self._ranked({})[:3]:
                self.value(_shape(best), choices)
        if not self._ranked(choices):
            given = self.fixed
            sizes = (given["device_batch_size"],) if "device_batch_size" in given else _SIZES
            fixed = "num_device_batches" in given
            batches = (given["num_device_batches"],) if fixed else self.counts
            for shape in itertools.product(sizes, batches):
                self.value(shape, choices)
        climbed: set[Policy] = set()
        abreast = 2 if self.near is None else 1
        while True:
            tops = [p for p in self._ranked(choices)[:abreast] if p not in climbed]
            if not tops:
                return
            for top in tops:
                climbed.add(top)
                for shape in self.neighbours(top):
                    self.value(shape, choices)

    def neighbours(self, policy: Policy, *, both: bool = False) -> Iterator[tuple[int, int]]:
        """Shapes of blocks near its own: half to twice as many rows or batches.

        Args:
            both: Also fewer of one and more of the other.
        """
        size, batches = policy.device_batch_size, policy.num_device_batches
        steps = [(a, 1.0) for a in (0.5, 0.75, 1.5, 2.0)] + [(1.0, a) for a in (0.5, 0.75, 1.5, 2)]
        if both:
            steps += [(2.0, 0.5), (0.5, 2.0), (1.5, 0.75), (0.75, 1.5)]
        seen = {(size, batches)}
        for of_size, of_batches in steps:
            rows, count = int(size * of_size), int(batches * of_batches)
            if "device_batch_size" in self.fixed:
                rows = size
            if "num_device_batches" in self.fixed:
                count = batches
            whole = rows % (1 if rows <= 4 else 2 if rows <= 8 else 4) == 0
            possible = 1 <= rows <= _MOST_REQUESTS and 1 <= count <= self.most_batches and whole
            if possible and (rows, count) not in seen:
                seen.add((rows, count))
                yield rows, count

    def _ranked(self, choices: Mapping[str, Any]) -> list[Policy]:
        """Shapes with these choices for which the program has a solution, the best first."""
        there = [
            (value, number, policy)
            for number, (policy, value) in enumerate(self.values.items())
            if value is not None
            and all(getattr(policy, name) == chosen for name, chosen in choices.items())
        ]
        return [policy for _, _, policy in sorted(there, key=lambda each: each[:2])]

    def _choices(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*(CHOICES[name] for name in self.allow)):
            choices = dict(zip(self.allow, values, strict=True))
            if any(getattr(self.base, name) != value for name, value in choices.items()):
                yield choices

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
        return self.program(policy).solve(none, fixed, together=self._together)

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
        less = dict.fromkeys(Tier, 0.0)
        program = self.program(policy)
        for attempt in range(_TRIES):
            if not attempt and fixed is self.fixed and together is self._together:
                solution = self._first(policy)
            else:
                solution = program.solve(less, fixed, together=together)
                self.dealer.work += _SOLVING
            if solution is None or (within is not None and solution.bound >= within):
                break
            over: dict[Tier, float] = {}
            found = self.dealer.dealt(policy, solution.splits, over)
            if found is not None:
                return found
            for tier, nbytes in over.items():
                # Ever more: what is too much may be less than what is dealt out at once.
                less[tier] += nbytes * 2**attempt
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
        return min(filter(None, found), key=_seconds, default=None)

    def _nothing_fits(self) -> NothingFitsError:
        room = self.limits
        least = f"; {self.dealer.nearest}" if self.dealer.nearest else ""
        host = "" if room.shared and not room.host else f"host {size(room.host)}, "
        return NothingFitsError(
            f"nothing fits within device {size(room.device)}, {host}disk {size(room.disk)}"
            f"{least}: give more memory, shorter prompts, or 4-bit weights"
        )


def _shape(policy: Policy) -> tuple[int, int]:
    return policy.device_batch_size, policy.num_device_batches


def _seconds(candidate: Candidate) -> float:
    return candidate.seconds
