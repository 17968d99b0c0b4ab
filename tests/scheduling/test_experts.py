"""Units of experts: what their ops wait for, and every schedule with them."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling import (
    SCHEDULES,
    Compute,
    ComputeExperts,
    Cut,
    Experts,
    LoadChosen,
    LoadHidden,
    LoadWeights,
    ScheduleError,
    StoreHidden,
    Stream,
    Workload,
    bind,
    needs,
    remaining,
    validate,
    zigzag,
)
from tests.scheduling.strategies import reached_from, sparse_schedules, sparse_workloads

# embed, a layer, two units of its experts, a layer, two units, head
W = Workload(
    num_steps=2,
    num_layers=8,
    num_batches=2,
    weight_slots=3,
    experts=Experts(frozenset([2, 3, 5, 6]), count=16, chosen=1),
)


@given(sparse_workloads(), sparse_schedules)
def test_every_schedule_is_valid(workload, schedule):
    validate(schedule(workload), workload)


@given(sparse_workloads(), sparse_schedules)
def test_experts_wait_for_all_that_chose_them(workload, schedule):
    issues = list(bind(schedule(workload), workload))
    computed = {}
    for issue in issues:
        op = issue.op
        match op:
            case Compute():
                computed[op.step, op.layer, op.batch] = issue.index
            case ComputeExperts() | LoadChosen():
                before = reached_from(issues, issue.index)
                # Computing is one stream, in order.
                first = {i for i in before if issues[i].stream is Stream.COMPUTE}
                latest = max(first, default=-1)
                for batch in op.batches:
                    layer = workload.router_of(op.layer)
                    assert computed[op.step, layer, batch] <= latest
    for step, layer, batch in itertools.product(
        range(workload.num_steps), range(workload.num_layers), range(workload.num_batches)
    ):
        if workload.has_experts(layer):
            several = [
                i.op
                for i in issues
                if isinstance(i.op, ComputeExperts)
                and (i.op.step, i.op.layer) == (step, layer)
                and batch in i.op.batches
            ]
            assert len(several) == 1


@given(sparse_workloads(), sparse_schedules, st.lists(st.integers(0, 3), max_size=5))
def test_a_schedule_can_be_cut_and_gone_on_with(workload, schedule, borders):
    computed = []
    whole = list(schedule(workload))
    for border in [*borders, None]:
        answers = itertools.repeat(False) if border is None else iter([False] * border + [True])
        rest = list(remaining(schedule(workload), workload))
        validate(rest, workload)
        cut = Cut(rest, workload, partial(next, answers, False))
        computed += list(_computed(issue.op for issue in bind(cut, workload)))
        if cut.ended:
            break
        workload = dataclasses.replace(workload, done=cut.done)
    assert sorted(computed) == sorted(_computed(whole))


def _computed(ops):
    for op in ops:
        if isinstance(op, Compute):
            yield op.step, op.layer, op.batch
        elif isinstance(op, ComputeExperts):
            yield from ((op.step, op.layer, batch) for batch in op.batches)


def test_few_tokens_load_what_was_chosen_and_meanwhile_the_next_layer():
    loads = [op for op in zigzag(W) if isinstance(op, (LoadWeights, LoadChosen))]
    both = (0, 1)
    assert loads[:8] == [
        LoadWeights(0, 0),
        LoadWeights(0, 1),
        LoadWeights(0, 4),
        LoadChosen(0, 2, both),
        LoadChosen(0, 3, both),
        LoadWeights(0, 7),
        LoadChosen(0, 5, both),
        LoadChosen(0, 6, both),
    ]
    many = dataclasses.replace(W, device_batch_size=64)
    assert not any(isinstance(op, LoadChosen) for op in zigzag(many))


def test_what_the_ops_need():
    assert needs(ComputeExperts(1, 3, (0, 1)), W)[1:] == (Compute(1, 2, 0), Compute(1, 2, 1))
    assert needs(LoadChosen(1, 3, (0, 1)), W) == (Compute(1, 1, 0), Compute(1, 1, 1))
    assert needs(LoadHidden(0, 4, 1), W) == (StoreHidden(0, 3, 1),)
    assert needs(StoreHidden(0, 3, 1), W) == (Compute(0, 3, 1),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((ComputeExperts(0, 2, (0, 1)), ComputeExperts(0, 2, ())), "one at least"),
        ((ComputeExperts(0, 2, (0, 1)), ComputeExperts(0, 2, (0, 2))), "batches must lie in 0..1"),
        ((ComputeExperts(0, 2, (0, 1)), ComputeExperts(0, 2, (0,))), "needs ComputeExperts"),
        ((ComputeExperts(0, 2, (0, 1)), Compute(0, 2, 0)), "is a unit of experts"),
        ((ComputeExperts(0, 2, (0, 1)), ComputeExperts(0, 1, (0, 1))), "has no experts"),
        (
            (ComputeExperts(0, 3, (0, 1)), ComputeExperts(0, 2, (0, 1))),
            "is through with that layer",
        ),
        ((StoreHidden(0, 3, 0), StoreHidden(0, 2, 0)), "leaves hidden states to the experts"),
        ((LoadChosen(0, 2, (0, 1)), None), "needs LoadWeights"),
        ((Compute(0, 1, 1), None), "needs Compute(step=0, layer=1, batch=1)"),
        ((ComputeExperts(1, 6, (0, 1)), None), "needs"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    old, new = change
    ops = [op if op != old else new for op in zigzag(W)]
    assert ops.count(new) >= 1
    with pytest.raises(ScheduleError, match="(?s)" + _escaped(message)):
        validate([op for op in ops if op is not None], W)


def _escaped(message):
    return message.replace("(", r"\(").replace(")", r"\)").replace(".", r"\.")


def test_a_schedule_that_ends_before_its_experts_names_them():
    ops = list(itertools.takewhile(lambda op: op != LoadChosen(1, 6, (0, 1)), zigzag(W)))
    ops = [op for op in ops if op != LoadWeights(1, 7)]
    with pytest.raises(ScheduleError) as error:
        validate(ops, W)
    assert error.value.missing == ComputeExperts(1, 6, (0, 1))


def test_lock_step_says_that_it_cannot():
    with pytest.raises(ScheduleError, match="use zigzag"):
        list(SCHEDULES["lock_step"](W))


@pytest.mark.parametrize(
    "experts",
    [Experts(frozenset(), 4, 2), Experts(frozenset([1]), 4, 2), Experts(frozenset([7]), 4, 2)],
)
def test_experts_stand_behind_a_layer(experts):
    with pytest.raises(ValueError, match="experts must be"):
        dataclasses.replace(W, experts=experts)


def test_a_stage_does_not_begin_with_experts():
    with pytest.raises(ValueError, match="must not begin with experts"):
        dataclasses.replace(W, stages=(0, 3))
