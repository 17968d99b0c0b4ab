"""Pipeline stages: layers dealt to them, who works when, and what it costs."""

import dataclasses
import itertools
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling import (
    SCHEDULES,
    Compute,
    CostModel,
    Link,
    LoadHidden,
    LoadWeights,
    StoreHidden,
    Tier,
    Workload,
    passes,
    row_by_row,
    simulate,
    zigzag,
)
from scheduling.peak import highest, peak_nbytes, room_nbytes
from scheduling.stages import balanced

from .strategies import workloads
from .test_simulate import MACHINE, staged, workload


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.data())
def test_the_costliest_stage_costs_as_little_as_can_be(costs, data):
    stages = data.draw(st.integers(1, len(costs)))

    def costliest(starts):
        return max(sum(costs[a:b]) for a, b in pairwise((*starts, len(costs))))

    found = balanced(costs, stages)
    assert found[0] == 0
    assert len(found) == stages
    every = itertools.combinations(range(1, len(costs)), stages - 1)
    assert costliest(found) == min(costliest((0, *rest)) for rest in every)


def test_equal_layers_are_dealt_evenly():
    assert balanced([1.0] * 8, 4) == (0, 2, 4, 6)
    assert balanced([0.0, *[1.0] * 12, 0.3], 4) == (0, 4, 7, 10)
    with pytest.raises(ValueError, match=r"num_stages must lie in 1\.\.3.*got 4"):
        balanced([1, 1, 1], 4)


def test_layers_have_stages():
    w = Workload(num_steps=1, num_layers=7, num_batches=5, stages=(0, 3, 5), num_groups=2)
    assert [w.stage_of(layer) for layer in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert [list(w.layers_of(stage)) for stage in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [layer for layer in range(7) if w.hands_over(layer)] == [2, 4, 6]
    assert [list(group) for group in w.groups()] == [[0, 2, 4], [1, 3]]
    for wrong in ((), (1, 2), (0, 2, 2), (0, 7), [0, 1.5]):
        with pytest.raises(ValueError, match="stages must be ascending layers from 0 to 6"):
            dataclasses.replace(w, stages=wrong)
    with pytest.raises(ValueError, match="hosts must be 3 numbers"):
        dataclasses.replace(w, hosts=(0, 1))


@given(workloads())
def test_a_clock_keeps_all_stages_busy(w):
    """No group is at two stages, and with groups enough none is idle but at both ends."""
    order = list(passes(w, w.num_steps))
    groups = w.groups()
    expected = itertools.product(range(w.num_steps), range(w.num_layers), groups)
    assert sorted(order, key=str) == sorted(expected, key=str)
    reached = dict.fromkeys(groups, -1)
    for turn, layer, group in order:
        assert turn * w.num_layers + layer == reached[group] + 1
        reached[group] += 1


def even(stages, batches, *, steps=3, layers=8, groups=None):
    """Every layer takes a second of each batch, and nothing else takes any."""
    w = workload(layers, batches, steps, weights=Tier.DEVICE, cache=Tier.DEVICE)
    each = tuple(
        dataclasses.replace(b, prompt_len=1, hidden_tier=Tier.DEVICE) for b in w.sizes.batches
    )
    flops = (1e6,) * layers
    sizes = dataclasses.replace(w.sizes, batches=each, matmul_flops=flops, cache={})
    w = dataclasses.replace(w, sizes=sizes, cached_layers=frozenset())
    starts = tuple(range(0, layers, layers // stages))
    return staged(w, starts, groups=groups or batches)


FREE = dataclasses.replace(MACHINE, matmul=((2, 2e6),), stage_to_stage=1e12)


@pytest.mark.parametrize(
    ("stages", "batches", "groups"), [(1, 4, 1), (2, 4, 4), (2, 4, 2), (4, 4, 4), (4, 2, 2)]
)
def test_a_pipeline_takes_what_its_clock_says(stages, batches, groups):
    w = even(stages, batches, groups=groups)
    tick = 8 / stages * batches / groups
    seconds = (2 * max(groups, stages) + groups + stages - 1) * tick
    # A stage may begin with what is there of a group, whose last layer is not all through.
    assert simulate(zigzag(w), w, FREE).seconds <= seconds * (1 + 1e-6)
    assert simulate(zigzag(w), w, FREE).seconds >= (seconds - stages * tick) * (1 - 1e-6)
    if batches == groups:
        assert simulate(zigzag(w), w, FREE).seconds == pytest.approx(seconds)


def test_bubbles_are_shown():
    w = even(4, 4)
    timeline = simulate(zigzag(w), w, FREE)
    assert timeline.num_stages == 4
    for stage, row in enumerate(timeline.stage_table()):
        assert row["busy"] == pytest.approx(12 / 15)
        assert row["bubble"] == pytest.approx(3 / 15)
        waits = timeline.waits("compute", stage)
        assert waits.get("bubble", 0.0) == pytest.approx(2 * stage)
    assert "stage 3: compute" in timeline.streams
    assert timeline.busy("stage 3: compute") == pytest.approx(24)
    alone = simulate(row_by_row(w), w, FREE)
    assert 3 * 4 * 8 > alone.seconds > 3 * 4 * 8 - 4 * 6  # nearly one stage at a time
    (one,) = simulate(zigzag(even(1, 4)), even(1, 4), FREE).stage_table()
    assert one["bubble"] == pytest.approx(0.0, abs=1e-9)


def test_what_is_handed_over():
    near = staged(workload(layers=6), (0, 2, 4))
    sizes = near.sizes
    hidden = 80
    on_device = dataclasses.replace(
        sizes,
        batches=tuple(dataclasses.replace(b, hidden_tier=Tier.DEVICE) for b in sizes.batches),
    )
    assert on_device.moved(StoreHidden(0, 1, 0)) == {Link.STAGE_TO_STAGE: hidden}
    assert on_device.moved(StoreHidden(0, 2, 0)) == {}
    assert on_device.moved(StoreHidden(0, 5, 0)) == {}  # tokens
    assert on_device.moved(LoadHidden(0, 2, 0)) == {}
    on_host = dataclasses.replace(
        sizes, batches=tuple(dataclasses.replace(b, hidden_tier=Tier.HOST) for b in sizes.batches)
    )
    assert on_host.moved(StoreHidden(0, 1, 0)) == {Link.DEVICE_TO_HOST: hidden}  # both reach it
    far = dataclasses.replace(on_host, borders={1: True, 3: True})
    assert far.moved(StoreHidden(0, 1, 0)) == {
        Link.DEVICE_TO_HOST: hidden,
        Link.STAGE_TO_STAGE: hidden,
    }
    w = dataclasses.replace(near, sizes=on_device)
    slow = dataclasses.replace(MACHINE, stage_to_stage=8.0)
    ((resource, seconds),) = CostModel(w, slow).pieces(StoreHidden(0, 1, 0))
    assert (resource, seconds) == ("stage to stage of stage 0", 10.0)
    ((_, seconds),) = CostModel(w, MACHINE).pieces(StoreHidden(0, 1, 0))
    assert seconds == hidden / 1e7  # as fast as to the device


def test_a_disk_is_shared_by_the_stages_of_a_host():
    w = staged(workload(layers=6), (0, 3))
    names = {CostModel(w, MACHINE).pieces(LoadWeights(0, layer))[0][0] for layer in range(6)}
    assert names == {"disk to host"}
    far = staged(workload(layers=6), (0, 3), hosts=(0, 1))
    names = {CostModel(far, MACHINE).pieces(LoadWeights(0, layer))[0][0] for layer in range(6)}
    assert names == {"disk to host of host 0", "disk to host of host 1"}
    computed = {CostModel(w, MACHINE).pieces(Compute(1, i, 0))[0][0] for i in range(6)}
    assert computed == {"device compute of stage 0", "device compute of stage 1"}
    slow = dataclasses.replace(MACHINE, disk_to_host=1e4, host_to_device=None)
    assert simulate(zigzag(far), far, slow).seconds < 0.75 * simulate(zigzag(w), w, slow).seconds


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_fullest_device_counts(shared, name):
    w = workload(layers=6, batches=3, weights=Tier.DEVICE, cache=Tier.DEVICE)
    one = highest(peak_nbytes(SCHEDULES[name](w), w, shared=shared))
    split = staged(w, (0, 3), groups=2)
    two = highest(peak_nbytes(SCHEDULES[name](split), split, shared=shared))
    if shared:  # the devices are one memory; a hidden state is at one of them
        assert two[Tier.DEVICE] >= one[Tier.DEVICE]
        assert two[Tier.DEVICE] <= one[Tier.DEVICE] + 2 * 8 * 12 * 3
    else:
        assert one[Tier.DEVICE] / 2 < two[Tier.DEVICE] < one[Tier.DEVICE]
    room = room_nbytes(split, shared=shared)
    assert all(two[tier] <= room[tier] for tier in Tier)
    hosts = room_nbytes(staged(w, (0, 3), groups=2, hosts=(0, 1)), shared=True)
    assert hosts[Tier.DEVICE] < room_nbytes(split, shared=True)[Tier.DEVICE]
