"""Which layers, batches and ops cost the same: there are many of them, and few kinds."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

from scheduling.ops import (
    ComputeExperts,
    LoadChosen,
    LoadHidden,
    LoadWeights,
    StoreHidden,
)
from scheduling.workload import Experts, Workload


class Kinds:
    """Numbers that are equal for what costs the same.

    Attributes:
        layers: Of each layer, as far as computing and handing on goes.
        weights: Of each layer, its weights and where they lie included.
        batches: Of each batch.
        cells: Of each (layer, batch) with a cache.

    Raises:
        ValueError: the workload has no sizes.
    """

    def __init__(self, workload: Workload) -> None:
        sizes = workload.sizes
        if sizes is None:
            raise ValueError("the workload has no sizes: make it with LLM.workload or plan")
        firsts: dict[Any, int] = {}
        self.batches = [firsts.setdefault(b, number) for number, b in enumerate(sizes.batches)]
        self.layers = _layers(
            workload.num_layers,
            sizes.matmul_flops,
            sizes.query_flops or (0.0,) * workload.num_layers,
            sizes.dense,
            tuple(sizes.borders),
            workload.stages,
            tuple(sizes.windows.items()),
            () if sizes.experts is None else tuple(sizes.experts.units.items()),
            workload.cached_layers,
            workload.experts,
        )
        reads = sizes.reads or (0,) * workload.num_layers
        weights: dict[Any, int] = {}
        self.weights = [
            weights.setdefault((kind, files, *by_tier.items()), len(weights))
            for kind, files, by_tier in zip(self.layers, reads, sizes.weights, strict=True)
        ]
        # Most cells are one of a few objects, which is quicker to see than that they are equal.
        objects: dict[int, int] = {}
        equal: dict[Any, int] = {}
        self.cells: dict[tuple[int, int], int] = {}
        for place, cell in sizes.cache.items():
            number = objects.get(id(cell))
            if number is None:
                number = objects[id(cell)] = equal.setdefault(cell, len(equal))
            self.cells[place] = number

    def of(self, op: Any) -> Hashable:
        """Equal for ops that cost the same; of FreeWeights and Barrier, which cost nothing, not."""
        kind = type(op)
        if kind is LoadWeights:
            return kind, self.weights[op.layer]
        if kind is LoadChosen or kind is ComputeExperts:
            return kind, op.step, op.batches, self.weights[op.layer]
        layer, batch = op.layer, op.batch
        if kind is LoadHidden or kind is StoreHidden:
            return kind, op.step, self.layers[layer], self.batches[batch]
        return (
            kind,
            op.step,
            self.layers[layer],
            self.batches[batch],
            self.cells.get((layer, batch)),
        )


@functools.lru_cache(maxsize=64)  # a search asks for the same again and again
def _layers(
    num_layers: int,
    flops: tuple[float, ...],
    query_flops: tuple[float, ...],
    dense: tuple[int, ...],
    borders: tuple[int, ...],
    stages: tuple[int, ...],
    windows: tuple[tuple[int, int], ...],
    units: tuple[tuple[int, int], ...],
    cached_layers: frozenset[int] | None,
    experts: Experts | None,
) -> tuple[int, ...]:
    """What of each layer's kind does not depend on a policy's splits."""
    w = Workload(
        num_steps=1,
        num_layers=num_layers,
        num_batches=1,
        cached_layers=cached_layers,
        stages=stages,
        experts=experts,
    )
    of_window, of_units, kinds = dict(windows), dict(units), dict[Any, int]()
    edges = {0, num_layers - 1, *borders}
    found = []
    for layer in range(num_layers):
        key = (
            flops[layer],
            query_flops[layer],
            dense[layer],
            layer if layer in edges else -1,
            w.stage_of(layer),
            of_window.get(layer),
            of_units.get(layer),
            w.has_cache(layer),
            w.has_experts(layer),
            w.gives_hidden(layer),
        )
        found.append(kinds.setdefault(key, len(kinds)))
    return tuple(found)


def alike(workload: Workload, kinds: Kinds | None = None) -> dict[tuple[int, int | None], int]:
    """(layer, batch) -> how many cost the same; (layer, None): how many layers' weights do.

    Those are of one stage.

    Args:
        kinds: Of the workload, where they are known already.

    Raises:
        ValueError: the workload has no sizes.
    """
    kinds = kinds or Kinds(workload)
    counts: dict[tuple[int, int | None], int] = defaultdict(int)
    layers: dict[int, int] = {}
    for layer, weights in enumerate(kinds.weights):
        counts[layers.setdefault(weights, layer), None] += 1
    places: dict[object, tuple[int, int]] = {}
    of_kind: dict[int, list[int]] = defaultdict(list)
    for layer, kind in enumerate(kinds.layers):
        of_kind[kind].append(layer)
    batches = list(enumerate(kinds.batches))
    for kind, those in of_kind.items():
        first = those[0]
        if workload.has_experts(first) and not workload.gives_hidden(first):
            continue  # batches are no matter there
        if not workload.has_cache(first):
            for number, batch_kind in batches:
                counts[places.setdefault((kind, batch_kind), (first, number))] += len(those)
            continue
        for layer in those:
            for number, batch_kind in batches:
                key = kind, batch_kind, kinds.cells.get((layer, number))
                counts[places.setdefault(key, (layer, number))] += 1
    return counts
