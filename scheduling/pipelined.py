"""Schedules that compute layers in parts: one batch attends while the device computes others.

They are for attention on the host. A cell whose attention the device computes has no parts there:
its Compute does all, and Project and Attend are no work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

from scheduling.ops import Attend, Compute, FreeWeights, Op, Project
from scheduling.schedules import by_layers, load_cell, store_cell, whole_layer
from scheduling.workload import Workload

Step = int
Batch = int
# Of a layer's cells, which come next, and whether in parts.
Order = Callable[[Workload, int, Sequence[tuple[Step, Batch]]], Iterable[tuple[Step, Batch, bool]]]


def cgopipe(w: Workload) -> Iterator[Op]:
    """MoE-Lightning's CGOPipe (arXiv 2411.11217): queries of two batches ahead of the rest.

    While the host attends for the next batches, the device finishes this one, and the next pages
    of the weights are on their way: a page is what a slot holds, a layer or some of its experts.
    """
    yield from _pipelined(w, 2, _hosts_in_parts)


def neo(w: Workload) -> Iterator[Op]:
    """NEO's asymmetric pipelining (arXiv 2411.01142): of two batches one attends on the host.

    Meanwhile the device computes the other as a whole, its attention included. Which batches
    attend where is the policy's business: a share of the cache on the device, the others' on the
    host. Where nobody knows it, every other batch counts as the host's.
    """
    yield from _pipelined(w, 1, _host_and_device_in_turns)


def _hosts_in_parts(
    w: Workload, layer: int, cells: Sequence[tuple[Step, Batch]]
) -> Iterator[tuple[Step, Batch, bool]]:
    # To put off a batch that the device attends for would only hold its slots for longer.
    return ((*cell, w.sizes is None or _on_host(w, layer, cell[1])) for cell in cells)


def _host_and_device_in_turns(
    w: Workload, layer: int, cells: Sequence[tuple[Step, Batch]]
) -> Iterator[tuple[Step, Batch, bool]]:
    hosted = [(*cell, True) for cell in cells if _on_host(w, layer, cell[1])]
    others = [(*cell, False) for cell in cells if not _on_host(w, layer, cell[1])]
    for pair in zip_longest(hosted, others):
        yield from (cell for cell in pair if cell is not None)


def _on_host(w: Workload, layer: int, batch: int) -> bool:
    return batch % 2 == 0 if w.sizes is None else w.sizes.cache[layer, batch].hosted


def _pipelined(w: Workload, ahead: int, order: Order) -> Iterator[Op]:
    """Zig-zag, with the first parts of ``ahead`` batches before the rest of one.

    As far as slots for hidden states and caches allow; across layers where that holds up neither
    loads (there is a third weight slot) nor experts, and no layer has to be unpacked twice.
    """
    across = w.weight_slots > 2 and w.num_stages == 1 and w.experts is None and not _in_codes(w)
    ahead = min(ahead, w.hidden_slots - 1, w.cache_slots - 1)
    waiting: deque[list[Op]] = deque()  # of each batch that attends, what comes after it

    def finished(most: int = 0) -> Iterator[Op]:
        while len(waiting) > most:
            yield from waiting.popleft()

    def layer_in_parts(layer: int, cells: Sequence[tuple[Step, Batch]]) -> Iterator[Op]:
        if cells[0][0] == 0 or not w.has_cache(layer):
            yield from finished()
            yield from whole_layer(w, layer, cells)
            return
        for step, batch, apart in order(w, layer, cells):
            behind = [n for n, rest in enumerate(waiting) if _batch_of(rest) == batch]
            yield from finished(len(waiting) - 1 - behind[-1] if behind else len(waiting))
            yield from load_cell(w, step, layer, batch)
            rest: list[Op] = [Compute(step, layer, batch), *store_cell(w, step, layer, batch)]
            if apart:
                yield Project(step, layer, batch)
                yield Attend(step, layer, batch)
                waiting.append(rest)
                yield from finished(ahead)
            else:
                yield from rest
        # A step begins with the tokens of the one before.
        yield from finished(len(waiting) if across and layer < w.num_layers - 1 else 0)
        if waiting:
            waiting[-1].append(FreeWeights(layer))
        else:
            yield FreeWeights(layer)

    yield from by_layers(w, layer_in_parts)


def _in_codes(w: Workload) -> bool:
    return w.sizes is not None and any(w.sizes.dense)


def _batch_of(rest: Sequence[Op]) -> Batch:
    first = rest[0]
    assert isinstance(first, Compute)
    return first.batch
