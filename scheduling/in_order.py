"""What ops cost as they come: an op's work may depend on what came before it."""

from __future__ import annotations

from typing import Any

from scheduling.cost_model import CostModel, Piece, Term
from scheduling.ops import Compute, ComputeExperts, LoadChosen, LoadWeights, Project

_COMPUTE = (Project, Compute, ComputeExperts)


class InOrder:
    """Prices ops one by one, in the order in which each stage computes.

    The first computation with a layer that was loaded dequantises it. A Compute behind a Project
    is what is left of the layer.
    """

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._fresh: set[int] = set()  # layers loaded and not computed with yet
        self._projected: set[tuple[int, int]] = set()  # (layer, batch)

    def pieces(self, op: Any) -> tuple[Piece, ...]:
        """Of the next op; see :meth:`CostModel.pieces`."""
        unpack, rest = self._about(op)
        return self._costs.pieces(op, unpack=unpack, rest=rest)

    def terms(self, op: Any) -> list[Term]:
        """Of the next op; see :meth:`CostModel.terms`."""
        unpack, rest = self._about(op)
        return self._costs.terms(op, unpack=unpack, rest=rest)

    def _about(self, op: Any) -> tuple[bool, bool]:
        kind = type(op)
        if kind is LoadWeights or kind is LoadChosen:
            self._fresh.add(op.layer)
            return False, False
        if kind not in _COMPUTE:
            return False, False
        unpack = op.layer in self._fresh and (kind is not Project or self._costs.apart(op))
        if unpack:
            self._fresh.discard(op.layer)
        if kind is Project:
            self._projected.add((op.layer, op.batch))
        rest = kind is Compute and (op.layer, op.batch) in self._projected
        if rest:
            self._projected.discard((op.layer, op.batch))
        return unpack, rest
