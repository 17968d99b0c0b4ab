"""Which layers and batches cost the same: layers are many, and few kinds of them."""

from __future__ import annotations

from collections import defaultdict

from scheduling.sizes import Sizes


def alike(sizes: Sizes) -> dict[tuple[int, int | None], int]:
    """(layer, batch) -> how many cost the same; (layer, None): how many layers' weights do."""
    last = len(sizes.weights) - 1
    firsts: dict[object, int] = {}
    batch_kinds = [firsts.setdefault(batch, number) for number, batch in enumerate(sizes.batches)]
    counts: dict[tuple[int, int | None], int] = defaultdict(int)
    layers: dict[object, int] = {}
    places: dict[object, tuple[int, int | None]] = {}
    for layer, by_tier in enumerate(sizes.weights):
        kind = sizes.matmul_flops[layer], sizes.dense[layer], layer if layer in (0, last) else -1
        reads = sizes.reads[layer] if sizes.reads else 0
        weights = *by_tier.items(), kind, reads
        counts[layers.setdefault(weights, layer), None] += 1
        for number, batch_kind in enumerate(batch_kinds):
            key = kind, batch_kind, sizes.cache.get((layer, number))
            counts[places.setdefault(key, (layer, number))] += 1
    return counts
