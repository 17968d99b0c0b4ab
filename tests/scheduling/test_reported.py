"""Schedules that never end, give nothing, or fail: which one, and where.

The bound of ops is what ends these tests: without it they would never return.
"""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling import (
    Barrier,
    FreeWeights,
    LoadWeights,
    ScheduleError,
    StoreCache,
    StoreHidden,
    Workload,
    bind,
    remaining,
    serialize,
    serialized,
    simulate,
    validate,
    zigzag,
)

from .strategies import schedules, workloads
from .test_simulate import MACHINE, workload

W = Workload(num_steps=3, num_layers=4, num_batches=2)


def only_barriers(w):
    while True:
        yield Barrier()


def barriers_behind(w):
    yield from zigzag(w)
    yield from only_barriers(w)


def loads_for_nothing(w):
    for layer in itertools.cycle(range(w.num_layers)):
        yield LoadWeights(0, layer)
        yield FreeWeights(layer)


def again_and_again(w):
    while True:
        yield from zigzag(w)


def stores_for_ever(w):
    for op in zigzag(w):
        yield op
        while isinstance(op, (StoreCache, StoreHidden)):
            yield op


@pytest.mark.parametrize(
    ("endless", "words"),
    [
        (only_barriers, "more than 10 barriers for each other op; does the schedule ever end?"),
        (barriers_behind, "more than 10 barriers for each other op; does the schedule ever end?"),
        (loads_for_nothing, "was loaded 6 times, once for each step and batch, and nothing"),
        (again_and_again, "was computed before"),
        (stores_for_ever, "was stored before; each step, layer and batch is stored once"),
    ],
)
def test_one_that_never_ends_is_reported(endless, words):
    for given_ops in (endless, endless(W)):
        with pytest.raises(ScheduleError) as caught:
            validate(given_ops, W)
        error = caught.value
        assert error.schedule == endless.__name__
        assert str(error).startswith(f"schedule {endless.__name__}: op {error.index}, {error.op}: ")
        assert words in str(error) or "is late" in str(error)
    with pytest.raises(ScheduleError, match="op "):
        list(bind(endless(W), W))  # as the executor consumes it


@given(workloads(), schedules)
def test_the_bound_holds_nothing_up_that_a_valid_schedule_does(w, schedule):
    once = list(serialize(schedule(w), w))
    validate(once, w)
    validate(serialize(once, w), w)


@given(workloads(), schedules, st.data())
def test_what_is_left_of_a_serialized_schedule_is_within_the_bound(w, schedule, data):
    steps = st.integers(0, w.num_steps)
    left = dataclasses.replace(w, done=tuple(data.draw(steps) for _ in range(w.num_batches)))
    ops = list(remaining(serialize(schedule(left), left), left))
    validate(ops, left)
    for first, second in itertools.pairwise(ops):
        assert not isinstance(first, Barrier) or first != second


def test_none_instead_of_ops_is_reported():
    def forgot_to_yield(w):
        list(zigzag(w))

    with pytest.raises(ScheduleError) as caught:
        validate(forgot_to_yield, W)
    assert str(caught.value) == (
        "schedule forgot_to_yield: None came instead of its ops; a schedule yields them"
    )
    with pytest.raises(ScheduleError, match=r"^None came instead"):
        validate(forgot_to_yield(W), W)
    with pytest.raises(ScheduleError, match="a value of type int came instead"):
        validate(lambda w: 7, W)


@pytest.mark.parametrize("value", [None, "Barrier()", [Barrier()], Barrier])
def test_what_is_no_op_is_reported(value):
    def mixed(w):
        yield LoadWeights(0, 0)
        yield value

    with pytest.raises(ScheduleError, match=r"^schedule mixed: op 1, .*: is not an op") as caught:
        validate(mixed, W)
    assert caught.value.index == 1


def test_one_that_raises_is_reported_with_what_it_raised():
    def faulty(w):
        yield from itertools.islice(zigzag(w), 5)
        raise KeyError("layer_7")

    for ops in (faulty, faulty(W)):
        with pytest.raises(ScheduleError) as caught:
            validate(ops, W)
        assert str(caught.value) == "schedule faulty: op 5 did not come: KeyError: 'layer_7'"
        assert isinstance(caught.value.__cause__, KeyError)
        assert caught.value.index == 5

    def fails_at_once(w):
        raise ZeroDivisionError

    with pytest.raises(
        ScheduleError, match=r"fails_at_once: op 0 did not come: ZeroDivisionError$"
    ):
        validate(fails_at_once, W)


def test_the_simulator_reports_the_same():
    sized = workload()
    for schedule in (only_barriers, loads_for_nothing):
        with pytest.raises(ScheduleError, match=f"^schedule {schedule.__name__}: op "):
            simulate(schedule, sized, MACHINE)
    assert simulate(zigzag, sized, MACHINE) == simulate(zigzag(sized), sized, MACHINE)


def test_a_transform_does_not_lend_its_name():
    with pytest.raises(ScheduleError) as caught:
        validate(serialize(only_barriers(W)), W)
    assert caught.value.schedule is None
    with pytest.raises(ScheduleError, match=r"^schedule only_barriers: op "):
        validate(serialized(only_barriers), W)


def test_a_name_given_first_stays():
    error = ScheduleError("is wrong")
    error.name("mine")
    error.name("other")
    assert str(error) == "schedule mine: is wrong"
