"""Is a schedule correct and complete? If not: which op, what it misses, and where."""

from __future__ import annotations

from collections.abc import Iterable

from scheduling.dependencies import ScheduleError, bind
from scheduling.ops import Compute, FreeWeights, LoadWeights, Op
from scheduling.workload import Workload

__all__ = ["ScheduleError", "validate"]


def validate(ops: Iterable[Op], workload: Workload) -> None:
    """Checks that every op has what it needs, and that everything is computed and given back.

    Raises:
        ScheduleError: with the op, its missing predecessor and the place; or, at the end, with
            the first computation that never comes, or the weights that are never freed.
    """
    w = workload
    computed = bytearray(w.num_steps * w.num_layers * w.num_batches)
    held: dict[int, LoadWeights] = {}
    for issue in bind(ops, workload):
        match issue.op:
            case Compute(step, layer, batch):
                computed[(step * w.num_layers + layer) * w.num_batches + batch] = 1
            case LoadWeights(_, layer):
                held[layer] = issue.op
            case FreeWeights(layer):
                del held[layer]
    place = computed.find(0)
    if place >= 0:
        rest, batch = divmod(place, w.num_batches)
        missing = Compute(*divmod(rest, w.num_layers), batch)
        count = computed.count(0)
        raise ScheduleError(
            f"the schedule ends without {missing} ({count} of {len(computed)} computations are "
            "missing)",
            missing=missing,
        )
    if held:
        layer, load = next(iter(held.items()))
        raise ScheduleError(
            f"the schedule ends without {FreeWeights(layer)} for {load}",
            missing=FreeWeights(layer),
        )
