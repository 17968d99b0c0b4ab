"""The schedules that compute layers in parts: their orders, and what they gain on paper."""

from __future__ import annotations

import dataclasses
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling import (
    SCHEDULES,
    Attend,
    Compute,
    FreeWeights,
    LoadHidden,
    LoadWeights,
    Project,
    Stream,
    Tier,
    Workload,
    cgopipe,
    neo,
    simulate,
    validate,
    zigzag,
)
from scheduling.registered import goes_by_shape
from tests.scheduling.strategies import workloads
from tests.scheduling.test_parts import split
from tests.scheduling.test_simulate import MACHINE, workload

W = Workload(num_steps=2, num_layers=4, num_batches=5, hidden_slots=3, cache_slots=3)


def parts(schedule, w, layers=None):
    """What is computed in step 1 of layers with a cache, in the order of the schedule."""
    short = {Project: "P", Attend: "A", Compute: "C"}
    return " ".join(
        f"{short[type(op)]}{op.batch}"
        for op in schedule(w)
        if type(op) in short and op.step == 1 and op.layer in (layers or range(1, w.num_layers - 1))
    )


def test_queries_of_two_batches_come_before_the_rest_of_one():
    assert parts(cgopipe, W, [1]) == "P0 A0 P1 A1 P2 A2 C0 P3 A3 C1 P4 A4 C2 C3 C4"


@pytest.mark.parametrize(
    ("slots", "order"), [(2, "P0 A0 P1 A1 C0 P2 A2 C1 C2"), (1, "P0 A0 C0 P1 A1 C1 P2 A2 C2")]
)
def test_as_far_as_slots_allow(slots, order):
    w = dataclasses.replace(W, num_batches=3, hidden_slots=slots)
    assert parts(cgopipe, w, [1]) == order
    validate(cgopipe(w), w)


def test_with_a_third_slot_for_weights_also_across_layers():
    w = dataclasses.replace(W, num_batches=3, weight_slots=3)
    assert parts(cgopipe, w) == "P0 A0 P1 A1 P2 A2 C0 P0 A0 C1 P1 A1 C2 P2 A2 C0 C1 C2"
    ops = list(cgopipe(w))
    assert ops.index(FreeWeights(1), ops.index(LoadWeights(1, 1))) > ops.index(Project(1, 2, 1))
    for few in (dataclasses.replace(w, weight_slots=2), dataclasses.replace(w, stages=(0, 2))):
        assert parts(cgopipe, few).endswith("C0 C1 C2")
        ops = list(cgopipe(few))
        assert ops.index(Compute(1, 1, 2)) < ops.index(LoadHidden(1, 2, 0))


def test_layers_in_codes_are_not_unpacked_twice():
    w = dataclasses.replace(hosted(workload(layers=5, dense=100)), weight_slots=3, hidden_slots=3)
    ops = list(cgopipe(w))
    assert ops.index(Compute(1, 1, 1)) < ops.index(Project(1, 2, 0))


def test_one_attends_on_the_host_while_the_other_is_computed_whole():
    w = dataclasses.replace(W, num_batches=4)
    assert parts(neo, w, [1]) == "P0 A0 C1 P2 A2 C0 C3 C2"


def hosted(w, *, share=1.0):
    """``w`` with the cache of some batches on the host, which attends; the others on the device."""
    limit = share * w.num_batches
    cache = {
        (layer, batch): dataclasses.replace(
            cell,
            tier=Tier.HOST if batch < limit else Tier.DEVICE,
            hosted=batch < limit,
            sent=0.0 if batch < limit else 1.0,
        )
        for (layer, batch), cell in w.sizes.cache.items()
    }
    return split(dataclasses.replace(w, sizes=dataclasses.replace(w.sizes, cache=cache)))


def test_where_it_is_known_who_attends_on_the_host_it_is_theirs():
    """Three of four: the first of them go with the one that the device attends for."""
    w = hosted(workload(layers=4, batches=4, steps=2), share=0.75)
    assert parts(neo, w, [1]) == "P0 A0 C3 P1 A1 C0 P2 A2 C1 C2"


def decoding(batches, *, slots=3, share=1.0):
    """Where decoding is nearly all, and weights are on the device."""
    w = workload(layers=8, batches=batches, steps=12, slots=slots, weights=Tier.DEVICE)
    device = tuple(dataclasses.replace(batch, hidden_tier=Tier.DEVICE) for batch in w.sizes.batches)
    return hosted(
        dataclasses.replace(w, sizes=dataclasses.replace(w.sizes, batches=device)), share=share
    )


def attending(seconds, **more):
    """A machine on which the host attends to a cell for about so many of the 0.5 ms that the
    device computes."""
    return dataclasses.replace(MACHINE, host_attention=1600 / (5e-4 * seconds), **more)


@pytest.mark.parametrize(
    ("batches", "slots", "gain"), [(2, 3, 1.5), (4, 3, 1.5), (8, 3, 1.5), (8, 2, 1.4)]
)
def test_much_less_time_where_host_and_device_have_as_much_to_do(batches, slots, gain):
    w, machine = decoding(batches, slots=slots), attending(1.0)
    before, after = simulate(zigzag(w), w, machine), simulate(cgopipe(w), w, machine)
    assert before.seconds > gain * after.seconds
    assert after.busy(Stream.ATTEND.value) > 0.4 * after.seconds


def test_two_kinds_of_batches_share_the_work():
    """Half of the batches attend on the host, for as long as the others take on the device."""
    w, machine = decoding(4, share=0.5), attending(1.5)
    before, after = simulate(zigzag(w), w, machine), simulate(neo(w), w, machine)
    assert before.seconds > 1.4 * after.seconds


@given(
    batches=st.integers(1, 6),
    slots=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    host=st.sampled_from([0.01, 0.3, 1.0, 3.0, 30.0]),
    link=st.sampled_from([1e5, 1e6, 1e7, 1e8]),
    weights=st.sampled_from(list(Tier)),
    schedule=st.sampled_from([cgopipe, neo]),
)
@settings(max_examples=60)
def test_hardly_ever_slower_than_zigzag(batches, slots, share, host, link, weights, schedule):
    w = hosted(
        workload(layers=8, batches=batches, steps=6, slots=slots, weights=weights), share=share
    )
    machine = attending(host, host_to_device=link)
    before, after = simulate(zigzag(w), w, machine), simulate(schedule(w), w, machine)
    if schedule is cgopipe and not share:  # nothing to put off
        assert after.seconds == before.seconds
    # Batches that wait hold slots, which a link that limits all would have used to load ahead.
    assert after.seconds <= (1.1 if link < 1e6 else 1.02) * before.seconds


@pytest.mark.parametrize(
    "name", ["zigzag", "row_by_row", "lock_step", "diagonal", "cgopipe", "neo"]
)
def test_it_is_known_whose_order_depends_on_sizes(name):
    w = hosted(workload(layers=4, batches=4, steps=3, slots=3), share=0.25)
    of_shape = list(SCHEDULES[name](dataclasses.replace(w, sizes=None)))
    assert goes_by_shape(SCHEDULES[name]) == (list(SCHEDULES[name](w)) == of_shape)


def test_a_batch_that_the_device_attends_for_is_not_put_off():
    w = hosted(workload(layers=4, batches=4, steps=2, slots=3), share=0.25)
    assert parts(cgopipe, w, [1]) == "P0 A0 C1 C2 C3 C0"


@given(workloads())
def test_they_hold_nothing_back(w):
    endless = dataclasses.replace(w, num_steps=10**9)
    for schedule in (cgopipe, neo):
        assert len(list(islice(schedule(endless), 10))) == 10
