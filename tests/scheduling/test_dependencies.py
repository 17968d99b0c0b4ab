"""What waits for what, and that nothing waits for ever."""

import dataclasses
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
    ScheduleError,
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

from .strategies import reached_from, schedules, workloads

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
        assert issue.stream is stream_of(issue.op, workload)
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
    for stage in range(workload.num_stages):
        held, given_back = {}, deque()
        for issue in issues:
            if issue.stage != stage:
                continue
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
    held = defaultdict(dict)
    given_back = defaultdict(dict)  # slot -> the Compute that was its last reader
    for issue in bind(schedule(workload), workload):
        op, stage = issue.op, issue.stage
        if type(op) in limits:
            kind, cell = type(op), (op.step, op.layer, op.batch)
            assert 0 <= issue.slot < limits[kind]
            assert issue.slot not in held[stage, kind].values()
            held[stage, kind][cell] = issue.slot
            if issue.slot in given_back[stage, kind]:
                assert given_back[stage, kind][issue.slot] in issue.needs
        elif isinstance(op, Compute):
            for kind in limits:
                slot = held[stage, kind].pop((op.step, op.layer, op.batch), None)
                if slot is not None:
                    given_back[stage, kind][slot] = issue.index


@given(workloads(), schedules)
def test_computations_do_not_run_ahead_of_the_stores(workload, schedule):
    stores = defaultdict(list)  # by stage and stream
    for issue in bind(schedule(workload), workload):
        if isinstance(issue.op, (StoreCache, StoreHidden)):
            stores[workload.stage_of(issue.op.layer), issue.stream].append(issue.index)
        elif isinstance(issue.op, Compute):
            for (stage, _), issued in stores.items():
                if stage == issue.stage and len(issued) >= workload.store_slots:
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
    last = {issue.lane: issue.index for issue in issues[:place]}
    reached = reached_from(issues, place)
    assert set(last.values()) <= reached
    assert all(
        place in issue.needs or reached_from(issues, issue.index) >= {place}
        for issue in issues[place + 1 :]
    )


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
        queues[issue.lane].append(issue)
    done, filled = set(), {}
    while queues:
        ready = [lane for lane, queue in queues.items() if done.issuperset(queue[0].needs)]
        assert ready, f"stuck at {[str(queue[0].op) for queue in queues.values()]}"
        lane = chance.choice(ready)
        issue = queues[lane].popleft()
        if isinstance(issue.op, LoadWeights):
            assert (issue.stage, issue.slot) not in filled
            filled[issue.stage, issue.slot] = issue.op.layer
        elif isinstance(issue.op, FreeWeights):
            assert filled.pop((issue.stage, issue.slot)) == issue.op.layer
        elif isinstance(issue.op, Compute):
            assert issue.op.layer in filled.values()
        done.add(issue.index)
        if not queues[lane]:
            del queues[lane]
    assert len(done) == len(issues)
    assert not filled


STAGED = Workload(num_steps=3, num_layers=6, num_batches=4, stages=(0, 2, 4), num_groups=4)


@given(workloads(), schedules)
def test_a_layer_is_computed_by_its_stage_and_what_it_makes_handed_over(workload, schedule):
    for issue in bind(schedule(workload), workload):
        if isinstance(issue.op, Barrier):
            continue
        stage = workload.stage_of(issue.op.layer)
        assert issue.op.layer in workload.layers_of(stage)
        if isinstance(issue.op, StoreHidden) and workload.hands_over(issue.op.layer):
            assert issue.lane == (0 if workload.several_hosts else stage, Stream.HAND_OVER)
        else:
            assert issue.stage == stage
            assert issue.stream is stream_of(issue.op)


def test_stages_have_slots_of_their_own():
    issues = list(bind(zigzag(STAGED), STAGED))
    loads = [i for i in issues if isinstance(i.op, LoadWeights)]
    for stage in range(3):
        own = [i.slot for i in loads if i.stage == stage]
        assert own == [0, 1] * (len(own) // 2)
    # While the last stage is at its first group, the others hold layers as well.
    held = set()
    most = 0
    for issue in issues:
        if isinstance(issue.op, LoadWeights):
            held.add(issue.stage)
        elif isinstance(issue.op, FreeWeights):
            held.discard(issue.stage)
        most = max(most, len(held))
    assert most == 1  # in the order; beside each other in time: see test_simulate.py


def test_a_barrier_of_a_stage_holds_up_that_stage_alone():
    ops = list(zigzag(STAGED))
    place = 1 + next(
        i for i, op in enumerate(ops) if isinstance(op, Compute) and STAGED.stage_of(op.layer) == 2
    )
    ops.insert(place, Barrier(stage=1))
    issues = list(bind(ops, STAGED))
    assert {issues[n].stage for n in issues[place].needs} == {1}
    for issue in issues[place + 1 :]:
        assert (place in issue.needs) == (issue.stage == 1)
    with pytest.raises(ScheduleError, match=r"Barrier\(stage=3\): stage must lie in 0\.\.2"):
        list(bind([Barrier(stage=3)], STAGED))


def test_between_hosts_all_hand_overs_are_in_one_order():
    far = dataclasses.replace(STAGED, hosts=(0, 1, 2))
    lanes = {i.lane for i in bind(zigzag(far), far) if i.stream is Stream.HAND_OVER}
    assert lanes == {(0, Stream.HAND_OVER)}
    assert len({i.lane for i in bind(zigzag(STAGED), STAGED) if i.stream is Stream.HAND_OVER}) == 3
