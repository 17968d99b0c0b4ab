"""The best policy for a job: block shapes by enumeration, percentages by a linear program, and then
the integer placement and the simulation of the best, so that what is promised is what will run.

The program's solution is rounded by dealing out whole tensors; where that does not fit, it is
solved again with less room.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

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
from scheduling.linear_program import CONTENTION, SPLITS, Program, with_splits
from scheduling.ops import Op
from scheduling.peak import room_nbytes
from scheduling.policy import Policy, Split, Tier
from scheduling.registered import is_ours
from scheduling.transforms import serialized
from scheduling.workload import Workload

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "host_attention": (False, True),
    "weight_bits": (None, 8, 4),
    "cache_bits": (None, 8, 4),
    "attention_sparsity": (1.0, 0.1),
}
# Where looking begins, and where it ends.
_SIZES, _MOST_REQUESTS = (1, 4, 16, 64, 256), 256
_BATCHES, _MOST_BATCHES = (1, 4, 16), 20
_SIMULATED, _ALSO_SIMULATED = 3, 3
_CLOSE = 1.03  # what an estimate may be off by
_LARGE = 1000  # computations of a step
_LAYERS = 12  # that are simulated
_SHAPES = 16  # whose issues are kept
_TRIES = 10
_STEPS = (0, 25, 50, 75, 100)

# The blocks of a policy, and how many there are like each; the one that takes most memory first.
Blocks = Callable[[Policy], Sequence[tuple[Workload, float]]]


class NothingFitsError(ValueError):
    """There is no policy within the limits; the message says what the least would take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A policy that fits.

    Attributes:
        seconds: Of the whole job, estimated.
        simulated: By simulation, or else by the linear program's model.
    """

    policy: Policy
    seconds: float
    simulated: bool = False


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
            shape = f"{other.policy.device_batch_size} x {other.policy.num_device_batches}"
            text += f"; next: {shape}, {other.seconds / self.best.seconds:.2f} times as long"
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
) -> Found:
    """The policy with which a job of ``requests`` takes the least time within ``limits``.

    Args:
        blocks: Knows the model: what the job's blocks are under a policy.
        schedule: That will run. Steps are taken to follow one another (``estimate``).
        fixed: Fields of the policy that are given.
        allow: Of ``CHOICES``: methods that may be used though they change results slightly, or
            where attention is computed; without, only what is fixed is.

    Raises:
        NothingFitsError: no policy within the limits.
        ValueError: an unknown field or choice.
    """
    return _Search(blocks, hardware, limits, schedule, requests, dict(fixed or {}), allow).run()


def best_near(
    blocks: Blocks,
    hardware: Hardware,
    limits: Limits,
    policy: Policy,
    *,
    schedule: Callable[[Workload], Iterable[Op]],
    fixed: Mapping[str, Any],
) -> float | None:
    """Estimated seconds of a job with the best policy near ``policy``'s shape; None: none fits."""
    found = _Search(blocks, hardware, limits, schedule, 10**9, dict(fixed), ())
    size, batches = policy.device_batch_size, policy.num_device_batches
    for shape in ((size, batches), (size, 2 * batches)):
        found.attempt(*shape, {})
    return min((c.seconds for c in found.fitting()), default=None)


def _promising(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best few, and with experts, of other batch sizes what comes close: it may wait less."""
    found = list(candidates[:_SIMULATED])
    if found[0].policy.experts is None:
        return found
    sizes = {c.policy.device_batch_size for c in found}
    for candidate in candidates[_SIMULATED:]:
        if len(found) == _SIMULATED + _ALSO_SIMULATED:
            break
        size = candidate.policy.device_batch_size
        if size not in sizes and candidate.seconds <= _CLOSE * candidates[0].seconds:
            sizes.add(size)
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
    ) -> None:
        self.base = Policy(**fixed)  # names what is unknown or out of range
        self.blocks, self.hardware, self.limits = blocks, hardware, limits
        self.schedule = schedule if self.base.overlap else serialized(schedule)
        self.issues = bound_by(self.schedule)
        if is_ours(schedule):  # which do not look at sizes: a shape's issues are always the same
            issues = functools.lru_cache(maxsize=_SHAPES)(
                lambda w: tuple(bound_by(self.schedule)(w))
            )
            self.issues = lambda w: issues(dataclasses.replace(w, sizes=None))
        self.requests, self.fixed = requests, fixed
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
        self.solved: dict[Policy, Candidate | None] = {}
        self.least: tuple[float, str] | None = None  # the smallest excess, for the message

    def run(self) -> Found:
        self._look({})
        for choices in self._choices():
            self._look(choices)
        if not self.fitting():
            raise self._nothing_fits()
        # On the host nothing is attended to where all of the cache lies on the device.
        distinct = [
            c for c in self.fitting() if not c.policy.host_attention or c.policy.cache.device < 100
        ]
        promising = _promising(distinct or self.fitting())
        for candidate in promising[:_SIMULATED]:
            promising += self._before_experts(candidate)
        simulated = sorted(map(self._simulated, promising), key=_seconds)
        return Found(best=simulated[0], others=tuple(simulated[1:]), considered=len(self.solved))

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
                found.append(self._rounded(policy, near, together=False))
        return [c for c in found if c is not None]

    def _look(self, choices: Mapping[str, Any]) -> None:
        """A coarse grid of shapes, or those near the best so far; then uphill."""
        if choices:
            for best in self.fitting()[:3]:
                shape = best.policy.device_batch_size, best.policy.num_device_batches
                self.attempt(*shape, choices)
        if not self._with(choices):
            given = self.fixed
            sizes = (given["device_batch_size"],) if "device_batch_size" in given else _SIZES
            fixed = "num_device_batches" in given
            batches = (given["num_device_batches"],) if fixed else self.counts
            for size, count in itertools.product(sizes, batches):
                self.attempt(size, count, choices)
        climbed: set[Policy] = set()
        while True:
            tops = [c for c in self._with(choices)[:2] if c.policy not in climbed]
            if not tops:
                return
            for top in tops:
                climbed.add(top.policy)
                for shape in self._neighbours(top.policy):
                    self.attempt(*shape, choices)

    def _neighbours(self, policy: Policy) -> Iterator[tuple[int, int]]:
        size, batches = policy.device_batch_size, policy.num_device_batches
        if "device_batch_size" not in self.fixed:
            for other in (size // 2, size * 3 // 4, size * 3 // 2, size * 2):
                if 1 <= other <= _MOST_REQUESTS and other % (4 if other > 4 else 1) == 0:
                    yield other, batches
        if "num_device_batches" not in self.fixed:
            for other in sorted({batches // 2, batches * 3 // 4, batches * 3 // 2, batches * 2}):
                if 1 <= other <= self.most_batches:
                    yield size, other

    def _with(self, choices: Mapping[str, Any]) -> list[Candidate]:
        """Those of the fitting that make these choices."""
        return [
            c
            for c in self.fitting()
            if all(getattr(c.policy, name) == value for name, value in choices.items())
        ]

    def fitting(self) -> list[Candidate]:
        """Those that fit, the best first."""
        return sorted(filter(None, self.solved.values()), key=_seconds)

    def _choices(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*(CHOICES[name] for name in self.allow)):
            choices = dict(zip(self.allow, values, strict=True))
            if any(getattr(self.base, name) != value for name, value in choices.items()):
                yield choices

    def attempt(self, size: int, batches: int, choices: Mapping[str, Any]) -> None:
        """Solves one shape, unless the job is too small for it or it is known."""
        if size > 1 and size >= 2 * self.requests and "device_batch_size" not in self.fixed:
            return
        few = size * (batches - 1) >= self.requests  # the last batch would be empty
        if batches > 1 and few and "num_device_batches" not in self.fixed:
            return
        policy = dataclasses.replace(
            self.base, device_batch_size=size, num_device_batches=batches, **choices
        )
        if policy not in self.solved:
            self.solved[policy] = self._solve(policy)

    def _solve(self, policy: Policy) -> Candidate | None:
        """The best shares of a shape, dealt out and found to fit."""
        if not any(name in self.fixed for name in SPLITS):
            found = self._dealt(policy, {}, {})
            if found is not None:
                return found  # everything on the device
        # What is said of weights holds for experts, unless those are said.
        together = self.base.experts is None and bool({"weights", "experts"} & set(self.fixed))
        return self._rounded(policy, self.fixed, together=together) or self._in_steps(policy)

    def _rounded(
        self, policy: Policy, fixed: Mapping[str, Any], *, together: bool
    ) -> Candidate | None:
        """The program's solution, solved with ever less room until it fits as it is dealt out."""
        less = dict.fromkeys(Tier, 0.0)
        program = Program(policy, self.blocks, self.hardware, self.limits, fixed, together=together)
        for attempt in range(_TRIES):
            splits = program.solve(less)
            if splits is None:
                break
            over: dict[Tier, float] = {}
            found = self._dealt(policy, splits, over)
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
            found.append(self._dealt(policy, splits, {}))
        return min(filter(None, found), key=_seconds, default=None)

    def _dealt(
        self, policy: Policy, splits: Mapping[str, Split], less: dict[Tier, float]
    ) -> Candidate | None:
        """The policy with these splits, or None: it does not fit, by what is added to ``less``."""
        dealt = with_splits(policy, splits)
        blocks = self.blocks(dealt)
        over = self.limits.exceeded(room_nbytes(blocks[0][0], shared=self.limits.shared))
        if not over:
            seconds = sum(count * self._seconds(workload) for workload, count in blocks)
            return Candidate(policy=dealt, seconds=seconds)
        excess = sum(over.values())
        if self.least is None or excess < self.least[0]:
            words = ", ".join(f"{t.value} {_size(n)}" for t, n in over.items())
            self.least = excess, f"nearest, {size_of(policy)}: too much by {words}"
        for tier, nbytes in over.items():
            # What the fullest device or host has too much, all of them are to have less.
            hosts = max(1, len(set(blocks[0][0].hosts)))
            of_device = tier is Tier.DEVICE and not self.limits.shared
            several = policy.num_stages if of_device else hosts
            less[tier] = less.get(tier, 0.0) + 1.05 * nbytes * several
        return None

    def _seconds(self, workload: Workload) -> float:
        found = self._lanes(workload)
        contended = CONTENTION * moving(found) if self.limits.shared else 0.0
        return busiest(found) + contended

    def _lanes(self, workload: Workload) -> dict[str, tuple[Seconds, Seconds]]:
        found = lanes(workload, self.hardware)
        return found if self.base.overlap else one_after_the_other(found)

    def _simulated(self, candidate: Candidate) -> Candidate:
        """By how much longer a few layers and steps take than their busiest lane."""
        blocks = self.blocks(candidate.policy)
        few = few_layers(blocks[0][0], _LAYERS)
        steps = 1 if few.num_layers * few.num_batches > _LARGE else 2
        seconds = sum(
            estimate(self.schedule, few, self.hardware, decode_steps=steps, issues=self.issues)
        )
        ratio = seconds / busiest(self._lanes(few))
        return dataclasses.replace(candidate, seconds=candidate.seconds * ratio, simulated=True)

    def _nothing_fits(self) -> NothingFitsError:
        room = self.limits
        least = f"; {self.least[1]}" if self.least else ""
        host = "" if room.shared and not room.host else f"host {_size(room.host)}, "
        return NothingFitsError(
            f"nothing fits within device {_size(room.device)}, {host}disk {_size(room.disk)}"
            f"{least}: give more memory, shorter prompts, or 4-bit weights"
        )


def _size(nbytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes / 1e3:.2f} kB"


def size_of(policy: Policy) -> str:
    """The shape of a policy's block, in words."""
    return f"{policy.device_batch_size} x {policy.num_device_batches}"


def _seconds(candidate: Candidate) -> float:
    return candidate.seconds
