"""The schedules that come with the package, and their transforms."""

import dataclasses
import itertools
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scheduling import (
    SCHEDULES,
    Barrier,
    Compute,
    Cut,
    LoadWeights,
    ScheduleError,
    StoreCache,
    Stream,
    Workload,
    bind,
    cgopipe,
    diagonal,
    first_n,
    format_schedule,
    lock_step,
    neo,
    parse_schedule,
    remaining,
    row_by_row,
    serialize,
    serialized,
    validate,
    zigzag,
)

from .strategies import reached_from, schedules, workloads

GOLDENS = Path(__file__).parent / "goldens"
TWO = Workload(num_steps=2, num_layers=3, num_batches=2)
ONE = Workload(num_steps=2, num_layers=3, num_batches=1)


@pytest.mark.parametrize(
    ("golden", "schedule", "workload"),
    [
        ("zigzag", zigzag, TWO),
        ("row_by_row", row_by_row, TWO),
        ("lock_step", lock_step, TWO),
        ("diagonal", diagonal, TWO),
        ("cgopipe", cgopipe, TWO),
        ("neo", neo, TWO),
        ("lock_step_one_batch", lock_step, ONE),
        ("zigzag_serialized", serialized(zigzag), ONE),
    ],
)
def test_goldens(golden, schedule, workload):
    text = (GOLDENS / f"{golden}.txt").read_text(encoding="utf-8")
    assert format_schedule(schedule(workload)) == text.partition("\n")[2]
    assert parse_schedule(text) == list(schedule(workload))


@given(workloads(), schedules)
def test_every_schedule_is_valid_on_any_workload(workload, schedule):
    validate(schedule(workload), workload)


@given(workloads())
def test_one_slot_is_enough_for_those_that_do_not_load_ahead(workload):
    single = Workload(
        num_steps=workload.num_steps,
        num_layers=workload.num_layers,
        num_batches=workload.num_batches,
        weight_slots=1,
    )
    validate(zigzag(single), single)
    validate(row_by_row(single), single)
    validate(diagonal(single), single)
    with pytest.raises(ScheduleError, match="weight_slots of at least 2, and this workload has 1"):
        list(lock_step(single))


@given(workloads())
def test_how_often_weights_are_loaded(workload):
    def loads(schedule):
        return sum(isinstance(op, LoadWeights) for op in schedule(workload))

    passes = workload.num_steps * workload.num_layers
    assert loads(lock_step) == passes
    assert loads(zigzag) == passes * len(workload.groups())
    assert loads(row_by_row) == passes * workload.num_batches


def most_held(schedule, workload, prompt_len):
    """Positions of the fullest moment, over the batches that are not through."""
    held, most = {}, 0
    for op in schedule(workload):
        if isinstance(op, Compute) and op.layer == 1:
            held[op.batch] = prompt_len + op.step
            most = max(most, sum(held.values()))
            if op.step == workload.num_steps - 1:
                del held[op.batch]
    return most


def test_diagonal_batches_share_passes_and_hold_less():
    """As the paper has it: zig-zag holds s + n of each batch, diagonal (2s + n)(n - 1)/2n."""
    steps, batches, prompt_len = 24, 8, 10
    w = Workload(num_steps=steps, num_layers=3, num_batches=batches)
    passes = sum(isinstance(op, LoadWeights) for op in diagonal(w)) // 3
    assert passes == (batches - 1) * (steps // batches) + steps
    # the first batch of the last step: the others are still a position behind
    assert most_held(zigzag, w, prompt_len) == batches * (prompt_len + steps - 2) + 1
    formula = batches * (2 * prompt_len + steps) * (steps - 1) / (2 * steps)
    assert most_held(diagonal, w, prompt_len) == pytest.approx(formula, rel=0.15)
    many = Workload(num_steps=4, num_layers=3, num_batches=12)
    assert most_held(diagonal, many, 10) <= sum(10 + step for step in range(4))


@given(workloads())
def test_a_cache_that_nothing_reads_again_may_be_stored_or_not(workload):
    last = workload.num_steps - 1

    def storing(w):
        for op in zigzag(w):
            yield op
            if isinstance(op, Compute) and op.step == last and w.has_cache(op.layer):
                yield StoreCache(op.step, op.layer, op.batch)

    assert not any(isinstance(op, StoreCache) and op.step == last for op in zigzag(workload))
    validate(storing(workload), workload)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_are_generators_that_hold_nothing_back(name):
    endless = Workload(num_steps=10**12, num_layers=98, num_batches=8)
    assert len(list(islice(SCHEDULES[name](endless), 10))) == 10


@pytest.mark.parametrize("batches", [1, 3])
def test_lock_step_is_one_load_ahead_and_ends_each_batch_with_a_barrier(batches):
    workload = Workload(num_steps=3, num_layers=5, num_batches=batches)
    groups, group = [], []
    for op in lock_step(workload):
        if op == Barrier():
            groups.append(group)
            group = []
        else:
            group.append(op)
    assert group == []
    assert len(groups) == 3 * 5 * batches
    for group in groups:
        (computed,) = (op for op in group if isinstance(op, Compute))
        loads = [op for op in group if isinstance(op, LoadWeights) and op != LoadWeights(0, 0)]
        following = divmod(computed.step * 5 + computed.layer + 1, 5)
        ahead = computed.batch == 0 and following < (3, 0)
        assert loads == ([LoadWeights(*following)] if ahead else [])


def test_the_table_cannot_be_changed():
    ours = {"zigzag", "row_by_row", "lock_step", "diagonal", "cgopipe", "neo"}
    assert set(SCHEDULES) == ours
    with pytest.raises(TypeError):
        SCHEDULES["mine"] = zigzag


@given(workloads(), schedules)
def test_serialize_chains_everything(workload, schedule):
    """Each op waits, through barriers, for the one of its stage before it."""
    whole = list(bind(serialize(schedule(workload)), workload))
    for before, issue in pairwise(whole):
        if issue.op == Barrier() or before.op == Barrier():
            assert before.index in issue.needs
    serial = list(bind(serialize(schedule(workload), workload), workload))
    for stage in range(workload.num_stages):
        work = [i for i in serial if not isinstance(i.op, Barrier)]
        own = [i for i in work if workload.stage_of(i.op.layer) == stage]
        for before, issue in pairwise(own):
            assert before.index in reached_from(serial, issue.index)


def test_serialized_keeps_the_name_and_transforms_are_lazy():
    assert serialized(zigzag).__name__ == "zigzag"
    endless = Workload(num_steps=10**12, num_layers=3, num_batches=1)
    assert list(first_n(serialized(zigzag)(endless), 4)) == [
        LoadWeights(0, 0),
        Barrier(),
        next(islice(zigzag(endless), 1, None)),
        Barrier(),
    ]
    assert list(first_n(zigzag(endless), 0)) == []
    assert next(iter(bind(serialize(zigzag(endless)), endless))).stream is Stream.LOAD_WEIGHTS


@example(
    Workload(num_steps=3, num_layers=2, num_batches=1, cached_layers=frozenset([0]), store_slots=1),
    SCHEDULES["lock_step"],
    [1],
)
@given(workloads(), schedules, st.lists(st.integers(0, 3), max_size=5))
def test_a_schedule_can_be_cut_at_step_borders_and_gone_on_with(workload, schedule, borders):
    """Cut again and again: each rest is valid by itself, and nothing is computed twice or never."""
    computed = []
    for border in [*borders, None]:
        validate(remaining(schedule(workload), workload), workload)
        answers = itertools.repeat(False) if border is None else iter([False] * border + [True])
        cut = Cut(remaining(schedule(workload), workload), workload, partial(next, answers))
        part = [issue.op for issue in bind(cut, workload)]
        computed += [op for op in part if isinstance(op, Compute)]
        assert cut.done == tuple(
            sum(op.batch == b and op.layer == workload.num_layers - 1 for op in computed)
            for b in range(workload.num_batches)
        )
        if cut.ended:
            break
        workload = dataclasses.replace(workload, done=cut.done)
    assert cut.ended
    whole = [
        op for op in schedule(dataclasses.replace(workload, done=())) if isinstance(op, Compute)
    ]
    assert sorted(computed, key=str) == sorted(whole, key=str)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_has_step_borders(name):
    count = 0

    def due():
        nonlocal count
        count += 1
        return False

    workload = Workload(num_steps=4, num_layers=4, num_batches=2)
    assert list(Cut(SCHEDULES[name](workload), workload, due)) == list(SCHEDULES[name](workload))
    assert count >= 3


def test_what_is_done_loads_no_weights():
    workload = Workload(num_steps=3, num_layers=3, num_batches=2, done=(2, 3))
    ops = list(remaining(zigzag(workload), workload))
    assert [op for op in ops if isinstance(op, LoadWeights)] == [
        LoadWeights(2, i) for i in range(3)
    ]
    assert [op for op in ops if isinstance(op, Compute)] == [Compute(2, i, 0) for i in range(3)]
    with pytest.raises(ValueError, match=r"done must have 2 numbers in 0\.\.3"):
        dataclasses.replace(workload, done=(4, 0))
