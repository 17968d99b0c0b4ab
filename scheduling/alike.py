"""Which layers, batches and ops cost the same: there are many of them, and few kinds."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

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
        cells: Of each layer with a cache, of each batch its cell; -1: there is none.

    Raises:
        ValueError: the workload has no sizes.
    """

    def __init__(self, workload: Workload) -> None:
        sizes = workload.sizes
        if sizes is None:
            raise ValueError("the workload has no sizes: make it with LLM.workload or plan")
        firsts: dict[Any, int] = {}
        self.batches = [firsts.setdefault(b, number) for number, b in enumerate(sizes.batches)]
        self.of_layers = _layers(
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
        self.layers = self.of_layers.numbers
        reads = np.array(sizes.reads or (0,) * workload.num_layers)
        loads = sizes.loads
        keys = (self.of_layers.array * (1 + reads.max()) + reads) * len(loads.nbytes) + loads.codes
        _, self.weights_array = np.unique(keys, return_inverse=True)
        self.weights: list[int] = self.weights_array.tolist()
        codes = sizes.cells.codes
        cached = np.flatnonzero((codes >= 0).any(axis=1))
        self.cells = dict(zip(cached.tolist(), codes[cached].tolist(), strict=True))

    def cell(self, layer: int, batch: int) -> int:
        """Which one it is; -1: there is none."""
        of_layer = self.cells.get(layer)
        return -1 if of_layer is None else of_layer[batch]

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
        return kind, op.step, self.layers[layer], self.batches[batch], self.cell(layer, batch)


class _Layers(NamedTuple):
    """Kinds of layers.

    Attributes:
        numbers: Of each layer, its kind.
        array: The same.
        groups: Of each kind, its layers.
    """

    numbers: tuple[int, ...]
    array: np.ndarray
    groups: tuple[np.ndarray, ...]


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
) -> _Layers:
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
    array = np.array(found)
    groups = tuple(np.flatnonzero(array == kind) for kind in range(len(kinds)))
    return _Layers(tuple(found), array, groups)


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
    _, firsts, many = np.unique(kinds.weights_array, return_index=True, return_counts=True)
    for layer, count in sorted(zip(firsts.tolist(), many.tolist(), strict=True)):
        counts[layer, None] = count
    places: dict[object, tuple[int, int]] = {}
    batches = list(enumerate(kinds.batches))
    assert workload.sizes is not None
    cells, of_batch = workload.sizes.cells, np.array(kinds.batches)
    for kind, those in enumerate(kinds.of_layers.groups):
        first = int(those[0])
        if workload.has_experts(first) and not workload.gives_hidden(first):
            continue  # batches are no matter there
        if not workload.has_cache(first):
            for number, batch_kind in batches:
                counts[places.setdefault((kind, batch_kind), (first, number))] += len(those)
            continue
        keys = (len(cells.kinds) + 1) * of_batch + cells.codes[those] + 1
        _, found, many = np.unique(keys, return_index=True, return_counts=True)
        for place, count in sorted(zip(found.tolist(), many.tolist(), strict=True)):
            row, number = divmod(place, len(of_batch))
            counts[int(those[row]), number] += count
    return counts
