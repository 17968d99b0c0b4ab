"""Which tensor lies in which tier: whole tensors, evenly over the layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from scheduling.policy import Split, Tier

_TIERS = tuple(Tier)


def place(sizes: Sequence[int], split: Split) -> list[Tier]:
    """Deals cells to tiers by error diffusion over their bytes, in the given order.

    Each cell goes to the tier that is furthest behind its share of the bytes so far, this cell
    included, so that the percentages hold over any stretch of layers and traffic is even. A tier
    of 0 percent gets nothing.

    After any prefix, no tier of three is more than 2/3 of the largest cell above its share, nor
    more than 5/6 below it; of two tiers, more than 1/2 either way. (In general (n - 1)/n above:
    the largest of n deficits, which sum to the cell, is at least their mean. And 1/2 + ... + 1/n
    below: the mean of the k largest deficits exceeds that of the k + 1 largest by at most
    1/(k + 1) of a cell.)

    Raises:
        ValueError: a negative size.
    """
    return [_TIERS[number] for number in place_numbers(sizes, split)]


def place_numbers(sizes: Sequence[int], split: Split) -> list[int]:
    """The same, as numbers of the tiers.

    Raises:
        ValueError: a negative size.
    """
    if sizes and min(sizes) < 0:
        raise ValueError(f"a cell cannot have {min(sizes)} bytes")
    of_tiers = [share / 100 for share in split.shares().values()]
    tiers = [number for number, share in enumerate(of_tiers) if share > 0]
    if len(tiers) == 1:
        return tiers * len(sizes)
    shares = [of_tiers[number] for number in tiers]
    given = [0] * len(tiers)
    places = range(1, len(tiers))
    total = 0
    found = []
    for nbytes in sizes:
        total += nbytes
        chosen, most = 0, shares[0] * total - given[0]
        for place in places:
            behind = shares[place] * total - given[place]
            if behind > most:
                chosen, most = place, behind
        given[chosen] += nbytes
        found.append(tiers[chosen])
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """A tensor and where it lies."""

    name: str
    nbytes: int
    tier: Tier


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where every tensor of one kind lies."""

    cells: tuple[Cell, ...] = dataclasses.field(repr=False)

    @classmethod
    def of(cls, cells: Iterable[tuple[str, int, Tier]]) -> Placement:
        """From (name, bytes, tier) triples."""
        return cls(tuple(Cell(*cell) for cell in cells))

    def nbytes(self, tier: Tier | None = None) -> int:
        """Bytes in ``tier``; None: in all."""
        return sum(c.nbytes for c in self.cells if tier is None or c.tier is tier)

    def percent(self, tier: Tier) -> float:
        """Share of the bytes, in percent, as it really came out."""
        total = self.nbytes()
        return 100 * self.nbytes(tier) / total if total else 0.0

    def count(self, tier: Tier) -> int:
        """Tensors in ``tier``."""
        return sum(c.tier is tier for c in self.cells)

    def table(self) -> list[tuple[str, int, int, float]]:
        """A row per tier, for printing: tier, cells, bytes, percent."""
        return [(t.value, self.count(t), self.nbytes(t), self.percent(t)) for t in Tier]

    def to_json(self) -> dict[str, Any]:
        """Per tier: cells, bytes, percent."""
        return {
            tier: {"cells": cells, "nbytes": nbytes, "percent": round(percent, 3)}
            for tier, cells, nbytes, percent in self.table()
        }

    def describe(self, what: str) -> str:
        """One line for a person: where anything lies."""
        parts = [
            f"{tier} {percent:.1f}% ({_size(nbytes)}, {cells} tensor{'s' * (cells != 1)})"
            for tier, cells, nbytes, percent in self.table()
            if cells
        ]
        return f"{what}: " + (", ".join(parts) or "none")


def _size(nbytes: int) -> str:
    """In GB, or in a unit in which it is not 0.000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.1 * scale:
            value = nbytes / scale
            return f"{value:.{2 - (value >= 10) - (value >= 100)}f} {unit}"
    return f"{nbytes} bytes"
