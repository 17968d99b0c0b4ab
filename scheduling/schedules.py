"""Orders of execution. A schedule is any function from a ``Workload`` to ops; these are three."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from scheduling.dependencies import ScheduleError
from scheduling.ops import (
    Barrier,
    Compute,
    FreeWeights,
    LoadCache,
    LoadHidden,
    LoadWeights,
    Op,
    StoreCache,
    StoreHidden,
)
from scheduling.workload import Workload


def zigzag(w: Workload) -> Iterator[Op]:
    """FlexGen's block schedule (paper, algorithm 1): one weight load serves all batches."""
    for step in range(w.num_steps):
        for layer in range(w.num_layers):
            yield LoadWeights(step, layer)
            for batch in range(w.num_batches):
                yield from _load(w, step, layer, batch)
                yield Compute(step, layer, batch)
                yield from _store(w, step, layer, batch)
            yield FreeWeights(layer)


def row_by_row(w: Workload) -> Iterator[Op]:
    """Each batch goes through the whole model by itself, as in Accelerate and DeepSpeed."""
    for batch in range(w.num_batches):
        for step in range(w.num_steps):
            for layer in range(w.num_layers):
                yield LoadWeights(step, layer)
                yield from _load(w, step, layer, batch)
                yield Compute(step, layer, batch)
                yield from _store(w, step, layer, batch)
                yield FreeWeights(layer)


def lock_step(w: Workload) -> Iterator[Op]:
    """FlexGen's released loop: zig-zag order, one load ahead, and all wait after each batch.

    While a batch is computed, the next layer's weights and the next batch's cache are loaded and
    the batch before is stored; then comes a device-wide barrier. Hidden states of the next batch
    are loaded ahead where they are ready: with one batch they are what is just being computed.
    """
    if w.weight_slots < 2:
        raise ScheduleError("lock_step loads one layer ahead: it needs weight_slots of at least 2")
    cells = [
        (step, layer, batch)
        for step in range(w.num_steps)
        for layer in range(w.num_layers)
        for batch in range(w.num_batches)
    ]
    ahead = w.num_batches > 1
    yield LoadWeights(0, 0)
    for place, (step, layer, batch) in enumerate(cells):
        following = step * w.num_layers + layer + 1
        if batch == 0 and following < w.num_steps * w.num_layers and w.num_layers > 1:
            yield LoadWeights(*divmod(following, w.num_layers))
        if place == 0 or not ahead:
            yield from _load(w, step, layer, batch)
        if place > 0 and ahead:
            yield from _store(w, *cells[place - 1])
        if place + 1 < len(cells) and ahead:
            yield from _load(w, *cells[place + 1])
        yield Compute(step, layer, batch)
        if not ahead or place + 1 == len(cells):
            yield from _store(w, step, layer, batch)
        if batch == w.num_batches - 1:
            yield FreeWeights(layer)
            if w.num_layers == 1 and step + 1 < w.num_steps:
                yield LoadWeights(step + 1, layer)
        yield Barrier()


def _load(w: Workload, step: int, layer: int, batch: int) -> Iterator[Op]:
    if step > 0 and w.has_cache(layer):
        yield LoadCache(step, layer, batch)
    yield LoadHidden(step, layer, batch)


def _store(w: Workload, step: int, layer: int, batch: int) -> Iterator[Op]:
    yield StoreHidden(step, layer, batch)
    if w.has_cache(layer) and step + 1 < w.num_steps:  # the last step's cache is not read again
        yield StoreCache(step, layer, batch)


SCHEDULES: Mapping[str, Callable[[Workload], Iterator[Op]]] = MappingProxyType(
    {"zigzag": zigzag, "row_by_row": row_by_row, "lock_step": lock_step}
)
