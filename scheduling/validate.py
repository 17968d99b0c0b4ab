"""Is a schedule correct and complete? If not: which op, what it misses, and where."""

from __future__ import annotations

from scheduling.dependencies import ScheduleError, bind
from scheduling.ops import (
    Compute,
    ComputeExperts,
    FreeWeights,
    LoadChosen,
    LoadWeights,
    Op,
    StoreHidden,
)
from scheduling.reported import Given, name_of, naming, reported
from scheduling.workload import Workload

__all__ = ["ScheduleError", "validate"]


def validate(ops: Given, workload: Workload) -> None:
    """Checks that every op has what it needs, and that everything is computed and given back.

    A StoreCache that nothing loads later, as in the last step, may be there or not.

    Args:
        ops: Of the schedule, or the schedule itself.

    Raises:
        ScheduleError: with the op, its missing predecessor and the place; or, at the end, with
            the first computation that never comes, the batch whose last token is never stored,
            or the weights that are never freed. Also if there are more ops than a schedule of
            this workload can need, so that it may never end, and if it raised.
    """
    if not isinstance(workload, Workload):
        raise ValueError(f"expected a Workload, got {workload!r}; the operations come first")
    with naming(name_of(ops)):
        _validate(ops, workload)


def _validate(ops: Given, w: Workload) -> None:
    # A batch's computations come in one order: bind sees to it.
    reached = [w.first_step(b) * w.num_layers for b in range(w.num_batches)]
    held: dict[int, LoadWeights | LoadChosen] = {}
    stored = {b for b in range(w.num_batches) if w.first_step(b) == w.num_steps}
    count = 0
    for issue in bind(reported(ops, w), w):
        count += 1
        match issue.op:
            case Compute(_, _, batch):
                reached[batch] += 1
            case ComputeExperts(_, _, batches):
                for batch in batches:
                    reached[batch] += 1
            case StoreHidden(step, layer, batch) if layer == w.num_layers - 1:
                if step == w.num_steps - 1:
                    stored.add(batch)
            case LoadWeights(_, layer) | LoadChosen(_, layer):
                held[layer] = issue.op
            case FreeWeights(layer):
                del held[layer]
    total = w.num_steps * w.num_layers
    least = min(reached)
    if least < total:
        step, layer = divmod(least, w.num_layers)
        behind = tuple(batch for batch in range(w.num_batches) if reached[batch] == least)
        missing: Op = Compute(step, layer, behind[0])
        if w.has_experts(layer):
            missing = ComputeExperts(step, layer, behind)
        lacking = total * w.num_batches - sum(reached)
        raise _ends(
            count, missing, f" ({lacking} of {total * w.num_batches} computations are missing)"
        )
    for batch in range(w.num_batches):
        if batch not in stored:
            raise _ends(count, StoreHidden(w.num_steps - 1, w.num_layers - 1, batch))
    for layer, load in held.items():
        raise _ends(count, FreeWeights(layer), f" for {load}")


def _ends(count: int, missing: Op, more: str = "") -> ScheduleError:
    return ScheduleError(
        f"the schedule ends after {count} ops without {missing}{more}; add it",
        missing=missing,
        index=count,
    )
