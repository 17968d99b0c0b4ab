"""The executor, with effects that only record: order, overlap, errors, stopping."""

import dataclasses
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_jax.engine.executor import ExecutionError, execute
from scheduling import (
    SCHEDULES,
    Barrier,
    Compute,
    FreeWeights,
    LoadHidden,
    LoadWeights,
    ScheduleError,
    StoreHidden,
    Stream,
    Workload,
    bind,
    serialize,
    zigzag,
)


class Recorder:
    """Effects that note when each issue began and ended."""

    def __init__(self, *, effortless=(), fail_at=None, finish_after=None):
        self.lock = threading.Lock()
        self.events = []
        self.kinds = effortless
        self.fail_at = fail_at
        self.finish_after = finish_after
        self.done = False

    def effortless(self, op):
        return isinstance(op, self.kinds)

    def wanted(self, op):
        return not self.done

    def finished(self):
        return self.done

    def make_room(self, issue):
        pass

    def perform(self, issue):
        with self.lock:
            self.events.append(("begin", issue.index))
        if issue.index == self.fail_at:
            raise OSError(5, "the disk is gone")
        if issue.op == self.finish_after:
            self.done = True
        with self.lock:
            self.events.append(("end", issue.index))


workloads = st.builds(
    Workload,
    num_steps=st.integers(1, 4),
    num_layers=st.integers(1, 5),
    num_batches=st.integers(1, 4),
    weight_slots=st.integers(2, 3),
    num_groups=st.integers(1, 3),
)


@st.composite
def staged(draw):
    """Of one stage or several."""
    workload = draw(workloads)
    layers = range(1, workload.num_layers)
    borders = draw(st.frozensets(st.sampled_from(layers), max_size=3)) if layers else ()
    return dataclasses.replace(workload, stages=(0, *sorted(borders)))


@given(
    staged(),
    st.sampled_from(sorted(SCHEDULES)),
    st.booleans(),
    st.sets(st.sampled_from([LoadWeights, FreeWeights, LoadHidden, StoreHidden])),
)
@settings(max_examples=40)
def test_every_issue_runs_once_after_what_it_needs(workload, name, serial, effortless):
    ops = list(SCHEDULES[name](workload))
    ops = list(serialize(ops)) if serial else ops
    effects = Recorder(effortless=tuple(effortless))
    timeline = execute(ops, workload, effects)
    performed = [
        issue for issue in bind(ops, workload) if not isinstance(issue.op, tuple(effortless))
    ]
    position = {event: i for i, event in enumerate(effects.events)}
    assert len(effects.events) == 2 * len(performed) == 2 * len(timeline.spans)
    needs = {issue.index: issue.needs for issue in bind(ops, workload)}
    here = {issue.index for issue in performed}

    def performed_needs(index):
        for need in needs[index]:
            if need in here:
                yield need
            else:  # an effortless op is done when what it needs is
                yield from performed_needs(need)

    last = {}
    for issue in performed:
        for need in performed_needs(issue.index):
            assert position["end", need] < position["begin", issue.index]
        before = last.get(issue.lane)
        if before is not None:
            assert position["end", before] < position["begin", issue.index]
        last[issue.lane] = issue.index


def test_streams_overlap():
    """The load of the next layer runs while a layer computes: neither ends before both began."""
    workload = Workload(num_steps=1, num_layers=2, num_batches=1)
    meeting = threading.Barrier(2, timeout=60)

    class Meeting(Recorder):
        def perform(self, issue):
            if issue.op in (Compute(0, 0, 0), LoadWeights(0, 1)):
                meeting.wait()  # raises unless both are under way at once

    execute(zigzag(workload), workload, Meeting())


def test_serialize_leaves_no_overlap():
    workload = Workload(num_steps=2, num_layers=3, num_batches=2)
    effects = Recorder()
    execute(serialize(zigzag(workload)), workload, effects)
    kinds = [kind for kind, _ in effects.events]
    assert kinds == ["begin", "end"] * (len(kinds) // 2)


def test_a_failure_ends_the_run_and_names_the_op():
    workload = Workload(num_steps=3, num_layers=4, num_batches=2)
    ops = list(zigzag(workload))
    for fail_at in range(0, len(ops), 5):
        effects = Recorder(fail_at=fail_at)
        with pytest.raises(ExecutionError, match="the disk is gone") as caught:
            execute(ops, workload, effects)
        assert caught.value.op == ops[fail_at]
        assert str(ops[fail_at]) in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)
        assert ("end", fail_at) not in effects.events


def test_a_late_result_that_fails_is_reported_too():
    """Computations fail when their results are awaited, not when they are dispatched."""
    workload = Workload(num_steps=1, num_layers=1, num_batches=1)

    class Result:
        def block_until_ready(self):
            raise RuntimeError("XLA ran out of memory")

    class Late(Recorder):
        def perform(self, issue):
            return Result() if isinstance(issue.op, Compute) else None

    with pytest.raises(ExecutionError, match="out of memory") as caught:
        execute(zigzag(workload), workload, Late())
    assert caught.value.op == Compute(0, 0, 0)


def test_an_interrupt_ends_the_run(monkeypatch):
    workload = Workload(num_steps=2, num_layers=3, num_batches=1)

    def interrupted(w):
        for i, op in enumerate(zigzag(w)):
            if i == 7:
                raise KeyboardInterrupt
            yield op

    with pytest.raises(KeyboardInterrupt):
        execute(interrupted(workload), workload, Recorder())


def test_an_interrupt_while_the_threads_end_leaves_none_of_them(monkeypatch):
    """It may come when all is done: to the wait for the threads themselves."""
    join, impatient = threading.Thread.join, [1, 1, 1]

    def interrupted(thread, timeout=None):
        if thread.name.startswith("flexgen-") and impatient:
            impatient.pop()
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    workload = Workload(num_steps=1, num_layers=2, num_batches=1)
    with pytest.raises(KeyboardInterrupt):
        execute(zigzag(workload), workload, Recorder())
    assert not [t for t in threading.enumerate() if t.name.startswith("flexgen-")]


def test_an_invalid_schedule_is_refused_at_the_op():
    workload = Workload(num_steps=1, num_layers=2, num_batches=1)
    ops = [op for op in zigzag(workload) if op != LoadWeights(0, 1)]
    with pytest.raises(ScheduleError) as caught:
        execute(ops, workload, Recorder())
    assert caught.value.missing == LoadWeights(0, 1)


def test_finished_effects_stop_the_schedule():
    """What was still to come is neither performed nor even drawn from the generator."""
    workload = Workload(num_steps=10_000, num_layers=3, num_batches=1)
    effects = Recorder(finish_after=Compute(2, 0, 0))
    drawn = 0

    def counted():
        nonlocal drawn
        for op in zigzag(workload):
            drawn += 1
            yield op

    execute(counted(), workload, effects)
    assert effects.done
    assert drawn < 1000


def test_look_ahead_is_bounded():
    workload = Workload(num_steps=50, num_layers=3, num_batches=1)
    drawn = 0
    most = 0

    class Watching(Recorder):
        def perform(self, issue):
            nonlocal most
            most = max(most, drawn - issue.index)

    def counted():
        nonlocal drawn
        for op in zigzag(workload):
            drawn += 1
            yield op

    execute(counted(), workload, Watching(), look_ahead=8)
    # one more is in the hand of the loop, one in the generator
    assert most <= 8 * len(Stream) + 2


def test_spans_name_op_stream_and_place():
    workload = Workload(num_steps=2, num_layers=3, num_batches=1)
    timeline = execute(zigzag(workload), workload, Recorder())
    seen = {(s.op, s.stream, s.step, s.layer, s.batch) for s in timeline.spans}
    assert ("Compute", "compute", 1, 2, 0) in seen
    assert ("LoadWeights", "load weights", 1, 0, None) in seen
    assert ("FreeWeights", "compute", None, 1, None) in seen
    assert all(0 <= s.start <= s.end for s in timeline.spans)


def test_a_barrier_is_an_op_like_any_other():
    workload = Workload(num_steps=1, num_layers=1, num_batches=1)
    effects = Recorder()
    execute([Barrier(), *zigzag(workload), Barrier()], workload, effects)
    assert effects.events[0] == ("begin", 0)
    assert effects.events[-1] == ("end", len(effects.events) // 2 - 1)
