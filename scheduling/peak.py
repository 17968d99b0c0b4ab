"""How much lies in each tier at most, when ops come in this order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scheduling.ops import Compute, Op
from scheduling.policy import Tier
from scheduling.workload import Workload

PHASES = ("prefill", "decode")


def peak_nbytes(
    ops: Iterable[Op], workload: Workload, *, shared: bool, filled: bool = False
) -> dict[str, dict[Tier, int]]:
    """Phase -> the most that lies in each tier while its ops come, in this order of them.

    Weights, cache, hidden states, and on the device the slots; the workspace of computations is
    not in it. A cell of the cache is there from its batch's prefill to the batch's last step;
    hidden states are those of the step that their batch is at. The slots of the weights hold what
    is read from disk, and what comes from the host if that has to move; of the dense copies there
    is one for the layers and one for the head, and one of a cell of the cache.

    Args:
        workload: With sizes.
        shared: Host and device are one memory, so nothing moves between them.
        filled: Count of each cell the positions that are filled, not all there is room for: what
            the order itself needs (paper, appendix A.2).

    Raises:
        ValueError: the workload has no sizes.
    """
    sizes = workload.sizes
    if sizes is None:
        raise ValueError("the workload has no sizes: make it with LLM.workload or plan")
    held = {tier: sizes.resident.get(tier, 0) for tier in Tier}
    held[Tier.DEVICE] += transient_nbytes(workload, shared=shared)
    peak = {phase: dict(held) for phase in PHASES}
    waiting = [0] * workload.num_batches  # bytes of hidden states
    for op in ops:
        if not isinstance(op, Compute) or op.step >= sizes.batches[op.batch].num_steps:
            continue
        number, batch = op.batch, sizes.batches[op.batch]
        highest = peak[PHASES[op.step > 0]]
        last = op.step == batch.num_steps - 1
        if op.layer == 0:
            hidden = batch.hidden_nbytes * batch.positions(op.step)
            held[batch.hidden_tier] += hidden - waiting[number]
            waiting[number] = hidden
        cell = sizes.cache.get((op.layer, number))
        freed = 0
        if cell is not None:
            before, after = batch.cached(op.step), batch.cached(op.step) + batch.positions(op.step)
            if not filled:
                before, after = (batch.capacity if op.step else 0), batch.capacity
            held[cell.tier] += cell.position_nbytes * (after - before)
            held[Tier.HOST] += sizes.buffered(cell) if op.step == 0 else 0
            freed = cell.position_nbytes * after if last else 0
        for tier in Tier:
            highest[tier] = max(highest[tier], held[tier])
        if cell is not None and last:
            held[cell.tier] -= freed
            held[Tier.HOST] -= sizes.buffered(cell)
        if last and op.layer == workload.num_layers - 1:
            held[batch.hidden_tier] -= waiting[number]
            waiting[number] = 0
    return peak


def highest(peak: Mapping[str, Mapping[Tier, int]]) -> dict[Tier, int]:
    """Of both phases."""
    return {tier: max(peak[phase][tier] for phase in PHASES) for tier in Tier}


def room_nbytes(workload: Workload, *, shared: bool) -> dict[Tier, int]:
    """Bytes of each tier with which a block of any order gets by, its workspace included.

    Args:
        shared: Host and device are one memory.
    """
    sizes = workload.sizes
    if sizes is None:
        raise ValueError("the workload has no sizes: make it with LLM.workload or plan")
    room = {tier: sizes.resident.get(tier, 0) for tier in Tier}
    for (_, number), cell in sizes.cache.items():
        room[cell.tier] += cell.position_nbytes * sizes.batches[number].capacity
        room[Tier.HOST] += sizes.buffered(cell)
    for batch in sizes.batches:
        room[batch.hidden_tier] += batch.hidden_nbytes * batch.prompt_len
    room[Tier.DEVICE] += transient_nbytes(workload, shared=shared)
    room[Tier.DEVICE] += max(batch.workspace for batch in sizes.batches)
    return room


def transient_nbytes(workload: Workload, *, shared: bool) -> int:
    """Bytes of slots and dense copies."""
    w, sizes = workload, workload.sizes
    assert sizes is not None
    cells = [
        cell.position_nbytes * sizes.batches[number].capacity
        for (_, number), cell in sizes.cache.items()
        if cell.tier is Tier.DISK or (cell.tier is Tier.HOST and not shared and cell.sent > 0)
    ]
    hidden = [
        batch.hidden_nbytes * batch.prompt_len
        for batch in sizes.batches
        if batch.hidden_tier is Tier.DISK or (batch.hidden_tier is Tier.HOST and not shared)
    ]
    weights = max(
        by.get(Tier.DISK, 0) + (0 if shared else by.get(Tier.HOST, 0)) for by in sizes.weights
    )
    unpacked = [
        cell.dense_nbytes * sizes.batches[number].capacity
        for (_, number), cell in sizes.cache.items()
    ]
    return (
        w.weight_slots * weights
        + w.hidden_slots * max(hidden, default=0)
        + w.cache_slots * max(cells, default=0)
        + max(sizes.dense[:-1], default=0)
        + sizes.dense[-1]
        + max(unpacked, default=0)
    )
