"""A few layers that stand for all: layers are many, and the stream of them is even."""

from __future__ import annotations

import dataclasses

from scheduling.cache_cells import Cells
from scheduling.workload import Workload


def few_layers(workload: Workload, count: int) -> Workload:
    """The workload with ``count`` of its layers in a row, the first and the last beside them.

    A layer's experts stay with it. Tensors are dealt to tiers evenly, so a stretch of layers has
    about the shares that all have. Of several stages, or where it is known which layers have a
    cache, the workload as it is.

    Raises:
        ValueError: the workload has no sizes.
    """
    w, sizes = workload, workload.sizes
    if sizes is None:
        raise ValueError("the workload has no sizes: make it with LLM.workload or plan")
    last = w.num_layers - 1
    if w.num_stages > 1 or w.cached_layers is not None:
        return w
    starts = [layer for layer in range(1, last) if not w.has_experts(layer)]
    if len(starts) <= count:
        return w
    first = (len(starts) - count) // 2
    kept = [0, *range(starts[first], starts[first + count]), last]
    place = {layer: number for number, layer in enumerate(kept)}
    experts, of_experts = w.experts, sizes.experts
    if experts is not None:
        layers = frozenset(place[n] for n in experts.layers if n in place)
        experts = dataclasses.replace(experts, layers=layers)
    if of_experts is not None:
        units = {place[n]: many for n, many in of_experts.units.items() if n in place}
        of_experts = dataclasses.replace(of_experts, units=units)
    return dataclasses.replace(
        w,
        num_layers=len(kept),
        experts=experts,
        sizes=dataclasses.replace(
            sizes,
            weights=sizes.loads.only(kept),
            dense=tuple(sizes.dense[n] for n in kept),
            cache=Cells(sizes.cells.kinds, sizes.cells.codes[kept]),
            matmul_flops=tuple(sizes.matmul_flops[n] for n in kept),
            query_flops=tuple(sizes.query_flops[n] for n in kept) if sizes.query_flops else (),
            reads=tuple(sizes.reads[n] for n in kept) if sizes.reads else (),
            windows={place[n]: width for n, width in sizes.windows.items() if n in place},
            experts=of_experts,
        ),
    )
