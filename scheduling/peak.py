"""How much lies in each tier at most, when ops come in this order."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping

from scheduling.ops import Compute, ComputeExperts, FreeWeights, LoadChosen, LoadWeights, Op
from scheduling.policy import Tier
from scheduling.sizes import Sizes
from scheduling.workload import Workload

PHASES = ("prefill", "decode")


def peak_nbytes(
    ops: Iterable[Op], workload: Workload, *, shared: bool, filled: bool = False
) -> dict[str, dict[Tier, int]]:
    """Phase -> the most that lies in each tier while its ops come, in this order of them.

    Weights, cache, hidden states, and on the device the slots; the workspace of computations is
    not in it. A cell of the cache is there from its batch's prefill to the batch's last step;
    hidden states are those of the step that their batch is at. The slots of the weights hold what
    is read from disk, and what comes from the host if that has to move: each as much as the
    largest layer that comes into it. Of the dense copies there is one for the layers and one for
    the head, and one of a cell of the cache.

    Of several stages or hosts, each tier's is that of the fullest device or host.

    Args:
        workload: With sizes.
        shared: Host and device are one memory, so nothing moves between them.
        filled: Count of each cell the positions that are filled, not all there is room for: what
            the order itself needs (paper, appendix A.2).

    Raises:
        ValueError: the workload has no sizes.
    """
    w, sizes = workload, sizes_of(workload)
    held: dict[_Place, int] = defaultdict(int)
    for stage in range(w.num_stages):
        for tier in Tier:
            held[_place(w, stage, tier, shared)] += sizes.resident[stage].get(tier, 0)
        transient = transient_nbytes(w, stage, shared=shared, weights=False)
        held[_place(w, stage, Tier.DEVICE, shared)] += transient
    peak = {phase: dict(held) for phase in PHASES}
    waiting: list[tuple[_Place, int] | None] = [None] * w.num_batches  # hidden states
    rings = [_WeightRing(w, shared=shared) for _ in range(w.num_stages)]
    for op in ops:
        if isinstance(op, (LoadWeights, LoadChosen, FreeWeights)):
            stage = w.stage_of(op.layer)
            held[_place(w, stage, Tier.DEVICE, shared)] += rings[stage].grown(op)
        if isinstance(op, ComputeExperts) and w.gives_hidden(op.layer):
            device = _place(w, w.stage_of(op.layer), Tier.DEVICE, shared)
            held[device] -= sum(_routed(sizes, batch, op.step) for batch in op.batches)
        if not isinstance(op, Compute) or op.step >= sizes.batches[op.batch].num_steps:
            continue
        number, batch, stage = op.batch, sizes.batches[op.batch], w.stage_of(op.layer)
        highest = peak[PHASES[op.step > 0]]
        last = op.step == batch.num_steps - 1
        before_it = waiting[number]
        if op.layer in w.stages:
            if before_it is not None:
                held[before_it[0]] -= before_it[1]
            hidden = batch.hidden_nbytes * batch.positions(op.step)
            where = _place(w, stage, batch.hidden_tier, shared)
            held[where] += hidden
            waiting[number] = where, hidden
        cell = sizes.cache.get((op.layer, number))
        host = _place(w, stage, Tier.HOST, shared)
        freed = 0
        if cell is not None:
            before, after = batch.cached(op.step), batch.cached(op.step) + batch.positions(op.step)
            if not filled:
                before, after = (batch.capacity if op.step else 0), batch.capacity
            before, after = cell.kept(before), cell.kept(after)
            where = _place(w, stage, cell.tier, shared)
            held[where] += cell.position_nbytes * (after - before)
            held[host] += sizes.buffered(cell) if op.step == 0 else 0
            freed = cell.position_nbytes * after if last else 0
        if not w.gives_hidden(op.layer):
            held[_place(w, stage, Tier.DEVICE, shared)] += _routed(sizes, number, op.step)
        for place, nbytes in held.items():
            if nbytes > highest.get(place, 0):
                highest[place] = nbytes
        if cell is not None and last:
            held[_place(w, stage, cell.tier, shared)] -= freed
            held[host] -= sizes.buffered(cell)
        if last and op.layer == w.num_layers - 1:
            gone = waiting[number]
            assert gone is not None
            held[gone[0]] -= gone[1]
            waiting[number] = None
    return {phase: _fullest(places) for phase, places in peak.items()}


class _WeightRing:
    """The slots that the weights of a stage are loaded into, which never shrink."""

    def __init__(self, workload: Workload, *, shared: bool) -> None:
        self._weights, self._shared = sizes_of(workload).weights, shared
        self._free = deque(range(workload.weight_slots))
        self._of: dict[int, int] = {}  # the slot of each layer that is held
        self._nbytes = [0] * workload.weight_slots

    def grown(self, op: LoadWeights | LoadChosen | FreeWeights) -> int:
        """Bytes that the slots take more after ``op``."""
        if isinstance(op, FreeWeights):
            if op.layer in self._of:
                self._free.append(self._of.pop(op.layer))
            return 0
        # What is wrong with an order that has no slot left is said elsewhere.
        slot = self._of[op.layer] = self._free.popleft() if self._free else 0
        before = self._nbytes[slot]
        self._nbytes[slot] = max(before, moved_nbytes(self._weights[op.layer], self._shared))
        return self._nbytes[slot] - before


def moved_nbytes(by_tier: Mapping[Tier, int], shared: bool) -> int:
    """Bytes of a layer's weights that a load brings into a slot.

    Args:
        by_tier: Where they lie.
        shared: Host and device are one memory.
    """
    return by_tier.get(Tier.DISK, 0) + (0 if shared else by_tier.get(Tier.HOST, 0))


def _routed(sizes: Sizes, number: int, step: int) -> int:
    """Bytes of what a batch leaves on the device for experts."""
    batch = sizes.batches[number]
    return batch.routed_nbytes * batch.positions(step) if step < batch.num_steps else 0


# A device or a host, by its tier and number.
_Place = tuple[Tier, int]


def _place(workload: Workload, stage: int, tier: Tier, shared: bool) -> _Place:
    """Whose memory ``tier`` of ``stage`` is: the devices of one host may be its memory."""
    return tier, stage if tier is Tier.DEVICE and not shared else workload.host_of(stage)


def _fullest(places: Mapping[_Place, int]) -> dict[Tier, int]:
    return {tier: max(n for place, n in places.items() if place[0] is tier) for tier in Tier}


def highest(peak: Mapping[str, Mapping[Tier, int]]) -> dict[Tier, int]:
    """Of both phases."""
    return {tier: max(peak[phase][tier] for phase in PHASES) for tier in Tier}


def room_nbytes(workload: Workload, *, shared: bool) -> dict[Tier, int]:
    """Bytes of each tier with which a block of any order gets by, its workspace included.

    Args:
        shared: Host and device are one memory.
    """
    w, sizes = workload, sizes_of(workload)
    room: dict[_Place, int] = defaultdict(int)
    for stage in range(w.num_stages):
        device = _place(w, stage, Tier.DEVICE, shared)
        for tier in Tier:
            room[_place(w, stage, tier, shared)] += sizes.resident[stage].get(tier, 0)
        room[device] += transient_nbytes(w, stage, shared=shared)
        room[device] += max(batch.workspace for batch in sizes.batches)
        # Any batch may be at any stage.
        for batch in sizes.batches:
            hidden = batch.largest_hidden_nbytes
            room[_place(w, stage, batch.hidden_tier, shared)] += hidden
            positions = max(batch.prompt_len, batch.longest_prompt)
            room[device] += batch.routed_nbytes * positions
    for stage in range(w.num_stages):
        for number, cell, count in sizes.cells.counts(w.layers_of(stage)):
            nbytes = cell.position_nbytes * cell.kept(sizes.batches[number].capacity)
            room[_place(w, stage, cell.tier, shared)] += count * nbytes
            room[_place(w, stage, Tier.HOST, shared)] += count * sizes.buffered(cell)
    return _fullest(room)


def transient_nbytes(workload: Workload, stage: int, *, shared: bool, weights: bool = True) -> int:
    """Bytes of slots and dense copies of a stage, whatever order its loads come in.

    Args:
        weights: With the slots that weights are loaded into.
    """
    w, sizes = workload, sizes_of(workload)
    layers = w.layers_of(stage)
    own = [(number, cell) for number, cell, _ in sizes.cells.counts(layers)]
    cells = [
        cell.position_nbytes * cell.kept(sizes.batches[number].capacity)
        for number, cell in own
        if cell.tier is Tier.DISK or (cell.tier is Tier.HOST and not shared and cell.sent > 0)
    ]
    hidden = [
        batch.largest_hidden_nbytes
        for batch in sizes.batches
        if batch.hidden_tier is Tier.DISK or (batch.hidden_tier is Tier.HOST and not shared)
    ]
    moving = (Tier.DISK,) if shared else (Tier.DISK, Tier.HOST)
    largest = sizes.loads[layers.start : layers.stop].most(moving) if weights else 0
    unpacked = [
        cell.dense_nbytes * cell.kept(sizes.batches[number].capacity) for number, cell in own
    ]
    head = w.num_layers - 1
    return (
        w.weight_slots * largest
        + w.hidden_slots * max(hidden, default=0)
        + w.cache_slots * max(cells, default=0)
        + max((sizes.dense[layer] for layer in layers if layer != head), default=0)
        + (sizes.dense[head] if head in layers else 0)
        + max(unpacked, default=0)
    )


def sizes_of(workload: Workload) -> Sizes:
    """Of a workload.

    Raises:
        ValueError: it has none.
    """
    if workload.sizes is None:
        raise ValueError("the workload has no sizes: make it with LLM.workload or plan")
    return workload.sizes
