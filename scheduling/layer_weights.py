"""What loads of layers bring: there are many layers, a unit of experts is one, and few kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scheduling.policy import Tier

_TIERS = tuple(Tier)


class LayerWeights(Sequence[Mapping[Tier, int]]):
    """Of each layer, tier -> bytes of its weights there.

    Attributes:
        nbytes: (kinds, tiers) Those that there are, no two of them equal.
        codes: (layers,) Which of the kinds each is.
    """

    def __init__(self, nbytes: np.ndarray, codes: np.ndarray) -> None:
        self.nbytes, self.codes = nbytes, codes
        self._kinds: list[Mapping[Tier, int]] = [
            dict(zip(_TIERS, row, strict=True)) for row in nbytes.tolist()
        ]

    @classmethod
    def of(cls, weights: Sequence[Mapping[Tier, int]]) -> LayerWeights:
        """``weights``; a tier that is left out has none."""
        if isinstance(weights, cls):
            return weights
        rows = [[by_tier.get(tier, 0) for tier in _TIERS] for by_tier in weights]
        return cls.of_rows(np.array(rows, np.int64).reshape(-1, len(_TIERS)))

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> LayerWeights:
        """(layers, tiers)"""
        kinds: dict[tuple[int, ...], int] = {}
        codes = [kinds.setdefault(row, len(kinds)) for row in map(tuple, rows.tolist())]
        nbytes = np.array(list(kinds), np.int64).reshape(-1, len(_TIERS))
        return cls(nbytes, np.array(codes, np.int64))

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return LayerWeights(self.nbytes, self.codes[layer])
        return self._kinds[self.codes[layer]]

    def __len__(self) -> int:
        return len(self.codes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self.codes.tolist()))

    def most(self, tiers: Sequence[Tier]) -> int:
        """The most bytes that a layer has in ``tiers`` together."""
        columns = [_TIERS.index(tier) for tier in tiers]
        of_kinds = self.nbytes[:, columns].sum(axis=1)
        return int(of_kinds[self.codes].max(initial=0))

    def total(self, tier: Tier) -> int:
        """Bytes of all layers in ``tier``."""
        return int(self.nbytes[:, _TIERS.index(tier)][self.codes].sum())

    def only(self, layers: Sequence[int] | np.ndarray) -> LayerWeights:
        """Of these layers."""
        return LayerWeights(self.nbytes, self.codes[np.asarray(layers, np.int64)])
