"""What waits for what, and that nothing waits for ever."""

import random
from collections import defaultdict, deque
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling import (
    Barrier,
    Compute,
    FreeWeights,
    LoadCache,
    LoadHidden,
    LoadWeights,
    StoreCache,
    StoreHidden,
    Stream,
    Weights,
    Workload,
    bind,
    needs,
    row_by_row,
    stream_of,
    zigzag,
)

from .strategies import schedules, workloads

W = Workload(num_steps=3, num_layers=4, num_batches=2)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (LoadWeights(1, 2), ()),
        (FreeWeights(2), (Weights(2),)),
        (LoadHidden(0, 0, 1), ()),
        (LoadHidden(0, 2, 1), (StoreHidden(0, 1, 1),)),
        (LoadHidden(2, 0, 1), (StoreHidden(1, 3, 1),)),
        (LoadCache(2, 1, 0), (StoreCache(1, 1, 0),)),
        (StoreHidden(1, 2, 0), (Compute(1, 2, 0),)),
        (StoreCache(1, 2, 0), (Compute(1, 2, 0),)),
        (Compute(0, 1, 0), (Weights(1), LoadHidden(0, 1, 0))),
        (Compute(1, 1, 0), (Weights(1), LoadHidden(1, 1, 0), LoadCache(1, 1, 0))),
        (Compute(1, 0, 0), (Weights(0), LoadHidden(1, 0, 0))),
        (Barrier(), ()),
    ],
)
def test_needs(op, expected):
    assert needs(op, W) == expected


def test_streams():
    assert stream_of(LoadWeights(0, 0)) is Stream.LOAD_WEIGHTS
    assert stream_of(LoadCache(1, 1, 0)) is Stream.LOAD_CACHE
    assert stream_of(StoreCache(0, 1, 0)) is Stream.STORE_CACHE
    assert stream_of(LoadHidden(0, 0, 0)) is Stream.LOAD_HIDDEN
    assert stream_of(StoreHidden(0, 0, 0)) is Stream.STORE_HIDDEN
    for op in (Compute(0, 0, 0), FreeWeights(0), Barrier()):
        assert stream_of(op) is Stream.COMPUTE
    assert all(isinstance(stream.value, str) for stream in Stream)


@given(workloads(), schedules)
def test_issues_follow_the_schedule_and_need_only_what_came_before(workload, schedule):
    issues = list(bind(schedule(workload), workload))
    assert [issue.op for issue in issues] == list(schedule(workload))
    assert [issue.index for issue in issues] == list(range(len(issues)))
    for issue in issues:
        assert issue.stream is stream_of(issue.op)
        assert all(0 <= need < issue.index for need in issue.needs)
        slotted = (LoadWeights, FreeWeights, LoadCache, LoadHidden)
        assert (issue.slot is not None) == isinstance(issue.op, slotted)


@given(workloads(), schedules)
def test_issues_are_bound_to_what_needs_says(workload, schedule):
    issues = list(bind(schedule(workload), workload))
    for issue in issues:
        bound = {issues[need].op for need in issue.needs}
        for need in needs(issue.op, workload):
            if isinstance(need, Weights):
                assert any(isinstance(o, LoadWeights) and o.layer == need.layer for o in bound)
            else:
                assert need in bound


@given(workloads(), schedules)
def test_slots_are_held_by_one_layer_at_a_time(workload, schedule):
    issues = list(bind(schedule(workload), workload))
    held, given_back = {}, deque()
    for issue in issues:
        if isinstance(issue.op, LoadWeights):
            assert 0 <= issue.slot < workload.weight_slots
            assert issue.slot not in held.values()
            held[issue.op.layer] = issue.slot
            if given_back and len(given_back) + len(held) - 1 == workload.weight_slots:
                freed = given_back.popleft()  # first in, first out
                assert freed.slot == issue.slot
                assert freed.index in issue.needs
        elif isinstance(issue.op, FreeWeights):
            assert held.pop(issue.op.layer) == issue.slot
            given_back.append(issue)


@given(workloads(), schedules)
def test_cell_slots_are_held_from_the_load_to_the_computation(workload, schedule):
    limits = {LoadCache: workload.cache_slots, LoadHidden: workload.hidden_slots}
    held = {kind: {} for kind in limits}
    given_back = {kind: {} for kind in limits}  # slot -> the Compute that was its last reader
    for issue in bind(schedule(workload), workload):
        op = issue.op
        if type(op) in limits:
            kind, cell = type(op), (op.step, op.layer, op.batch)
            assert 0 <= issue.slot < limits[kind]
            assert issue.slot not in held[kind].values()
            held[kind][cell] = issue.slot
            if issue.slot in given_back[kind]:
                assert given_back[kind][issue.slot] in issue.needs
        elif isinstance(op, Compute):
            for kind in limits:
                slot = held[kind].pop((op.step, op.layer, op.batch), None)
                if slot is not None:
                    given_back[kind][slot] = issue.index


@given(workloads(), schedules)
def test_computations_do_not_run_ahead_of_the_stores(workload, schedule):
    stores = {StoreCache: [], StoreHidden: []}
    for issue in bind(schedule(workload), workload):
        if type(issue.op) in stores:
            stores[type(issue.op)].append(issue.index)
        elif isinstance(issue.op, Compute):
            for issued in stores.values():
                if len(issued) >= workload.store_slots:
                    assert issued[-workload.store_slots] in issue.needs


def test_a_cell_loaded_twice_gives_both_slots_back():
    again = [LoadWeights(0, 0)]
    for batch in (0, 1):
        again += [LoadHidden(0, 0, batch), LoadHidden(0, 0, batch), Compute(0, 0, batch)]
    assert [issue.slot for issue in bind(again, W)] == [0, 0, 1, None, 0, 1, None]


def test_slots_alternate():
    loads = [i for i in bind(zigzag(W), W) if isinstance(i.op, LoadWeights)]
    assert [issue.slot for issue in loads] == [0, 1] * 6


@given(workloads(), schedules)
def test_weights_are_freed_after_every_computation_that_used_them(workload, schedule):
    issues = list(bind(schedule(workload), workload))
    readers = defaultdict(list)
    for issue in issues:
        if isinstance(issue.op, Compute):
            readers[issue.op.layer].append(issue)
        elif isinstance(issue.op, FreeWeights):
            used = readers.pop(issue.op.layer)
            # Their stream is in order: to wait for the last of them is to wait for all.
            assert {reader.stream for reader in used} == {Stream.COMPUTE}
            assert used[-1].index in issue.needs


def test_an_op_issued_again_binds_what_comes_later_to_its_latest_issue():
    workload = Workload(num_steps=2, num_layers=3, num_batches=3)
    issues = list(bind(row_by_row(workload), workload))
    latest, used = {}, set()
    for issue in issues:
        if isinstance(issue.op, LoadWeights):
            latest[issue.op.layer] = issue.index
        elif isinstance(issue.op, Compute):
            loads = [n for n in issue.needs if isinstance(issues[n].op, LoadWeights)]
            assert loads == [latest[issue.op.layer]]
            used.add(loads[0])
    assert len(used) == 2 * 3 * 3
    again = [LoadWeights(0, 0), LoadHidden(0, 0, 0), LoadHidden(0, 0, 0), Compute(0, 0, 0)]
    assert [issue.needs for issue in bind(again, W)] == [(), (), (), (0, 2)]


def test_weights_go_by_layer_so_that_steps_may_share_a_load():
    """As a rolling schedule does: one load serves two batches at different steps."""
    workload = Workload(num_steps=2, num_layers=1, num_batches=2)
    ops = [
        LoadWeights(0, 0),
        LoadHidden(0, 0, 0),
        Compute(0, 0, 0),
        StoreHidden(0, 0, 0),
        LoadHidden(1, 0, 0),
        Compute(1, 0, 0),
        LoadHidden(0, 0, 1),
        Compute(0, 0, 1),
    ]
    issues = list(bind(ops, workload))
    assert all(0 in issues[place].needs for place in (2, 5, 7))


@given(workloads(), schedules, st.data())
def test_everything_before_a_barrier_comes_before_everything_after_it(workload, schedule, data):
    ops = list(schedule(workload))
    place = data.draw(st.integers(0, len(ops)))
    ops.insert(place, Barrier())
    issues = list(bind(ops, workload))
    last = {issue.stream: issue.index for issue in issues[:place]}
    reached = _reached_from(issues, place)
    assert set(last.values()) <= reached
    assert all(
        place in issue.needs or _reached_from(issues, issue.index) >= {place}
        for issue in issues[place + 1 :]
    )


def _reached_from(issues, index):
    """All that must be done before ``index``, in as many hops as it takes."""
    reached, waiting = set(), list(issues[index].needs)
    while waiting:
        need = waiting.pop()
        if need not in reached:
            reached.add(need)
            waiting.extend(issues[need].needs)
    return reached


def test_bind_takes_only_what_is_asked_of_it():
    drawn = []

    def endless():
        for op in zigzag(Workload(num_steps=10**9, num_layers=3, num_batches=1)):
            drawn.append(op)
            yield op

    workload = Workload(num_steps=10**9, num_layers=3, num_batches=1)
    assert len(list(islice(bind(endless(), workload), 10))) == 10
    assert len(drawn) == 10
    assert len(list(islice(bind((Barrier() for _ in count()), workload), 10))) == 10


def test_what_bind_remembers_does_not_grow_with_the_steps():
    from scheduling.dependencies import _Binder

    workload = Workload(num_steps=10**9, num_layers=4, num_batches=3)
    sizes = set()
    binder = _Binder(zigzag(workload), workload)
    for issue in islice(binder.run(), 4000):
        if issue.op == FreeWeights(3):
            sizes.add(len(binder.latest))
    assert len(sizes) == 1
    assert sizes.pop() <= 4 * 4 * 3


@given(workloads(), schedules, st.randoms(use_true_random=False))
def test_no_valid_schedule_deadlocks(workload, schedule, chance: random.Random):
    """Streams are queues; any that may go on goes on, in any order: all of them finish."""
    queues = defaultdict(deque)
    issues = list(bind(schedule(workload), workload))
    for issue in issues:
        queues[issue.stream].append(issue)
    done, filled = set(), {}
    while queues:
        ready = [stream for stream, queue in queues.items() if done.issuperset(queue[0].needs)]
        assert ready, f"stuck at {[str(queue[0].op) for queue in queues.values()]}"
        stream = chance.choice(ready)
        issue = queues[stream].popleft()
        if isinstance(issue.op, LoadWeights):
            assert issue.slot not in filled
            filled[issue.slot] = issue.op.layer
        elif isinstance(issue.op, FreeWeights):
            assert filled.pop(issue.slot) == issue.op.layer
        elif isinstance(issue.op, Compute):
            assert issue.op.layer in filled.values()
        done.add(issue.index)
        if not queues[stream]:
            del queues[stream]
    assert len(done) == len(issues)
    assert not filled
