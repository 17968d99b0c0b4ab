"""Layers in parts: what Project and Attend wait for, what is refused, and what they cost."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling import (
    SCHEDULES,
    Attend,
    Barrier,
    Compute,
    CostModel,
    Cut,
    FreeWeights,
    LoadCache,
    LoadHidden,
    LoadWeights,
    Project,
    ScheduleError,
    StoreCache,
    StoreHidden,
    Stream,
    Tier,
    Weights,
    Workload,
    bind,
    format_schedule,
    needs,
    parse_schedule,
    remaining,
    serialize,
    simulate,
    stream_of,
    validate,
    zigzag,
)
from scheduling.busy import busy
from scheduling.calibrate import observations
from tests.scheduling.strategies import in_parts, reached_from, schedules, workloads
from tests.scheduling.test_simulate import MACHINE, any_workloads, workload

W = Workload(num_steps=2, num_layers=3, num_batches=2)
COMPUTED = Compute(1, 1, 0)


def ops_until(last):
    ops = list(in_parts(zigzag(W), W))
    return ops[: ops.index(last) + 1]


def refused(ops, w=W):
    with pytest.raises(ScheduleError) as caught:
        validate(ops, w)
    return caught.value


@given(workloads(), schedules)
def test_any_schedule_may_compute_in_parts(workload, schedule):
    """Also serialized, and read back from its text."""
    ops = list(in_parts(schedule(workload), workload))
    validate(ops, workload)
    validate(serialize(ops, workload), workload)
    assert parse_schedule(format_schedule(ops)) == ops


def test_what_the_parts_need():
    assert needs(Project(1, 1, 0), W) == (Weights(1), LoadHidden(1, 1, 0))
    assert needs(Attend(1, 1, 0), W) == (Project(1, 1, 0), LoadCache(1, 1, 0))
    assert stream_of(Project(1, 1, 0)) is Stream.COMPUTE
    assert stream_of(Attend(1, 1, 0)) is Stream.ATTEND


@given(workloads(), schedules)
def test_the_rest_waits_for_attention_and_attention_for_the_query(workload, schedule):
    issues = list(bind(in_parts(schedule(workload), workload), workload))
    at = {issue.op: issue.index for issue in issues if not isinstance(issue.op, Barrier)}
    for issue in issues:
        if isinstance(issue.op, Attend):
            cell = issue.op.step, issue.op.layer, issue.op.batch
            assert at[Project(*cell)] in issue.needs
            assert at[LoadCache(*cell)] in issue.needs
            assert issue.index in issues[at[Compute(*cell)]].needs
            assert issue.stage == workload.stage_of(issue.op.layer)
        elif isinstance(issue.op, Compute):
            split = issue.op.step > 0 and workload.has_cache(issue.op.layer)
            assert split == any(isinstance(issues[n].op, Attend) for n in issue.needs)


@given(workloads())
def test_weights_stay_until_the_first_part_has_read_them(workload):
    """Also where they are freed between the parts, and loaded again for the rest."""
    if workload.weight_slots < 2:
        return

    def reloading(w):
        for op in in_parts(zigzag(w), w):
            yield op
            if isinstance(op, Attend):
                yield FreeWeights(op.layer)
                yield LoadWeights(op.step, op.layer)

    issues = list(bind(reloading(workload), workload))
    validate(reloading(workload), workload)
    for before, issue in itertools.pairwise(issues):
        if isinstance(issue.op, FreeWeights) and isinstance(before.op, Attend):
            project = Project(before.op.step, before.op.layer, before.op.batch)
            reached = reached_from(issues, issue.index)
            assert any(issues[n].op == project for n in reached)


@pytest.mark.parametrize(
    ("ops", "words", "missing"),
    [
        ([*ops_until(Project(1, 1, 0)), Project(1, 1, 0)], "came before", None),
        ([*ops_until(Attend(1, 1, 0)), Attend(1, 1, 0)], "came before", None),
        ([*ops_until(COMPUTED), Attend(1, 1, 0)], "is late", None),
        ([*ops_until(COMPUTED), Project(1, 1, 0)], "is late", None),
        ([*ops_until(Project(1, 1, 0)), COMPUTED], "has not come", Attend(1, 1, 0)),
        ([*ops_until(Attend(1, 1, 0)), LoadCache(1, 1, 0)], "is late: Attend", None),
        ([*ops_until(Project(1, 1, 0))[:-1], Attend(1, 1, 0)], "has not come", Project(1, 1, 0)),
        ([Project(0, 1, 0)], "step 0 computes whole prompts", None),
        ([Attend(0, 1, 0)], "step 0 computes whole prompts", None),
        ([Project(1, 0, 0)], "attends to no cache", None),
        ([Attend(1, 2, 0)], "attends to no cache", None),
        ([Project(1, 1, 2)], "batch must lie in 0..1", None),
        ([Project(1, 1, 0)], "weights are not held here", LoadWeights(1, 1)),
        ([LoadWeights(1, 1), Project(1, 1, 0)], "has not come", LoadHidden(1, 1, 0)),
    ],
)
def test_what_is_wrong_is_named(ops, words, missing):
    error = refused(ops)
    assert words in str(error)
    assert error.missing == missing
    assert error.op == ops[-1]


def test_attention_without_a_cache_loaded_names_the_load():
    ops = [op for op in ops_until(Attend(1, 1, 0)) if op != LoadCache(1, 1, 0)]
    assert refused(ops).missing == LoadCache(1, 1, 0)


@given(workloads(), schedules, st.lists(st.integers(0, 3), max_size=4))
def test_parts_are_cut_and_gone_on_with(workload, schedule, borders):
    whole = list(in_parts(schedule(workload), workload))
    done = []
    for border in [*borders, None]:
        answers = itertools.repeat(False) if border is None else iter([False] * border + [True])
        rest = list(remaining(in_parts(schedule(workload), workload), workload))
        validate(rest, workload)
        cut = Cut(rest, workload, partial(next, answers, False))
        done += [issue.op for issue in bind(cut, workload)]
        if cut.ended:
            break
        workload = dataclasses.replace(workload, done=cut.done)
    kinds = Project, Attend, Compute
    assert sorted(str(op) for op in done if isinstance(op, kinds)) == sorted(
        str(op) for op in whole if isinstance(op, kinds)
    )


def split(w, share=0.25):
    """``w`` where so much of the products comes before attention."""
    flops = tuple(share * n for n in w.sizes.matmul_flops)
    return dataclasses.replace(w, sizes=dataclasses.replace(w.sizes, query_flops=flops))


def test_the_parts_cost_what_the_whole_does():
    """But for two more overheads."""
    w = split(workload(hosted=True, sent=0.0, dense=5000))
    late = dataclasses.replace(MACHINE, overhead=0.5)
    costs = CostModel(w, late)
    parts = [
        dict(costs.pieces(Project(1, 1, 0), unpack=True)),
        dict(costs.pieces(Attend(1, 1, 0))),
        dict(costs.pieces(Compute(1, 1, 0), rest=True)),
    ]
    whole = dict(costs.pieces(Compute(1, 1, 0), unpack=True))
    assert parts[0]["device compute"] == pytest.approx(0.5 + 0.25 * 2 * 500 / 2e6 + 5e-3)
    assert parts[1] == {"host compute": pytest.approx(0.5 + 1000 / 1e7)}
    assert parts[2]["device compute"] == pytest.approx(0.5 + 0.75 * 2 * 500 / 2e6)
    assert sum(p.get("device compute", 0) for p in parts) == pytest.approx(
        whole["device compute"] + 0.5
    )


def test_attention_on_the_device_is_its_computes():
    """There the layer is one program: its parts are no work, and its Compute costs all."""
    w = split(workload(cache=Tier.DEVICE))
    costs = CostModel(w, MACHINE)
    assert costs.pieces(Project(1, 1, 0)) == costs.pieces(Attend(1, 1, 0)) == ()
    assert costs.pieces(Compute(1, 1, 0), rest=True) == costs.pieces(Compute(1, 1, 0))
    for schedule in SCHEDULES.values():
        ops = list(schedule(w))
        together = simulate(in_parts(ops, w), w, MACHINE).seconds
        assert together == pytest.approx(simulate(ops, w, MACHINE).seconds)


def test_a_batch_that_begins_anew_has_no_parts():
    base = split(workload(hosted=True, sent=0.0))
    batches = tuple(dataclasses.replace(b, begun=((1, 10),)) for b in base.sizes.batches)
    w = dataclasses.replace(base, sizes=dataclasses.replace(base.sizes, batches=batches))
    costs = CostModel(w, MACHINE)
    assert costs.pieces(Project(1, 1, 0)) == costs.pieces(Attend(1, 1, 0)) == ()
    assert costs.pieces(Compute(1, 1, 0), rest=True) == costs.pieces(Compute(1, 1, 0))


def test_one_memory_has_one_pair_of_hands():
    """Where the device is the host, attention does not run beside it for nothing."""
    w = split(workload(hosted=True, sent=0.0))
    one = dataclasses.replace(MACHINE, host_to_device=None)
    assert [name for name, _ in CostModel(w, one).pieces(Attend(1, 1, 0))] == ["device compute"]


@given(w=any_workloads(), schedule=schedules, hosted=st.booleans())
def test_in_order_the_parts_take_their_sum(w, schedule, hosted):
    cache = {
        place: dataclasses.replace(cell, hosted=hosted, sent=0.0 if hosted else 1.0)
        for place, cell in w.sizes.cache.items()
    }
    w = split(dataclasses.replace(w, sizes=dataclasses.replace(w.sizes, cache=cache)))
    ops = list(schedule(w))
    whole = simulate(serialize(ops), w, MACHINE).seconds
    parts = simulate(serialize(in_parts(ops, w)), w, MACHINE).seconds
    assert parts == pytest.approx(whole)


def ahead(w):
    """Of each pair of batches the second's query comes before the rest of the first."""
    for op in zigzag(w):
        if not (isinstance(op, (LoadHidden, LoadCache, Compute, StoreHidden, StoreCache))):
            yield op
            continue
        if not (op.step and w.has_cache(op.layer)):
            yield op
        elif isinstance(op, LoadHidden) and op.batch == 0:
            cells = [(op.step, op.layer, batch) for batch in range(2)]
            for cell in cells:
                yield LoadHidden(*cell)
                yield LoadCache(*cell)
                yield Project(*cell)
                yield Attend(*cell)
            for cell in cells:
                yield Compute(*cell)
                yield StoreHidden(*cell)
                if op.step + 1 < w.num_steps:
                    yield StoreCache(*cell)


def balanced():
    """Attention on the host takes as long as the device's products."""
    w = split(workload(layers=6, batches=2, steps=8, hosted=True, sent=0.0, weights=Tier.DEVICE))
    return w, dataclasses.replace(MACHINE, host_attention=1000 / 5e-4)


def test_attention_runs_beside_the_device():
    w, machine = balanced()
    validate(ahead(w), w)
    one, other = simulate(zigzag(w), w, machine), simulate(ahead(w), w, machine)
    assert other.seconds < 0.85 * one.seconds
    waits = other.waits(Stream.COMPUTE.value)
    assert waits["attention"] > 0
    found = {s.stream for s in other.spans if s.op == "Attend"}
    assert found == {Stream.ATTEND.value}
    both = busy(ahead, w, machine)
    assert both.streams["attend"] == pytest.approx(both.resources["host compute"])


def test_runs_in_parts_are_learned_from():
    w, machine = balanced()
    slower = dataclasses.replace(machine, host_attention=machine.host_attention / 2)
    measured = simulate(ahead(w), w, slower)
    rows = observations(list(ahead(w)), w, machine, measured)
    (row,) = [row for row in rows if row.op == "Attend"]
    assert row.measured_seconds == pytest.approx(2 * row.predicted_seconds, rel=0.01)
    assert set(row.terms) == {"host_attention", "overhead"}
