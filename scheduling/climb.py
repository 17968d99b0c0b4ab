"""Uphill by simulation: what an estimate by the busiest lane cannot see is what waits for what.

Shares that keep all links busy at once make cells of unequal kinds follow one another, and a stream
holds few of them ahead: so purer splits may be faster though a link is idle then. From the best
candidates on, their neighbours are simulated: other splits of the same shape, and other shapes; but
none that could not be faster even if nothing ever waited.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from scheduling.candidates import Candidate
from scheduling.linear_program import SPLITS
from scheduling.policy import Policy, Split, Tier
from scheduling.shapes import Shapes

# What an estimate may be too high by: shares and steps are whole numbers.
_SLACK = 0.98
# How many are gone on from, and within what of the best.
_TOPS, _NEAR = 6, 1.05
# Of each method, and of each tier that all of the cache may lie in.
_STARTS = 2
# Operations, cells and layers (``Dealer.work``) after which nothing more is gone on from; near a
# policy that is known already, less.
_WORK, _WORK_NEAR = 500_000, 30_000
_SHIFTS = (10.0, 30.0)  # percent


def climb(search: Shapes, start: Sequence[Candidate]) -> list[Candidate]:
    """All that were simulated, the best first."""
    return _Climb(search).run(start)


def pure_starts(search: Shapes) -> list[Candidate]:
    """Of each method, the shapes that are best with all of the cache in one tier: what they are
    estimated to take, simulations come near."""
    if "cache" in search.fixed:
        return []
    # With any of the cache elsewhere a shape is no slower: those that are best so come first.
    ranked = sorted(
        (
            (value, number, policy)
            for number, (policy, value) in enumerate(search.values.items())
            if value is not None
        ),
        key=lambda each: each[:2],
    )
    by_method: dict[object, list[tuple[float, int, Policy]]] = {}
    for each in ranked:
        methods = tuple(getattr(each[2], name) for name in search.allow)
        by_method.setdefault(methods, []).append(each)
    found: list[Candidate | None] = []
    for tier in _tiers(search):
        fixed = search.fixed | {"cache": _all(tier)}
        for shapes in by_method.values():
            best: list[tuple[float, int, Policy]] = []
            for value, number, policy in shapes:
                if len(best) == _STARTS and value * (1 - 1e-6) > best[-1][0]:
                    break
                solution = search.solution(policy, fixed)
                if solution is not None:
                    best.append((solution.seconds, number, policy))
                    best = sorted(best, key=lambda each: each[:2])[:_STARTS]
            found += [search.rounded(policy, fixed) for _, _, policy in best]
    return [candidate for candidate in found if candidate is not None]


class _Climb:
    def __init__(self, search: Shapes) -> None:
        self.search, self.dealer = search, search.dealer
        self.simulated: dict[Policy, Candidate] = {}
        self.tried: set[object] = set()
        self.best = float("inf")

    def run(self, start: Sequence[Candidate]) -> list[Candidate]:
        for candidate in sorted(start, key=lambda each: each.seconds):
            self._simulate(candidate)
        if not self.simulated:  # whose methods do not matter, as they are fixed
            best = min(start, key=lambda each: each.seconds)
            self.simulated[best.policy] = self.dealer.simulated(best)
        end = self.dealer.work + (_WORK if self.search.near is None else _WORK_NEAR)
        gone: set[Policy] = set()
        while self.dealer.work < end:
            tops = [
                c
                for c in self._ranked()[:_TOPS]
                if c.policy not in gone and c.seconds <= _NEAR * self.best
            ]
            if not tops:
                break
            gone.add(tops[0].policy)
            for near in self._around(tops[0].policy):
                self._simulate(near)
                if self.dealer.work >= end:
                    break
        return self._ranked()

    def _ranked(self) -> list[Candidate]:
        return sorted(self.simulated.values(), key=lambda candidate: candidate.seconds)

    def _simulate(self, candidate: Candidate | None) -> None:
        if candidate is None or candidate.policy in self.simulated:
            return
        if candidate.seconds * _SLACK >= self.best or not self.search.differs(candidate):
            return
        found = self.simulated[candidate.policy] = self.dealer.simulated(candidate)
        self.best = min(self.best, found.seconds)

    def _around(self, policy: Policy) -> Iterator[Candidate | None]:
        """Neighbours of a policy that may be faster than the best.

        Of several stages the shape decides most, since they wait for one another, and all layers
        are simulated: if another shape is better, nothing else is tried with this one.
        """
        several = policy.num_stages > 1
        if several:
            best = self.best
            yield from self._of_other_shapes(policy)
            if self.best < best:
                return
        here = self.search.shape(policy)
        choices = {name: getattr(policy, name) for name in self.search.allow}
        for methods in self._methods(choices):
            yield from self._pure(dataclasses.replace(here, **methods))
        if not several:
            yield from self._of_other_shapes(policy)
        yield from self._shifted(policy)

    def _of_other_shapes(self, policy: Policy) -> Iterator[Candidate | None]:
        here = self.search.shape(policy)
        choices = {name: getattr(policy, name) for name in self.search.allow}
        for shape in self.search.neighbours(policy, both=True):
            yield self.search.attempt(shape, choices, self.best / _SLACK)
            rows, count = shape
            there = dataclasses.replace(here, device_batch_size=rows, num_device_batches=count)
            if self.search.possible(shape):
                yield self._with(there, {"cache": policy.cache, "hidden": policy.hidden})
                if policy.experts is not None:
                    yield self._with(
                        there,
                        {k: getattr(policy, k) for k in ("weights", "cache", "hidden")},
                    )

    def _methods(self, choices: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """These, and those with attention elsewhere."""
        yield choices
        if "host_attention" in choices:
            yield choices | {"host_attention": not choices["host_attention"]}

    def _pure(self, shape: Policy) -> Iterator[Candidate | None]:
        """Cache and hidden states each all in one tier, and the weights where there is room."""
        for cache, hidden in itertools.product(_tiers(self.search), repeat=2):
            yield self._with(shape, {"cache": _all(cache), "hidden": _all(hidden)})

    def _with(self, shape: Policy, splits: dict[str, Split]) -> Candidate | None:
        """The best with these splits, if it may be faster than the best so far."""
        fixed = splits | self.search.fixed
        key = shape, tuple(fixed.get(kind) for kind in ("weights", "cache", "hidden", "experts"))
        if key in self.tried:
            return None
        self.tried.add(key)
        return self.search.rounded(shape, fixed, within=self.best / _SLACK)

    def _shifted(self, policy: Policy) -> Iterator[Candidate | None]:
        """A part of one kind of tensors in another tier. If there is no room for it, the weights
        make some; for weights the experts do, or else the cache."""
        for kind in ("weights", "cache", "hidden", "experts"):
            split = getattr(policy, kind)
            if split is None or kind in self.search.fixed:
                continue
            for moved in self._moved(split):
                key = policy, kind, moved
                if key in self.tried:
                    continue
                self.tried.add(key)
                found = self.dealer.dealt(policy, {kind: moved}, {})
                if found is None:
                    free = {"weights", "experts"} - {kind}
                    if kind == "weights" and policy.experts is None:
                        free = {"cache"}
                    kept = {k: getattr(policy, k) for k in SPLITS if k not in free}
                    found = self._with(self.search.shape(policy), kept | {kind: moved})
                yield found

    def _moved(self, split: Split) -> Iterator[Split]:
        shares = {tier.value: share for tier, share in split.shares().items()}
        for give, take in itertools.permutations(shares, 2):
            if take == Tier.HOST.value and self.dealer.limits.shared:
                continue
            for shift in sorted({min(most, shares[give]) for most in _SHIFTS} - {0.0}):
                left = round(shares[give] - shift, 6)
                others = sum(s for tier, s in shares.items() if tier not in (give, take))
                yield Split(**shares | {give: left, take: round(100 - left - others, 6)})


def _tiers(search: Shapes) -> list[Tier]:
    """Those that are not one and the same."""
    return [t for t in Tier if not (search.limits.shared and t is Tier.HOST)]


def _all(tier: Tier) -> Split:
    return Split(**{t.value: 100 if t is tier else 0 for t in Tier})
