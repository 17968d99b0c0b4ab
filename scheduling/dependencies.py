"""What waits for what: the one truth that validator, simulator and executor share.

``needs`` says it of one op; ``bind`` follows a whole schedule and numbers everything. An issue's
needs all have smaller numbers and streams run in order, so no schedule that ``bind`` accepts can
deadlock: of the issues that are not done, the one with the smallest number can always run.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from collections.abc import Iterable, Iterator

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


class Stream(enum.Enum):
    """What runs in order within itself, and beside the others."""

    LOAD_WEIGHTS = "load weights"
    LOAD_CACHE = "load cache"
    STORE_CACHE = "store cache"
    LOAD_HIDDEN = "load hidden"
    STORE_HIDDEN = "store hidden"
    COMPUTE = "compute"


_STREAMS: dict[type, Stream] = {
    LoadWeights: Stream.LOAD_WEIGHTS,
    FreeWeights: Stream.COMPUTE,
    LoadCache: Stream.LOAD_CACHE,
    StoreCache: Stream.STORE_CACHE,
    LoadHidden: Stream.LOAD_HIDDEN,
    StoreHidden: Stream.STORE_HIDDEN,
    Compute: Stream.COMPUTE,
    Barrier: Stream.COMPUTE,
}


def stream_of(op: Op) -> Stream:
    """The stream that ``op`` runs on."""
    return _STREAMS[type(op)]


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """A need: the latest load of a layer's weights, of whatever step, not yet freed."""

    layer: int


Need = Weights | Op


def needs(op: Op, workload: Workload) -> tuple[Need, ...]:
    """What must be done before ``op`` starts, beside a free slot and its place in its stream.

    Weights are known by their layer alone: batches at different steps may share one load.
    """
    match op:
        case Compute(step, layer, batch):
            wanted: tuple[Need, ...] = (Weights(layer), LoadHidden(step, layer, batch))
            if step > 0 and workload.has_cache(layer):
                wanted += (LoadCache(step, layer, batch),)
            return wanted
        case LoadHidden(step, layer, batch):
            if layer > 0:
                return (StoreHidden(step, layer - 1, batch),)
            # The last layer's "hidden" is the new token, which the next step begins with.
            return (StoreHidden(step - 1, workload.num_layers - 1, batch),) if step > 0 else ()
        case LoadCache(step, layer, batch):
            return (StoreCache(step - 1, layer, batch),)
        case StoreHidden(step, layer, batch) | StoreCache(step, layer, batch):
            return (Compute(step, layer, batch),)
        case FreeWeights(layer):
            return (Weights(layer),)
    return ()


@dataclasses.dataclass(frozen=True, slots=True)
class Issue:
    """An op in its place.

    Attributes:
        index: Position in the schedule, from 0.
        needs: Indices of earlier issues that must be done before this one starts.
        slot: The weight slot that a LoadWeights fills or a FreeWeights gives back.
    """

    index: int
    op: Op
    stream: Stream
    needs: tuple[int, ...]
    slot: int | None = None


class ScheduleError(ValueError):
    """A schedule that breaks a rule.

    Attributes:
        op: The offending op, or None where the fault is an op that is not there.
        missing: What should have come before (or at all), or None.
        index: Position of ``op`` in the schedule, from 0.
    """

    def __init__(
        self,
        reason: str,
        *,
        op: Op | None = None,
        missing: Op | None = None,
        index: int | None = None,
        before: Iterable[Op] = (),
    ) -> None:
        text = reason
        if op is not None and index is not None:
            context = [
                *(f"    {i}: {o}" for i, o in _numbered(before, index)),
                f"--> {index}: {op}",
            ]
            text = f"op {index}, {op}: {reason}\n" + "\n".join(context)
        super().__init__(text)
        self.op, self.missing, self.index = op, missing, index


def _numbered(before: Iterable[Op], index: int) -> list[tuple[int, Op]]:
    ops = list(before)
    return list(zip(range(index - len(ops), index), ops, strict=True))


def bind(ops: Iterable[Op], workload: Workload) -> Iterator[Issue]:
    """Numbers ``ops``, finds what each waits for, and deals out weight slots; lazily.

    Slots are a first-in first-out list: a LoadWeights takes the one that was given back longest
    ago, and waits for the FreeWeights that gave it. An op issued again binds what comes later to
    its latest issue.

    Raises:
        ScheduleError: at the first op that breaks a rule.
    """
    return _Binder(workload).run(ops)


class _Binder:
    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.latest: dict[Op, int] = {}
        self.held: dict[int, tuple[int, int, list[int]]] = {}  # layer -> load, slot, readers
        self.free: deque[tuple[int, int | None]] = deque(
            (slot, None) for slot in range(workload.weight_slots)
        )
        self.computed = bytearray(workload.num_steps * workload.num_layers * workload.num_batches)
        self.recent: deque[Op] = deque(maxlen=4)
        self.barrier: int | None = None
        self.since_barrier: dict[Stream, int] = {}
        self.index = 0

    def run(self, ops: Iterable[Op]) -> Iterator[Issue]:
        for index, op in enumerate(ops):
            self.index = index
            self._check_range(op)
            found, slot = self._find(op)
            if self.barrier is not None:
                found.append(self.barrier)
            stream = _STREAMS[type(op)]
            yield Issue(index, op, stream, tuple(found), slot)
            if isinstance(op, Barrier):
                self.barrier, self.since_barrier = index, {}
            else:
                self.since_barrier[stream] = index
            self.recent.append(op)

    def _find(self, op: Op) -> tuple[list[int], int | None]:
        match op:
            case LoadWeights():
                return self._load(op)
            case FreeWeights():
                return self._free(op)
            case Barrier():
                # Streams are in order, so the last of each stands for all of it.
                return list(self.since_barrier.values()), None
        found = []
        for need in needs(op, self.workload):
            if isinstance(need, Weights):
                load, _, readers = self._holding(op, need.layer)
                readers.append(self.index)
                found.append(load)
            elif need in self.latest:
                found.append(self.latest[need])
            else:
                raise self._error(op, f"needs {need} before it, which has not come", need)
        if isinstance(op, Compute):
            self._once(op)
        self._remember(op)
        return found, None

    def _holding(self, op: Op, layer: int) -> tuple[int, int, list[int]]:
        if layer not in self.held:
            step = getattr(op, "step", 0)
            missing = LoadWeights(step, layer)
            raise self._error(
                op, f"needs {missing} before it: the layer's weights are not held here", missing
            )
        return self.held[layer]

    def _load(self, op: LoadWeights) -> tuple[list[int], int]:
        if op.layer in self.held:
            missing = FreeWeights(op.layer)
            raise self._error(op, f"needs {missing} before it: the layer is held already", missing)
        if not self.free:
            held = ", ".join(map(str, self.held))
            missing = FreeWeights(next(iter(self.held)))
            raise self._error(
                op,
                f"all {self.workload.weight_slots} weight slots are held (layers {held}); "
                f"{missing} has to come before it, or the workload needs more weight_slots",
                missing,
            )
        slot, freed_by = self.free.popleft()
        self.held[op.layer] = (self.index, slot, [])
        return ([] if freed_by is None else [freed_by]), slot

    def _free(self, op: FreeWeights) -> tuple[list[int], int]:
        load, slot, readers = self._holding(op, op.layer)
        del self.held[op.layer]
        self.free.append((slot, self.index))
        return [load, *readers[-1:]], slot  # computing is one stream: the last reader is enough

    def _once(self, op: Compute) -> None:
        w = self.workload
        place = (op.step * w.num_layers + op.layer) * w.num_batches + op.batch
        if self.computed[place]:
            raise self._error(op, "was computed before; each step, layer and batch comes once")
        self.computed[place] = 1

    def _remember(self, op: Op) -> None:
        """Only what later ops can still need is kept: memory does not grow with the steps."""
        self.latest[op] = self.index
        match op:
            case Compute(step, layer, batch):
                self.latest.pop(Compute(step - 1, layer, batch), None)
            case StoreCache(step, layer, batch):
                self.latest.pop(LoadCache(step, layer, batch), None)
                self.latest.pop(StoreCache(step - 1, layer, batch), None)
            case StoreHidden(step, layer, batch):
                self.latest.pop(LoadHidden(step, layer, batch), None)
                before = (step, layer - 1) if layer else (step - 1, self.workload.num_layers - 1)
                self.latest.pop(StoreHidden(*before, batch), None)

    def _check_range(self, op: Op) -> None:
        w = self.workload
        for name, limit in (
            ("step", w.num_steps),
            ("layer", w.num_layers),
            ("batch", w.num_batches),
        ):
            value = getattr(op, name, 0)
            if not 0 <= value < limit:
                raise self._error(op, f"{name} must lie in 0..{limit - 1} for this workload")
        if isinstance(op, (LoadCache, StoreCache)):
            if not w.has_cache(op.layer):
                raise self._error(op, f"layer {op.layer} keeps no cache")
            if isinstance(op, LoadCache) and op.step == 0:
                raise self._error(op, "step 0 makes the cache: there is none to load")

    def _error(self, op: Op, reason: str, missing: Op | None = None) -> ScheduleError:
        return ScheduleError(reason, op=op, missing=missing, index=self.index, before=self.recent)
