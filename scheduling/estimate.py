"""Estimates that cost less than simulating every step: for searching, not for promising."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from scheduling.alike import alike
from scheduling.cost_model import CostModel
from scheduling.dependencies import Issue, Stream, bind, stream_of
from scheduling.hardware import Hardware
from scheduling.ops import (
    Compute,
    ComputeExperts,
    LoadCache,
    LoadChosen,
    LoadHidden,
    LoadWeights,
    Op,
    StoreCache,
    StoreHidden,
)
from scheduling.reported import name_of, naming, reported
from scheduling.simulate import Simulation
from scheduling.workload import Workload

Seconds = dict[str, float]
KINDS = ("weights", "experts", "cache", "hidden", "compute")


def shortened(workload: Workload, decode_steps: int) -> Workload:
    """The workload with few decode steps, which stand for all: each for the middle of its stretch.

    Raises:
        ValueError: the workload has no sizes.
    """
    sizes = workload.sizes
    if sizes is None:
        raise ValueError("the workload has no sizes: make it with LLM.workload or plan")
    stride = (workload.num_steps - 1) / decode_steps
    if stride <= 1:
        return workload
    batches = tuple(
        dataclasses.replace(
            batch,
            stride=stride,
            num_steps=1 + max(batch.num_steps > 1, round((batch.num_steps - 1) / stride)),
        )
        for batch in sizes.batches
    )
    return dataclasses.replace(
        workload,
        num_steps=1 + decode_steps,
        sizes=dataclasses.replace(sizes, batches=batches),
    )


Issues = Callable[[Workload], Iterable[Issue]]


def bound_by(schedule: Callable[[Workload], Iterable[Op]]) -> Issues:
    """What gives the issues of a schedule, named in its errors."""

    def issues(workload: Workload) -> Iterator[Issue]:
        ops = schedule(workload)
        with naming(name_of(ops)):
            yield from bind(reported(ops, workload), workload)

    return issues


def estimate(
    schedule: Callable[[Workload], Iterable[Op]],
    workload: Workload,
    hardware: Hardware,
    *,
    decode_steps: int = 3,
    issues: Issues | None = None,
) -> tuple[float, float]:
    """Seconds of prefill and of decode, by simulating a few decode steps.

    What passes until a computation ends, since the one before it, is prefill's or decode's as the
    computation is. Over several stages a step begins before the one before it has ended: where all
    batches end one step before any ends the next, a step takes what is between their ends.

    Args:
        issues: Of the schedule, where they are known; None: the schedule is asked for its ops.

    Raises:
        As ``simulate``.
    """
    short = shortened(workload, decode_steps)
    seconds = [0.0, 0.0]
    before = end = 0.0
    phase = 0
    bound = (issues or bound_by(schedule))(short)
    ends: dict[int, list[float]] = {}  # of each step, the first and the last batch's
    head = short.num_layers - 1
    for worked in Simulation(bound, short, hardware).run():
        op, end = worked.issue.op, worked.end
        if isinstance(op, (Compute, ComputeExperts)):
            phase = int(op.step > 0)
            seconds[phase] += end - before
            before = end
            if op.layer == head:
                ends.setdefault(op.step, [end, end])[1] = end
    seconds[phase] += end - before
    steps = short.num_steps - 1
    if not steps:
        return seconds[0], 0.0
    times = (workload.num_steps - 1) / steps
    if short.num_stages > 1 and all(ends[n][1] <= ends[n + 1][0] for n in range(steps)):
        prefill, decoded = ends[0][1], ends[steps][1]
        return prefill, (decoded - prefill) * times + end - decoded
    return seconds[0], seconds[1] * times


def lanes(workload: Workload, hardware: Hardware) -> dict[str, tuple[Seconds, Seconds]]:
    """Kind of work -> seconds that each stream and each resource is busy in prefill and in decode.

    If nothing waits for anything, a phase takes as long as its busiest lane (paper, section 4.3).
    Each layer is loaded once a step and group, as in a zig-zag.
    """
    sizes = workload.sizes
    if sizes is None:
        raise ValueError("the workload has no sizes: make it with LLM.workload or plan")
    # One decode step in the middle stands for all of its batch; the third only for there to be
    # a step after it, for which its cache is stored.
    alone = {id(batch): batch for batch in sizes.batches}  # most are one and the same
    shorter = {
        key: dataclasses.replace(
            batch,
            stride=max(1.0, float(batch.num_steps - 1)),
            num_steps=min(3, batch.num_steps + (batch.num_steps > 1)),
        )
        for key, batch in alone.items()
    }
    middle = tuple(shorter[id(batch)] for batch in sizes.batches)
    model = dataclasses.replace(
        workload, num_steps=3, sizes=dataclasses.replace(sizes, batches=middle)
    )
    costs = CostModel(model, hardware)
    found: dict[str, tuple[Seconds, Seconds]] = {
        kind: (defaultdict(float), defaultdict(float)) for kind in KINDS
    }

    def lane(layer: int, stream: str) -> str:
        stage = workload.stage_of(layer)
        return stream if workload.num_stages == 1 else f"stage {stage}{_OF}{stream}"

    def add(kind: str, op: Any, times: int, *, unpack: bool = False) -> None:
        phase = found[kind][1 if op.step else 0]
        stream = lane(op.layer, stream_of(op, workload).value)
        for resource, seconds in costs.pieces(op, unpack=unpack):
            phase[resource] += times * seconds
            phase[stream] += times * seconds

    steps = workload.num_steps - 1
    groups = len(workload.groups())
    for (layer, number), count in alike(model, costs.kinds).items():
        for step in (0, 1) if steps else (0,):
            if workload.has_experts(layer):
                if number is None:
                    _add_experts(model, layer, step, count * (steps if step else 1), add)
                elif workload.gives_hidden(layer):
                    times = sizes.batches[number].num_steps - 1 if step else 1
                    add("hidden", StoreHidden(step, layer, number), count * times)
                continue
            if number is None:
                loads = count * groups * (steps if step else 1)
                add("weights", LoadWeights(step, layer), loads)
                # Unpacked once a load, with the first batch.
                whole = dict(costs.pieces(Compute(step, layer, 0), unpack=True))
                stream = stream_of(Compute(step, layer, 0)).value
                for resource, seconds in costs.pieces(Compute(step, layer, 0)):
                    more = (whole[resource] - seconds) * loads
                    found["compute"][step][resource] += more
                    found["compute"][step][lane(layer, stream)] += more
                continue
            own_steps = sizes.batches[number].num_steps - 1
            if step and not own_steps:
                continue
            times = count * (own_steps if step else 1)
            add("compute", Compute(step, layer, number), times)
            add("hidden", LoadHidden(step, layer, number), times)
            if workload.gives_hidden(layer):
                add("hidden", StoreHidden(step, layer, number), times)
            if costs.kinds.cell(layer, number) >= 0:
                if step:
                    add("cache", LoadCache(step, layer, number), times)
                add("cache", StoreCache(step, layer, number), times)
    # A pipeline fills once, in prefill; and with fewer groups than stages some of them are idle.
    slack = (groups + workload.num_stages - 1) / groups, max(1.0, workload.num_stages / groups)
    for phases in found.values():
        for phase, times_as_long in zip(phases, slack, strict=True):
            for name in phase:
                phase[name] *= times_as_long
    return found


def _add_experts(w: Workload, layer: int, step: int, times: int, add: Callable[..., None]) -> None:
    """A unit of experts, for each group of batches."""
    for group in w.groups():
        batches = tuple(group)
        chosen = w.waits_for_choice(step, batches)
        load = LoadChosen(step, layer, batches) if chosen else LoadWeights(step, layer)
        add("experts", load, times)
        add("compute", ComputeExperts(step, layer, batches), times, unpack=True)


def one_after_the_other(
    phases: Mapping[str, tuple[Seconds, Seconds]],
) -> dict[str, tuple[Seconds, Seconds]]:
    """Without overlap: one lane for each stage, in which its streams' times add up."""

    def together(phase: Seconds) -> Seconds:
        found: Seconds = defaultdict(float)
        for lane, seconds in phase.items():
            if (stream := _stream(lane)) is not None:
                found[f"all{lane.removesuffix(stream.value)}"] += seconds
        return found

    return {kind: (together(first), together(then)) for kind, (first, then) in phases.items()}


_OF = ": "
_STREAMS = {stream.value: stream for stream in Stream}


def _stream(lane: str) -> Stream | None:
    """The stream that a lane is; None: a resource."""
    return _STREAMS.get(lane.rpartition(_OF)[2])


def work_of(workload: Workload) -> int:
    """What making the sizes of a workload and looking at them takes: cells, and layers.

    Raises:
        ValueError: the workload has no sizes.
    """
    if workload.sizes is None:
        raise ValueError("the workload has no sizes: make it with LLM.workload or plan")
    return len(workload.sizes.cells) + 4 * workload.num_layers


def moving(phases: Mapping[str, tuple[Seconds, Seconds]]) -> float:
    """Seconds that all streams but those that compute are busy, one after another."""
    return sum(
        seconds
        for kind in phases.values()
        for phase in kind
        for lane, seconds in phase.items()
        if _stream(lane) not in (None, Stream.COMPUTE)
    )


def busiest(phases: Mapping[str, tuple[Seconds, Seconds]]) -> float:
    """Seconds of both phases, each as long as its busiest lane."""
    total = 0.0
    for number in (0, 1):
        together: Seconds = defaultdict(float)
        for kind in phases.values():
            for lane, seconds in kind[number].items():
                together[lane] += seconds
        total += max(together.values(), default=0.0)
    return total
