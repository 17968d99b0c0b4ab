"""Orders of execution. A schedule is any function from a ``Workload`` to ops; these are four.

Those that compute layers in parts are in ``scheduling.pipelined``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from scheduling.dependencies import ScheduleError
from scheduling.ops import (
    Barrier,
    Compute,
    ComputeExperts,
    FreeWeights,
    LoadCache,
    LoadChosen,
    LoadHidden,
    LoadWeights,
    Op,
    StoreCache,
    StoreHidden,
)
from scheduling.workload import Workload

Schedule = Callable[[Workload], Iterable[Op]]
OneLayer = Callable[[int, Sequence[tuple[int, int]]], Iterable[Op]]


def passes(w: Workload, rounds: int) -> Iterator[tuple[int, int, range]]:
    """Every round and layer with the batches that pass it together, in a pipeline's order.

    With one stage and one group that is layer after layer, all batches at each. In general it is
    by a clock: while a stage works on one group, the stage before works on the group behind it,
    layer by layer in turns, and a group begins its next round when it is through the last stage.
    """
    groups, stages = w.groups(), range(w.num_stages)
    period = max(len(groups), w.num_stages)
    deepest = max(len(w.layers_of(stage)) for stage in stages)
    for clock in range((rounds - 1) * period + len(groups) + w.num_stages - 1):
        for place in range(deepest):
            for stage in stages:
                layers = w.layers_of(stage)
                turn, group = divmod(clock - stage, period)
                if 0 <= turn < rounds and group < len(groups) and place < len(layers):
                    yield turn, layers[place], groups[group]


def zigzag(w: Workload) -> Iterator[Op]:
    """FlexGen's block schedule (paper, algorithm 1): one weight load serves all batches.

    Over several stages, all of a group's. Experts are loaded once it is known which were chosen,
    where many are not; meanwhile comes the next layer.
    """
    yield from by_layers(w, partial(whole_layer, w))


def by_layers(w: Workload, one_layer: OneLayer) -> Iterator[Op]:
    """A zig-zag whose layers, but for their experts, are computed as ``one_layer`` has it.

    Args:
        one_layer: Given a layer that is loaded and the (step, batch) of the batches that pass it,
            their ops until the layer is freed.
    """
    ahead = None
    for (step, layer, batches), following in _with_next(w, passes(w, w.num_steps)):
        cells = [(step, batch) for batch in batches]
        if w.has_experts(layer):
            yield from _experts(w, layer, cells)
            continue
        if (step, layer) != ahead:
            yield LoadWeights(step, layer)
        if w.weight_slots > 2 and not w.gives_hidden(layer) and w.waits_for_choice(step, batches):
            ahead = following
            if following is not None:
                yield LoadWeights(*following)
        yield from one_layer(layer, cells)


def _with_next(
    w: Workload, visits: Iterator[tuple[int, int, range]]
) -> Iterator[tuple[tuple[int, int, range], tuple[int, int] | None]]:
    """Each visit with the step and layer of the next one that is not of experts.

    None: there is none, or it is on another stage.
    """
    held: list[tuple[int, int, range]] = []
    for visit in visits:
        if not w.has_experts(visit[1]) and held:
            alone = w.num_stages == 1
            yield from ((one, visit[:2] if alone else None) for one in held)
            held.clear()
        held.append(visit)
    yield from ((one, None) for one in held)


def row_by_row(w: Workload) -> Iterator[Op]:
    """Each batch goes through the whole model by itself, as in Accelerate and DeepSpeed.

    Over several stages, few of them work at a time: the next batch begins when one is through.
    """
    for batch in range(w.num_batches):
        for step in range(w.num_steps):
            for layer in range(w.num_layers):
                if w.has_experts(layer):
                    yield from _experts(w, layer, [(step, batch)])
                else:
                    yield LoadWeights(step, layer)
                    yield from whole_layer(w, layer, [(step, batch)])


def lock_step(w: Workload) -> Iterator[Op]:
    """FlexGen's released loop: zig-zag order, one load ahead, and all wait after each batch.

    While a batch is computed, the next layer's weights are loaded, and so are the cache and the
    hidden states of the next batch, while those of the batch before are stored; then comes a
    device-wide barrier, over several stages of all of them. With one batch, the next hidden states
    are what is just being computed: then only the cache is a layer ahead.
    """
    if w.weight_slots < 2:
        raise ScheduleError(
            "lock_step loads one layer ahead: it needs weight_slots of at least 2, "
            f"and this workload has {w.weight_slots}; raise it, or use zigzag"
        )
    if w.experts is not None:
        raise ScheduleError(
            "lock_step waits after each batch, and experts compute all batches at once; use zigzag"
        )
    passes = w.num_steps * w.num_layers
    last = passes * w.num_batches - 1
    several = w.num_batches > 1
    ahead = passes > 1 and (several or w.num_layers > 1)

    def cell(place: int) -> tuple[int, int, int]:
        rest, batch = divmod(place, w.num_batches)
        return *divmod(rest, w.num_layers), batch

    yield LoadWeights(0, 0)
    for place in range(last + 1):
        step, layer, batch = cell(place)
        following = place // w.num_batches + 1
        if batch == 0 and following < passes and w.num_layers > 1:
            yield LoadWeights(*divmod(following, w.num_layers))
        if place == 0 or not several:
            yield LoadHidden(step, layer, batch)
        if place == 0 or not ahead:
            yield from _load_cache(w, step, layer, batch)
        if place > 0 and several:
            yield StoreHidden(*cell(place - 1))
        if place > 0 and ahead:
            yield from _store_cache(w, *cell(place - 1))
        if place < last and ahead:
            yield from _load_cache(w, *cell(place + 1))
        if place < last and several:
            yield LoadHidden(*cell(place + 1))
        yield Compute(step, layer, batch)
        if place == last or not several:
            yield StoreHidden(step, layer, batch)
        if place == last or not ahead:
            yield from _store_cache(w, step, layer, batch)
        if batch == w.num_batches - 1:
            yield FreeWeights(layer)
            if w.num_layers == 1 and following < passes:
                yield LoadWeights(following, layer)  # the same layer again: nothing to be ahead of
        yield Barrier()


def diagonal(w: Workload) -> Iterator[Op]:
    """The paper's diagonal block schedule (appendix A.2): batches at different steps share a pass.

    Batch after batch joins, ``num_steps / num_batches`` passes after the one before, and leaves
    when it is through; so the caches that are held at one time are of different lengths, and their
    sum is smaller than where all grow together. It takes more passes than zig-zag: it pays where
    more batches follow one another than are held at once.
    """
    gap = max(1, min(w.life or w.num_steps, w.num_steps) // w.num_batches)
    for turn, layer, batches in passes(w, (w.num_batches - 1) * gap + w.num_steps):
        # Old batches first: what they leave makes room.
        active = [b for b in batches if 0 <= turn - b * gap < w.num_steps]
        cells = [(turn - batch * gap, batch) for batch in active]
        if active and w.has_experts(layer):
            yield from _experts(w, layer, cells)
        elif active:
            yield LoadWeights(cells[0][0], layer)
            yield from whole_layer(w, layer, cells)


def whole_layer(w: Workload, layer: int, cells: Iterable[tuple[int, int]]) -> Iterator[Op]:
    """A layer that is loaded, over some (step, batch)."""
    for step, batch in cells:
        yield from load_cell(w, step, layer, batch)
        yield Compute(step, layer, batch)
        yield from store_cell(w, step, layer, batch)
    yield FreeWeights(layer)


def _experts(w: Workload, layer: int, cells: Sequence[tuple[int, int]]) -> Iterator[Op]:
    """A unit of experts, over some (step, batch)."""
    at: dict[int, list[int]] = {}
    for step, batch in cells:
        at.setdefault(step, []).append(batch)
    step, batches = next(iter(at.items()))
    if len(at) == 1 and w.waits_for_choice(step, batches):
        yield LoadChosen(step, layer, tuple(batches))
    else:
        yield LoadWeights(step, layer)
    for step, batches in at.items():
        yield ComputeExperts(step, layer, tuple(batches))
    if w.gives_hidden(layer):
        for step, batch in cells:
            yield StoreHidden(step, layer, batch)
    yield FreeWeights(layer)


def load_cell(w: Workload, step: int, layer: int, batch: int) -> Iterator[Op]:
    """What computing it needs beside the layer."""
    yield from _load_cache(w, step, layer, batch)
    yield LoadHidden(step, layer, batch)


def store_cell(w: Workload, step: int, layer: int, batch: int) -> Iterator[Op]:
    """What was computed."""
    if w.gives_hidden(layer):
        yield StoreHidden(step, layer, batch)
    yield from _store_cache(w, step, layer, batch)


def _load_cache(w: Workload, step: int, layer: int, batch: int) -> Iterator[Op]:
    if step > 0 and w.has_cache(layer):
        yield LoadCache(step, layer, batch)


def _store_cache(w: Workload, step: int, layer: int, batch: int) -> Iterator[Op]:
    if w.has_cache(layer) and step + 1 < w.num_steps:  # the last step's cache is not read again
        yield StoreCache(step, layer, batch)
