"""The cells of a block's cache: there are many of them, and few kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from scheduling.policy import Tier


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheCell:
    """The cache of one layer and batch.

    Attributes:
        tier: Where it lies.
        hosted: Attention to it is computed on the host.
        position_nbytes: Of one position of all its rows, keys and values, as they are kept.
        loaded: The share of the filled positions' bytes that a load brings to the host's memory.
        sent: The share that goes on to the device: 0 where attention is computed on the host.
        dense_nbytes: Per position: what attending unpacks; 0 if it is kept as it is computed with.
        positions: The most that it keeps, of a layer with a window; None: all of its batch.
    """

    tier: Tier
    position_nbytes: int
    loaded: float = 1.0
    sent: float = 1.0
    dense_nbytes: int = 0
    hosted: bool = False
    positions: int | None = None

    @property
    def apart(self) -> bool:
        """Whether what attends to it is a program of its own, which Attend runs: on the host, or
        of a selection. Else the layer is one program, and its Compute runs it."""
        return self.hosted or self.sent < 1.0

    def kept(self, positions: int) -> int:
        """How many of so many positions it keeps."""
        return positions if self.positions is None else min(positions, self.positions)


class Cells(Mapping[tuple[int, int], CacheCell]):
    """(layer, batch) -> its cell.

    Attributes:
        kinds: Those that there are, no two of them equal.
        codes: (layers, batches) Which of the kinds each is; -1: there is no cell.
    """

    def __init__(self, kinds: Sequence[CacheCell], codes: np.ndarray) -> None:
        numbers: dict[CacheCell, int] = {}
        same = [numbers.setdefault(kind, len(numbers)) for kind in kinds]
        if len(numbers) < len(same):
            codes = np.array([*same, -1], codes.dtype)[codes]
        self.kinds, self.codes = tuple(numbers), codes

    @classmethod
    def of(cls, cells: Mapping[tuple[int, int], CacheCell], layers: int, batches: int) -> Cells:
        """``cells``, of so many layers and batches."""
        if isinstance(cells, cls):
            return cells
        # Most cells are one of a few objects, which is quicker to see than that they are equal.
        numbers: dict[int, int] = {}
        kinds: list[CacheCell] = []
        codes = np.full((layers, batches), -1, np.int16)
        for place, cell in cells.items():
            number = numbers.setdefault(id(cell), len(kinds))
            if number == len(kinds):
                kinds.append(cell)
            codes[place] = number
        return cls(kinds, codes)

    def __getitem__(self, place: Any) -> CacheCell:
        layer, batch = place
        layers, batches = self.codes.shape
        if not (0 <= layer < layers and 0 <= batch < batches):
            raise KeyError(place)
        code = self.codes[layer, batch]
        if code < 0:
            raise KeyError(place)
        return self.kinds[code]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        layers, batches = np.nonzero(self.codes >= 0)
        return zip(layers.tolist(), batches.tolist(), strict=True)

    def __len__(self) -> int:
        return int(np.count_nonzero(self.codes >= 0))

    def counts(self, layers: range | None = None) -> list[tuple[int, CacheCell, int]]:
        """(batch, kind, how many of the batch's cells are of it), for all of the batches.

        Args:
            layers: Of these alone.
        """
        codes = self.codes if layers is None else self.codes[layers.start : layers.stop]
        many, batches = len(self.kinds), codes.shape[1]
        # Of each batch one place for each kind; those without a cell are counted in another one.
        place = codes + 1 + (many + 1) * np.arange(batches)
        counts = np.bincount(place.ravel(), minlength=batches * (many + 1))
        of_batch = counts.reshape(batches, many + 1)[:, 1:]
        found = zip(*(n.tolist() for n in np.nonzero(of_batch)), strict=True)
        return [(b, self.kinds[k], int(of_batch[b, k])) for b, k in found]
