"""What waits for what: the one truth that validator, simulator and executor share.

``needs`` says it of one op; ``bind`` follows a whole schedule and numbers everything. An issue's
needs all have smaller numbers and streams run in order, so no schedule that ``bind`` accepts can
deadlock: of the issues that are not done, the one with the smallest number can always run.

Every stage of a pipeline has streams and slots of its own. What a stage's last layer computes is
handed over: its StoreHidden is on a stream of its own, which puts it where the next stage loads it.
Between hosts that takes both sides, which must agree on the order: there all hand-overs are on one
stream, in the order of the schedule; so each can happen once those before it have.

A layer may be computed in parts: Project, Attend and what is left for the Compute. What was loaded
is held until the Compute also then, so that slots do not depend on where attention is computed.

A batch goes through step and layer in one order only, since each layer needs the hidden states of
the one before. So one number per batch tells how far it is, and tells late ops from early ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from scheduling.ops import (
    OF_BATCHES,
    PARTS,
    Attend,
    Barrier,
    Compute,
    ComputeExperts,
    FreeWeights,
    LoadCache,
    LoadChosen,
    LoadHidden,
    LoadWeights,
    Op,
    Project,
    StoreCache,
    StoreHidden,
)
from scheduling.workload import Workload


class Stream(enum.Enum):
    """What runs in order within itself, and beside the others."""

    LOAD_WEIGHTS = "load weights"
    LOAD_CACHE = "load cache"
    STORE_CACHE = "store cache"
    LOAD_HIDDEN = "load hidden"
    STORE_HIDDEN = "store hidden"
    HAND_OVER = "hand over"
    COMPUTE = "compute"
    ATTEND = "attend"

    __hash__ = object.__hash__  # members are singletons; the enum's own is slow in Python


_STREAMS: dict[type, Stream] = {
    LoadWeights: Stream.LOAD_WEIGHTS,
    LoadChosen: Stream.LOAD_WEIGHTS,
    FreeWeights: Stream.COMPUTE,
    LoadCache: Stream.LOAD_CACHE,
    StoreCache: Stream.STORE_CACHE,
    LoadHidden: Stream.LOAD_HIDDEN,
    StoreHidden: Stream.STORE_HIDDEN,
    Project: Stream.COMPUTE,
    Attend: Stream.ATTEND,
    Compute: Stream.COMPUTE,
    ComputeExperts: Stream.COMPUTE,
    Barrier: Stream.COMPUTE,
}


def stream_of(op: Op, workload: Workload | None = None) -> Stream:
    """The stream that ``op`` runs on; without a workload, where there is one stage."""
    if workload is not None and isinstance(op, StoreHidden) and workload.hands_over(op.layer):
        return Stream.HAND_OVER
    return _STREAMS[type(op)]


def wait_reason(op: type, needed: type, *, crosses: bool = False) -> str:
    """Why an op of one kind waits for one of another; as ``Span.wait`` has it.

    Args:
        crosses: Of what is needed, as ``Issue.crosses``.
    """
    if Barrier in (op, needed):
        return "barrier"
    if op is LoadChosen and needed in (Compute, ComputeExperts):
        return "router"
    if op is Compute and needed is Attend:
        return "attention"
    if needed in (FreeWeights, Project, Compute, ComputeExperts):
        return "compute" if op in (StoreCache, StoreHidden, Attend) else "slot"
    if op is Compute and needed in (StoreCache, StoreHidden):
        return "stores"
    return "bubble" if crosses else _WHAT[needed]


_WHAT: dict[type, str] = {
    LoadWeights: "weights",
    LoadChosen: "weights",
    LoadCache: "cache",
    StoreCache: "cache",
    LoadHidden: "hidden",
    StoreHidden: "hidden",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """A need: the latest load of a layer's weights, of whatever step, not yet freed."""

    layer: int


Need = Weights | Op

# A need as a plain tuple (kind, step, layer, batch), which hashes many times faster than an op.
_Key = tuple[type, int, int, int]


def needs(op: Op, workload: Workload) -> tuple[Need, ...]:
    """What must be done before ``op`` starts, beside a free slot and its place in its stream.

    Weights are known by their layer alone: batches at different steps may share one load. What a
    layer's experts have computed of a batch counts as a Compute of the batch, one a unit. A
    FreeWeights waits for all that was computed with its load, too, and a Compute for the Attend of
    its cell where a Project came before: ``bind`` knows which those are.
    """
    return tuple(map(_need_of, _keys(op, workload)))


def _need_of(key: _Key) -> Need:
    kind, step, layer, batch = key
    return Weights(layer) if kind is Weights else kind(step, layer, batch)


def _keys(op: Any, workload: Workload, most: int | None = None) -> tuple[_Key, ...]:
    """What an op needs; a computation of experts of ``most`` of its batches, or of all."""
    kind = type(op)
    if kind is Compute:
        step, layer, batch = op.step, op.layer, op.batch
        weights, hidden = (Weights, 0, layer, 0), (LoadHidden, step, layer, batch)
        if step > 0 and workload.has_cache(layer):
            return weights, hidden, (LoadCache, step, layer, batch)
        return weights, hidden
    if kind is Project:
        return (Weights, 0, op.layer, 0), (LoadHidden, op.step, op.layer, op.batch)
    if kind is Attend:
        step, layer, batch = op.step, op.layer, op.batch
        return (Project, step, layer, batch), (LoadCache, step, layer, batch)
    if kind is LoadHidden:
        if op.layer > 0:
            return ((StoreHidden, op.step, op.layer - 1, op.batch),)
        if op.step > workload.first_step(op.batch):
            # The last layer's "hidden" is the new token, which the next step begins with.
            return ((StoreHidden, op.step - 1, workload.num_layers - 1, op.batch),)
        return ()
    if kind is StoreHidden or kind is StoreCache:
        return ((Compute, op.step, op.layer, op.batch),)
    if kind is LoadCache:
        if op.step == workload.first_step(op.batch):
            return ()  # kept from before
        return ((StoreCache, op.step - 1, op.layer, op.batch),)
    if kind is FreeWeights:
        return ((Weights, 0, op.layer, 0),)
    if kind is ComputeExperts:
        before = ((Compute, op.step, op.layer - 1, batch) for batch in op.batches[:most])
        return ((Weights, 0, op.layer, 0), *before)
    if kind is LoadChosen:
        router = workload.router_of(op.layer)
        return tuple((Compute, op.step, router, batch) for batch in op.batches)
    return ()


@dataclasses.dataclass(frozen=True, slots=True)
class Issue:
    """An op in its place.

    Attributes:
        index: Position in the schedule, from 0.
        needs: Indices of earlier issues that must be done before this one starts; of several on
            one stream, only the last.
        slot: The slot that a load fills or a FreeWeights gives back: 0, 1, ... of its kind and
            stage.
        stage: Whose ``stream`` it is on.
        crosses: It hands over to another stage, or loads what was handed over.
    """

    index: int
    op: Op
    stream: Stream
    needs: tuple[int, ...]
    slot: int | None = None
    stage: int = 0
    crosses: bool = False

    @property
    def lane(self) -> Lane:
        """What runs in order: a stream of a stage."""
        return self.stage, self.stream


Lane = tuple[int, Stream]


class ScheduleError(ValueError):
    """A schedule that breaks a rule.

    Attributes:
        op: The offending op, or None where the fault is an op that is not there.
        missing: What should have come before (or at all), or None.
        index: Position of ``op`` in the schedule, from 0; where it ends, for an op that is not
            there.
        schedule: Its name, where it is known; the message begins with it.
    """

    def __init__(
        self,
        reason: str,
        *,
        op: Op | None = None,
        missing: Op | None = None,
        index: int | None = None,
        before: Iterable[Op] = (),
        after: Iterable[Op] = (),
    ) -> None:
        text = reason
        if op is not None and index is not None:
            text = f"op {index}, {op}: {reason}\n{_context(op, index, [*before], [*after])}"
        super().__init__(text)
        self.op, self.missing, self.index = op, missing, index
        self.schedule: str | None = None

    def name(self, schedule: str) -> None:
        """Says whose fault it is, unless that was said before."""
        if self.schedule is None:
            self.schedule = schedule
            self.args = (f"schedule {schedule}: {self}",)


def _context(op: Op, index: int, before: list[Op], after: list[Op]) -> str:
    ops = [*before, op, *after]
    numbered = enumerate(ops, index - len(before))
    return "\n".join(f"{'-->' if i == index else '   '} {i}: {o}" for i, o in numbered)


def bind(ops: Iterable[Op], workload: Workload) -> Iterator[Issue]:
    """Numbers ``ops``, finds what each waits for, and deals out slots; lazily.

    The slots of each kind and stage are a first-in first-out list: a load takes the one that was
    given back longest ago, and waits for the op that gave it: FreeWeights of a layer's, the Compute
    that it was for of a cell's cache and hidden states. A Compute waits until fewer than
    ``store_slots`` stores of each kind are under way. An op issued again binds what comes later to
    its latest issue. What is remembered grows with layers and batches, not with steps or ops.

    No order is endless: each cell is computed and stored once and loaded into few slots, each
    computation needs one load of a layer at most, a Project another, and ten barriers for each
    other op are plenty.

    Raises:
        ScheduleError: at the first op that breaks a rule.
    """
    return _Binder(ops, workload).run()


_SLOT_FIELDS: dict[type, str] = {
    LoadWeights: "weight_slots",
    LoadCache: "cache_slots",
    LoadHidden: "hidden_slots",
}


# Serializing has one or two after each op, also of an order that is serialized already.
_BARRIERS_PER_OP = 10
_SPARE_BARRIERS = 100
_ENDLESS = "; does the schedule ever end?"


def _slot_counts(workload: Workload) -> dict[type, int]:
    return {kind: getattr(workload, name) for kind, name in _SLOT_FIELDS.items()}


def _free_slots(count: int) -> deque[tuple[int, int | None]]:
    """(slot, index of the issue that gave it back), the one to take next first."""
    return deque((slot, None) for slot in range(count))


class _Binder:
    def __init__(self, ops: Iterable[Op], workload: Workload) -> None:
        self.ops = iter(ops)
        self.workload = workload
        self.latest: dict[_Key, int] = {}
        self.slots: dict[int, int] = {}  # of the layers that are held
        self.reader: dict[int, int] = {}  # what was computed with the layer last
        self.stage_of = [workload.stage_of(layer) for layer in range(workload.num_layers)]
        self.hands_over = [workload.hands_over(layer) for layer in range(workload.num_layers)]
        self.begins = set(workload.stages) if workload.num_stages > 1 else set()
        stages = range(workload.num_stages)
        self.free = {
            (kind, stage): _free_slots(n)
            for kind, n in _slot_counts(workload).items()
            for stage in stages
        }
        # Slots of the cells that are loaded and not yet computed: (kind, step, layer, batch).
        self.held: dict[_Key, list[int]] = {}
        self.stores: dict[Lane, deque[int]] = {
            (stage, stream): deque(maxlen=workload.store_slots)
            for stage in stages
            for stream in (Stream.STORE_CACHE, Stream.STORE_HIDDEN, Stream.HAND_OVER)
        }
        # step * num_layers + layer last computed
        self.reached = [
            workload.first_step(b) * workload.num_layers - 1 for b in range(workload.num_batches)
        ]
        # Step, layer and batches of the last computation, if it was one of experts.
        self.unit: tuple[int, int, tuple[int, ...]] | None = None
        self.recent: deque[Op] = deque(maxlen=4)
        self.index = 0
        # A computation needs one load of its layer, at most.
        self.loads_left = [workload.num_steps * workload.num_batches] * workload.num_layers
        self.barriers_left = _SPARE_BARRIERS

    def run(self) -> Iterator[Issue]:
        workload, latest, recent = self.workload, self.latest, self.recent
        stage_of, together = self.stage_of, workload.several_hosts
        # By stage: the latest barrier, and the last issue of each stream since.
        barrier: dict[int, int] = {}
        since: list[dict[Lane, int]] = [{} for _ in range(workload.num_stages)]
        op: Any
        for index, op in enumerate(self.ops):
            self.index = index
            kind = type(op)
            stream = _STREAMS.get(kind)
            if op is None:
                raise ScheduleError(
                    f"op {index}, None: is not an op; is there an empty yield?", index=index
                )
            if stream is None:
                raise self._error(op, "is not an op; see scheduling.ops for those there are")
            self._check(op)
            self._count(op)
            stage = (op.stage or 0) if kind is Barrier else stage_of[op.layer]
            found = []
            # Of one unit of experts after another, all batches need what the first one does.
            again = kind is ComputeExperts and self._goes_on(op)
            for key in _keys(op, workload, most=1 if again else None):
                need = latest.get(key)
                if need is None:
                    raise self._unmet(op, key)
                found.append(need)
            slot, crosses = None, False
            if kind is LoadWeights or kind is LoadChosen:
                slot = self._load(op, found)
            elif kind is FreeWeights:
                slot = self._free(op, found)
            elif kind is Barrier:
                # Streams are in order, so the last of each stands for all of it.
                for number in range(len(since)) if op.stage is None else (stage,):
                    found.extend(since[number].values())
                    if number in barrier and number != stage:
                        found.append(barrier[number])
            elif kind is ComputeExperts:
                found = list(dict.fromkeys(found))  # of a layer's second unit all need the first
                self._remember_experts(op)
            else:
                if kind is Compute:
                    self._compute(op, found)
                elif kind is Project:
                    self.loads_left[op.layer] += 1
                elif kind is StoreCache or kind is StoreHidden:
                    if kind is StoreHidden and self.hands_over[op.layer]:
                        stream, crosses = Stream.HAND_OVER, True
                    self.stores[stage, stream].append(index)
                elif kind is not Attend:
                    slot = self._load_cell(op, found)
                    crosses = kind is LoadHidden and op.layer in self.begins
                self._remember(op)
            if stage in barrier:
                found.append(barrier[stage])
            place = 0 if together and stream is Stream.HAND_OVER else stage
            yield Issue(index, op, stream, tuple(found), slot, place, crosses)
            if kind is Barrier:
                for number in range(len(since)) if op.stage is None else (stage,):
                    barrier[number] = index
                    since[number].clear()
            else:
                since[stage][place, stream] = index
            recent.append(op)

    def _load(self, op: Any, found: list[int]) -> int:
        if op.layer in self.slots:
            missing = FreeWeights(op.layer)
            raise self._error(
                op,
                f"needs {missing} before it: the layer is held already; free it first, or leave "
                "the second load out",
                missing,
            )
        stage = self.stage_of[op.layer]
        if not self.free[LoadWeights, stage]:
            layers = [layer for layer in self.slots if self.stage_of[layer] == stage]
            held = ", ".join(map(str, layers))
            missing = FreeWeights(layers[0])
            raise self._error(
                op,
                f"all {self.workload.weight_slots} weight slots are held (layers {held}); "
                f"{missing} has to come before it, or the workload needs more weight_slots",
                missing,
            )
        if not self.loads_left[op.layer]:
            w = self.workload
            raise self._error(
                op,
                f"layer {op.layer} was loaded {w.num_steps * w.num_batches} times, once for each "
                f"step and batch, and nothing can need it more often{_ENDLESS}",
            )
        self.loads_left[op.layer] -= 1
        self.latest[Weights, 0, op.layer, 0] = self.index
        self.slots[op.layer] = slot = self._take((LoadWeights, stage), found)
        return slot

    def _free(self, op: Any, found: list[int]) -> int:
        slot = self.slots.pop(op.layer)
        del self.latest[Weights, 0, op.layer, 0]
        self.free[LoadWeights, self.stage_of[op.layer]].append((slot, self.index))
        reader = self.reader.pop(op.layer, None)
        if reader is not None:
            found.append(reader)  # computing is one stream: the last reader is enough
        return slot

    def _load_cell(self, op: Any, found: list[int]) -> int:
        kind = type(op)
        stage = self.stage_of[op.layer]
        if not self.free[kind, stage]:
            first = next(
                key for key in self.held if key[0] is kind and self.stage_of[key[2]] == stage
            )
            missing = Compute(*first[1:])
            name = _SLOT_FIELDS[kind]
            raise self._error(
                op,
                f"all {getattr(self.workload, name)} {name.replace('_', ' ')} are held; {missing} "
                f"has to come before it, or the workload needs more {name}",
                missing,
            )
        slot = self._take((kind, stage), found)
        self.held.setdefault((kind, op.step, op.layer, op.batch), []).append(slot)
        return slot

    def _compute(self, op: Any, found: list[int]) -> None:
        """Gives back what was loaded for it; waits for attention, and for stores far behind."""
        self.unit = None
        cell = op.step, op.layer, op.batch
        if (Project, *cell) in self.latest:
            attended = self.latest.get((Attend, *cell))
            if attended is None:
                raise self._unmet(op, (Attend, *cell))
            found.append(attended)
        for kind in (LoadCache, LoadHidden):
            for slot in self.held.pop((kind, op.step, op.layer, op.batch), ()):
                self.free[kind, self.stage_of[op.layer]].append((slot, self.index))
        for stream in (Stream.STORE_CACHE, Stream.STORE_HIDDEN, Stream.HAND_OVER):
            stores = self.stores[self.stage_of[op.layer], stream]
            if len(stores) == stores.maxlen:
                found.append(stores[0])

    def _take(self, kind: tuple[type, int], found: list[int]) -> int:
        slot, freed_by = self.free[kind].popleft()
        if freed_by is not None:
            found.append(freed_by)
        return slot

    def _count(self, op: Any) -> None:
        """Barriers are few beside other ops: alone they would never come to an end."""
        if type(op) is not Barrier:
            self.barriers_left += _BARRIERS_PER_OP
        elif self.barriers_left:
            self.barriers_left -= 1
        else:
            raise self._error(
                op,
                f"is one of more than {_BARRIERS_PER_OP} barriers for each other op{_ENDLESS}",
            )

    def _check(self, op: Any) -> None:
        """What can be said of an op by itself and by how far its batch is."""
        w, kind = self.workload, type(op)
        if kind is Barrier:
            if op.stage is not None and not 0 <= op.stage < w.num_stages:
                raise self._outside(op, "stage", w.num_stages)
            return
        layer = op.layer
        if not 0 <= layer < w.num_layers:
            raise self._outside(op, "layer", w.num_layers)
        if kind is FreeWeights:
            return
        step = op.step
        if not 0 <= step < w.num_steps:
            raise self._outside(op, "step", w.num_steps)
        if kind is LoadWeights:
            return
        if kind in OF_BATCHES:
            self._check_experts(op)
            return
        if not 0 <= op.batch < w.num_batches:
            raise self._outside(op, "batch", w.num_batches)
        if w.experts is not None:
            self._check_beside_experts(op)
        if kind in PARTS:
            self._check_part(op)
        if kind is LoadCache or kind is StoreCache:
            if not w.has_cache(layer):
                raise self._error(op, f"layer {layer} keeps no cache; leave the op out")
            if kind is LoadCache and step == 0:
                raise self._error(op, "step 0 makes the cache: there is none to load; leave it out")
        reached, place = self.reached[op.batch], self._place(op)
        if kind in (StoreHidden, StoreCache) and (kind, step, layer, op.batch) in self.latest:
            raise self._error(
                op, "was stored before; each step, layer and batch is stored once: drop this"
            )
        if kind is StoreHidden:
            if place < reached:
                then = Compute(reached // w.num_layers, reached % w.num_layers, op.batch)
                raise self._error(op, f"is late: {then} came before it; issue it before {then}")
        elif kind is LoadCache and (Attend, step, layer, op.batch) in self.latest:
            attend = Attend(step, layer, op.batch)
            raise self._error(
                op, f"is late: {attend}, which it is for, came before it; issue it before that"
            )
        elif kind is not StoreCache and place <= reached:
            this = Compute(step, layer, op.batch)
            if kind is Compute:
                reason = "was computed before; each step, layer and batch comes once"
            else:
                reason = f"is late: {this}, which it is for, came before it; issue it before that"
            raise self._error(op, reason)

    def _check_part(self, op: Any) -> None:
        """Of what attends to a cache, each part once."""
        if not self.workload.has_cache(op.layer):
            raise self._error(
                op,
                f"layer {op.layer} attends to no cache, so it has no parts; its Compute does all: "
                "leave this out",
            )
        if op.step == 0:
            raise self._error(
                op, "step 0 computes whole prompts in one: its Compute does all; leave this out"
            )
        if (type(op), op.step, op.layer, op.batch) in self.latest:
            raise self._error(op, "came before; each step, layer and batch has it once: drop this")

    def _goes_on(self, op: Any) -> bool:
        """Whether the last computation was that of the unit before, of the same batches."""
        return self.unit == (op.step, op.layer - 1, op.batches)

    def _check_experts(self, op: Any) -> None:
        w, kind = self.workload, type(op)
        if not w.has_experts(op.layer):
            raise self._error(op, f"layer {op.layer} has no experts; use LoadWeights and Compute")
        if kind is ComputeExperts and self._goes_on(op):
            return
        if not op.batches or len(set(op.batches)) < len(op.batches):
            raise self._error(op, "batches must be different numbers, one at least")
        router = op.step * w.num_layers + w.router_of(op.layer)
        for batch in op.batches:
            if not 0 <= batch < w.num_batches:
                raise self._outside(op, "batches", w.num_batches)
            reached, place = self.reached[batch], self._place(op)
            if reached >= place:
                raise self._error(op, f"is late: batch {batch} is through with that layer")
            wanted = router if kind is LoadChosen else place - 1
            if reached < wanted:
                step, layer = divmod(wanted, w.num_layers)
                missing: Op = Compute(step, layer, batch)
                if w.has_experts(layer):
                    missing = ComputeExperts(step, layer, op.batches)
                raise self._error(
                    op,
                    f"needs {missing} before it, which has not come; issue that earlier or this "
                    "later",
                    missing,
                )

    def _check_beside_experts(self, op: Any) -> None:
        """What a batch's own ops may not be in a model with experts."""
        w, kind = self.workload, type(op)
        if w.has_experts(op.layer) and kind is not StoreHidden:
            raise self._error(
                op, f"layer {op.layer} is a unit of experts: ComputeExperts is all there is to do"
            )
        if kind is StoreHidden and not w.gives_hidden(op.layer):
            raise self._error(
                op,
                f"layer {op.layer} leaves hidden states to the experts behind it: drop this",
            )

    def _place(self, op: Any) -> int:
        return op.step * self.workload.num_layers + op.layer

    def _remember(self, op: Any) -> None:
        """Only what later ops can still need is kept: memory does not grow with the steps."""
        latest, kind, step, layer, batch = self.latest, type(op), op.step, op.layer, op.batch
        latest[kind, step, layer, batch] = self.index
        if kind is Project:
            self.reader[layer] = self.index
        elif kind is Compute:
            self.reader[layer] = self.index
            layers = self.workload.num_layers
            self.reached[batch] = self._place(op)
            latest.pop((LoadHidden, step, layer, batch), None)
            latest.pop((LoadCache, step, layer, batch), None)
            latest.pop((Project, step, layer, batch), None)
            latest.pop((Attend, step, layer, batch), None)
            latest.pop((StoreCache, step - 1, layer, batch), None)
            latest.pop((Compute, step - 1, layer, batch), None)
            if layer:
                latest.pop((StoreHidden, step, layer - 1, batch), None)
            else:
                latest.pop((StoreHidden, step - 1, layers - 1, batch), None)

    def _remember_experts(self, op: Any) -> None:
        self.unit = op.step, op.layer, op.batches
        self.reader[op.layer] = self.index
        for batch in op.batches:
            self.latest[Compute, op.step, op.layer, batch] = self.index
            self.latest.pop((Compute, op.step - 1, op.layer, batch), None)
            self.reached[batch] = self._place(op)

    def _unmet(self, op: Any, key: _Key) -> ScheduleError:
        if isinstance(op, StoreCache) and self._place(op) <= self.reached[op.batch]:
            then = Compute(op.step + 1, op.layer, op.batch)
            return self._error(op, f"is late: {then} came before it; issue it before {then}")
        if key[0] is not Weights:
            missing = _need_of(key)
            assert not isinstance(missing, Weights)
            return self._error(
                op,
                f"needs {missing} before it, which has not come; issue that earlier or this later",
                missing,
            )
        steps = [getattr(o, "step", None) for o in (*self.recent, op)]
        load = LoadWeights(next((s for s in reversed(steps) if s is not None), 0), op.layer)
        return self._error(
            op,
            f"needs {load} before it: the layer's weights are not held here; load them earlier, "
            "or free them later",
            load,
        )

    def _outside(self, op: Op, name: str, limit: int) -> ScheduleError:
        return self._error(op, f"{name} must lie in 0..{limit - 1} for this workload")

    def _error(self, op: Op, reason: str, missing: Op | None = None) -> ScheduleError:
        after: list[Op] = []
        # What follows is shown if it can be had; a fault in it must not hide this one.
        with contextlib.suppress(Exception):
            after.extend(islice(self.ops, 2))
        return ScheduleError(
            reason, op=op, missing=missing, index=self.index, before=self.recent, after=after
        )
