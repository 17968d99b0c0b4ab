"""Which layers and batches cost the same: layers are many, and few kinds of them."""

from __future__ import annotations

from collections import defaultdict

from scheduling.workload import Workload


def alike(workload: Workload) -> dict[tuple[int, int | None], int]:
    """(layer, batch) -> how many cost the same; (layer, None): how many layers' weights do.

    Those are of one stage.

    Raises:
        ValueError: the workload has no sizes.
    """
    sizes = workload.sizes
    if sizes is None:
        raise ValueError("the workload has no sizes: make it with LLM.workload or plan")
    last = len(sizes.weights) - 1
    firsts: dict[object, int] = {}
    batch_kinds = [firsts.setdefault(batch, number) for number, batch in enumerate(sizes.batches)]
    counts: dict[tuple[int, int | None], int] = defaultdict(int)
    layers: dict[object, int] = {}
    places: dict[object, tuple[int, int | None]] = {}
    for layer, by_tier in enumerate(sizes.weights):
        stage = workload.stage_of(layer)
        edge = layer if layer in (0, last) or layer in sizes.borders else -1
        window = sizes.windows.get(layer)
        experts = workload.has_experts(layer), workload.gives_hidden(layer)
        kind = sizes.matmul_flops[layer], sizes.dense[layer], edge, stage, window, experts
        reads = sizes.reads[layer] if sizes.reads else 0
        weights = *by_tier.items(), kind, reads
        counts[layers.setdefault(weights, layer), None] += 1
        if experts == (True, False):
            continue  # batches are no matter there
        for number, batch_kind in enumerate(batch_kinds):
            key = kind, batch_kind, sizes.cache.get((layer, number))
            counts[places.setdefault(key, (layer, number))] += 1
    return counts
