"""What is refused: which op, what it misses, and where."""

import pytest
from hypothesis import assume, given
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
    Weights,
    Workload,
    bind,
    needs,
    row_by_row,
    validate,
    zigzag,
)
from scheduling.validate import ScheduleError as TheSame

from .strategies import schedules, workloads

W = Workload(num_steps=2, num_layers=3, num_batches=2)


def refused(ops, workload=W):
    with pytest.raises(ScheduleError) as caught:
        validate(ops, workload)
    return caught.value


@given(workloads(), schedules, st.data())
def test_an_op_that_is_left_out_is_missed_by_name(workload, schedule, data):
    ops = list(schedule(workload))
    places = [i for i, op in enumerate(ops) if not isinstance(op, Barrier)]
    place = data.draw(st.sampled_from(places))
    gone = ops.pop(place)
    error = refused(ops, workload)
    assert error.missing == gone
    assert str(gone) in str(error)
    if error.op is not None:
        assert ops[error.index] == error.op
        assert f"--> {error.index}: {error.op}" in str(error)
        assert error.index >= place
    else:
        assert error.index == len(ops)


@given(workloads(), schedules, st.data())
def test_an_op_put_before_what_it_needs_is_refused(workload, schedule, data):
    ops = list(schedule(workload))
    issues = list(bind(ops, workload))
    pairs = [
        (issues[need].index, issue.index)
        for issue in issues
        for need in issue.needs
        if not isinstance(issue.op, Barrier)
        and not isinstance(issues[need].op, Barrier)
        # Only what the rules ask: which slot is free is decided by the order itself.
        and not isinstance(issue.op, (LoadWeights, FreeWeights))
        and (
            issues[need].op in needs(issue.op, workload) or isinstance(issues[need].op, LoadWeights)
        )
    ]
    assume(pairs)
    before, after = data.draw(st.sampled_from(pairs))
    moved = ops.pop(after)
    ops.insert(before, moved)
    error = refused(ops, workload)
    assert error.op == moved
    assert error.index == before
    wanted = needs(moved, workload)
    assert error.missing in wanted or Weights(error.missing.layer) in wanted
    assert str(error.missing) in str(error)


def test_the_message_shows_op_need_place_and_cure():
    ops = list(zigzag(W))
    ops.remove(StoreHidden(0, 0, 0))
    error = refused(ops)
    assert str(error) == (
        "op 8, LoadHidden(step=0, layer=1, batch=0): needs StoreHidden(step=0, layer=0, batch=0) "
        "before it, which has not come; issue that earlier or this later\n"
        "    4: Compute(step=0, layer=0, batch=1)\n"
        "    5: StoreHidden(step=0, layer=0, batch=1)\n"
        "    6: FreeWeights(layer=0)\n"
        "    7: LoadWeights(step=0, layer=1)\n"
        "--> 8: LoadHidden(step=0, layer=1, batch=0)\n"
        "    9: Compute(step=0, layer=1, batch=0)\n"
        "    10: StoreHidden(step=0, layer=1, batch=0)"
    )
    assert (error.op, error.missing, error.index) == (
        LoadHidden(0, 1, 0),
        StoreHidden(0, 0, 0),
        8,
    )


def test_a_fault_further_on_does_not_hide_the_first():
    def faulty():
        yield Compute(0, 0, 0)
        raise OSError("further on")

    assert refused(faulty()).missing == LoadWeights(0, 0)


@given(workloads(), st.integers(0, 3))
def test_more_layers_than_slots_are_refused(workload, extra):
    slots = workload.weight_slots
    layers = slots + 1 + extra
    greedy = Workload(num_steps=1, num_layers=layers, num_batches=1, weight_slots=slots)
    error = refused((op for op in zigzag(greedy) if not isinstance(op, FreeWeights)), greedy)
    assert error.op == LoadWeights(0, slots)
    assert error.missing == FreeWeights(0)
    assert f"all {slots} weight slots are held" in str(error)
    assert "more weight_slots" in str(error)


def test_more_cells_than_slots_are_refused():
    workload = Workload(num_steps=1, num_layers=3, num_batches=4, hidden_slots=3)
    error = refused([LoadHidden(0, 0, batch) for batch in range(4)], workload)
    assert error.op == LoadHidden(0, 0, 3)
    assert error.missing == Compute(0, 0, 0)
    assert "all 3 hidden slots are held" in str(error)
    assert "more hidden_slots" in str(error)

    def eager(w):
        """All caches of a layer first."""
        for op in zigzag(w):
            if isinstance(op, LoadCache) and op.batch == 0:
                yield from (LoadCache(op.step, op.layer, b) for b in range(w.num_batches))
            elif not isinstance(op, LoadCache):
                yield op

    for slots in (3, 4):
        workload = Workload(num_steps=2, num_layers=3, num_batches=4, cache_slots=slots)
        if slots == 4:
            validate(eager(workload), workload)
        else:
            error = refused(eager(workload), workload)
            assert error.op == LoadCache(1, 1, 3)
            assert "all 3 cache slots are held" in str(error)


START = [LoadWeights(0, 0), LoadHidden(0, 0, 0), Compute(0, 0, 0), StoreHidden(0, 0, 0)]
ROW = list(row_by_row(W))
TO_CACHE = ROW[: ROW.index(StoreCache(0, 1, 0)) + 1]
TO_DECODE = ROW[: ROW.index(Compute(1, 1, 0)) + 1]


@pytest.mark.parametrize(
    ("ops", "words", "missing"),
    [
        ([LoadWeights(0, 0), LoadWeights(1, 0)], "is held already", FreeWeights(0)),
        ([FreeWeights(1)], "weights are not held here", LoadWeights(0, 1)),
        ([*START, FreeWeights(0), FreeWeights(0)], "not held here", LoadWeights(0, 0)),
        ([Compute(0, 0, 0)], "weights are not held here", LoadWeights(0, 0)),
        ([LoadWeights(0, 0), Compute(0, 0, 0)], "has not come", LoadHidden(0, 0, 0)),
        ([LoadHidden(1, 0, 0)], "has not come", StoreHidden(0, 2, 0)),
        ([StoreHidden(0, 0, 0)], "has not come", Compute(0, 0, 0)),
        ([StoreCache(0, 1, 0)], "has not come", Compute(0, 1, 0)),
        ([LoadCache(1, 1, 0)], "has not come", StoreCache(0, 1, 0)),
        ([LoadCache(0, 1, 0)], "step 0 makes the cache", None),
        ([*START, StoreCache(0, 0, 0)], "layer 0 keeps no cache", None),
        ([LoadCache(1, 2, 0)], "layer 2 keeps no cache", None),
        ([*START, Compute(0, 0, 0)], "was computed before", None),
        ([*START, LoadHidden(0, 0, 0)], "is late", None),
        ([*TO_CACHE, StoreHidden(0, 0, 0)], "is late", None),
        ([*TO_DECODE, LoadCache(1, 1, 0)], "is late", None),
        ([*TO_DECODE, StoreCache(0, 1, 0)], "is late", None),
        ([*TO_CACHE, LoadCache(1, 1, 0), Compute(0, 1, 0)], "was computed before", None),
        ([LoadWeights(2, 0)], "step must lie in 0..1", None),
        ([LoadWeights(-1, 0)], "step must lie in 0..1", None),
        ([LoadWeights(0, 3)], "layer must lie in 0..2", None),
        ([FreeWeights(3)], "layer must lie in 0..2", None),
        ([LoadHidden(0, 0, 2)], "batch must lie in 0..1", None),
        (["LoadWeights(step=0, layer=0)"], "is not an op", None),
    ],
)
def test_broken_rules(ops, words, missing):
    error = refused(ops)
    assert words in str(error)
    assert error.missing == missing
    assert error.op == ops[-1]
    assert error.index == len(ops) - 1


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_schedule_that_ends_early_names_the_first_computation_that_is_missing(length):
    ops = list(zigzag(W))[:length]
    error = refused(ops)
    assert error.op is None
    assert error.index == length
    assert error.missing not in ops
    assert isinstance(error.missing, Compute)
    assert f"ends after {length} ops without {error.missing}" in str(error)
    assert "of 12 computations are missing" in str(error)


def test_weights_must_be_given_back():
    error = refused(list(zigzag(W))[:-1])
    assert error.missing == FreeWeights(2)
    assert "for LoadWeights(step=1, layer=2)" in str(error)


def test_the_last_token_must_be_stored():
    error = refused([op for op in zigzag(W) if op != StoreHidden(1, 2, 1)])
    assert error.missing == StoreHidden(1, 2, 1)


def test_validate_returns_nothing_and_the_error_has_two_homes():
    assert validate(zigzag(W), W) is None
    assert TheSame is ScheduleError
    assert issubclass(ScheduleError, ValueError)
