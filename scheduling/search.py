"""The best policy for a job: block shapes by enumeration, percentages by a linear program, and then
the integer placement and the simulation of the best and of what is near (``scheduling.climb``), so
that what is promised is what will run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from scheduling.candidates import Candidate, shape_of, size
from scheduling.climb import climb, pure_starts
from scheduling.collecting import no_collecting
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.linear_program import SPLITS
from scheduling.policy import Policy, Split
from scheduling.remembered import Blocks
from scheduling.schedules import Schedule
from scheduling.shapes import CHOICES, EXACT, Shapes

# Where looking begins.
_SIZES = (1, 4, 16, 64, 256)
# How many are dealt out, of which methods, and simulated.
_DEALT, _DEALT_OF_EACH = 8, 2
_SIMULATED, _ALSO_SIMULATED = 3, 3
# How many are simulated with all their layers, and within what of the best.
_IN_WHOLE, _ALIKE = 4, 1.03
_CLOSE = 1.1  # what an estimate may be off by


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
    schedule: Schedule,
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
    with no_collecting():
        searching = _Search(blocks, hardware, limits, schedule, requests, fields, allow, near)
        return searching.run(uphill)


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


class _Search(Shapes):
    def run(self, uphill: bool) -> Found:
        choices = [{}, *self._choices()]
        if self.near is not None:  # others are tried uphill
            choices = [{name: getattr(self.near, name) for name in self.allow}]
        for chosen in choices:
            self._look(chosen)
        fitting = self._fitting(choices)
        promising = _promising(list(filter(self.differs, fitting)) or fitting)
        for candidate in tuple(promising):
            promising += self._purer(candidate)
        if self.near is None and uphill:
            promising += pure_starts(self)
        elif self.near is not None:
            splits = {kind: getattr(self.near, kind) for kind in (*SPLITS, "experts")} | self.fixed
            shape = self.value(_shape(self.near), {n: getattr(self.near, n) for n in self.allow})
            same = None if shape is None else self.dealer.dealt(shape, splits, {})
            promising += [] if same is None else [same]
        found = climb(self, promising) if uphill else promising
        best, *others = self._in_whole(found) if uphill else found
        return Found(best=best, others=tuple(others), considered=len(self.values))

    def _in_whole(self, found: Sequence[Candidate]) -> list[Candidate]:
        """The best of a few shapes, of which all layers are simulated, before the rest.

        What a few layers say of shapes that are unlike may be off by some percent.
        """
        first: dict[tuple[int, int], Candidate] = {}
        for candidate in found:
            if candidate.seconds <= _ALIKE * found[0].seconds and len(first) < _IN_WHOLE:
                first.setdefault(_shape(candidate.policy), candidate)
        if len(first) < 2:
            return list(found)
        ranked = sorted(map(self.dealer.in_whole, first.values()), key=_seconds)
        there = {candidate.policy for candidate in ranked}
        return ranked + [c for c in found if c.policy not in there]

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

    def _purer(self, candidate: Candidate) -> list[Candidate]:
        """The same shape with what every pass uses on the device before any experts are; or with
        all experts on the host, and maybe the other weights too.

        The first are the other weights, and maybe cache and hidden states. The program deals in
        shares, and where links have time to spare it leaves some of them elsewhere; but that is
        whole tensors, which a pass may wait for.
        """
        policy = candidate.policy
        if policy.experts is None:
            return []
        here, there = Split(), Split(device=0, host=100)
        of_kinds = [{"weights": here}, dict.fromkeys(SPLITS, here)]
        if not self.limits.shared:
            of_kinds += [{"experts": there}, {"experts": there, "weights": there}]
        found = []
        for splits in of_kinds:
            near = splits | self.fixed
            if any(getattr(policy, kind) != near[kind] for kind in splits):
                found.append(self.rounded(self.shape(policy), near, together=False))
        return [c for c in found if c is not None]

    def _look(self, choices: Mapping[str, Any]) -> None:
        """A coarse grid of shapes, or those near the best so far; then uphill."""
        if self.near is not None:
            self.value(_shape(self.near), choices)
        elif choices:
            for best in self._ranked({})[:3]:
                self.value(_shape(best), choices)
        changed = {n for n, chosen in choices.items() if getattr(self.base, n) != chosen}
        everywhere = self.near is None and changed <= set(EXACT)
        if everywhere or not self._ranked(choices):
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

    def _nothing_fits(self) -> NothingFitsError:
        room = self.limits
        least = f"; {self.dealer.nearest}" if self.dealer.nearest else ""
        aside = f" ({size(room.aside)} of it are set aside)" if room.aside else ""
        device = f"device {size(room.device)}{aside if room.shared else ''}, "
        host = f"host {size(room.host)}{'' if room.shared else aside}, "
        host = "" if room.shared and not room.host else host
        return NothingFitsError(
            f"nothing fits within {device}{host}disk {size(room.disk)}"
            f"{least}: give more memory, shorter prompts, or 4-bit weights"
        )


def _shape(policy: Policy) -> tuple[int, int]:
    return policy.device_batch_size, policy.num_device_batches


def _seconds(candidate: Candidate) -> float:
    return candidate.seconds
