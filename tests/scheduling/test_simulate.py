"""Costs and the simulator: figures by hand, and properties of any schedule."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling import (
    SCHEDULES,
    Compute,
    CostModel,
    Hardware,
    Link,
    LoadCache,
    LoadHidden,
    LoadWeights,
    Sizes,
    StoreCache,
    StoreHidden,
    Tier,
    Workload,
    bind,
    serialize,
    simulate,
    zigzag,
)
from scheduling.cost_model import bound
from scheduling.in_order import InOrder
from scheduling.peak import highest, peak_nbytes
from scheduling.sizes import BatchSizes, CacheCell

MACHINE = Hardware(
    name="round figures",
    device_memory=1e9,
    host_memory=1e9,
    disk=1e9,
    disk_to_host=1e6,
    host_to_device=1e7,
    device_to_host_cache=1e6,
    device_to_host_hidden=2e6,
    host_to_disk_cache=5e5,
    host_to_disk_hidden=1e6,
    matmul=((1, 1e6), (100, 1e8)),
    attention=1e9,
    cached_attention=1e8,
    host_attention=1e7,
    dequantize=1e6,
)


def sizes(layers=4, batches=2, *, steps=3, weights=Tier.DISK, cache=Tier.HOST, dense=0, **cell):
    tiers = [Tier.DISK, Tier.HOST, Tier.DEVICE]
    hidden = tiers[(batches + layers) % 3]
    return Sizes(
        weights=tuple({weights: 1000 * (i + 1)} for i in range(layers)),
        dense=(dense,) * layers,
        batches=tuple(
            BatchSizes(
                rows=2,
                prompt_len=10 + i,
                capacity=10 + i + steps - 1,
                num_steps=steps,
                hidden_tier=hidden,
                hidden_nbytes=8,
            )
            for i in range(batches)
        ),
        cache={
            (layer, batch): CacheCell(tier=cache, position_nbytes=100, **cell)
            for layer in range(1, layers - 1)
            for batch in range(batches)
        },
        resident=({weights: sum(1000 * (i + 1) for i in range(layers))},),
        matmul_flops=(0.0, *[500.0] * (layers - 1)),
        hidden_size=16,
        chunk_positions=4,
    )


def workload(layers=4, batches=2, steps=3, slots=2, **more):
    return Workload(
        num_steps=steps,
        num_layers=layers,
        num_batches=batches,
        weight_slots=slots,
        cache_slots=slots,
        hidden_slots=slots,
        sizes=sizes(layers, batches, steps=steps, **more),
    )


def staged(w, stages, *, groups=1, hosts=()):
    """``w`` over several stages."""
    split = dataclasses.replace(w, stages=stages, num_groups=groups, hosts=hosts)
    resident = [dict.fromkeys(Tier, 0) for _ in stages]
    for layer, by_tier in enumerate(w.sizes.weights):
        for tier, nbytes in by_tier.items():
            resident[split.stage_of(layer)][tier] += nbytes
    borders = {first - 1: split.several_hosts for first in stages[1:]}
    more = dataclasses.replace(w.sizes, resident=tuple(resident), borders=borders)
    return dataclasses.replace(split, sizes=more)


def test_bytes_by_link():
    disk = sizes(cache=Tier.DISK)
    assert disk.moved(LoadWeights(0, 2)) == {Link.DISK_TO_HOST: 3000, Link.HOST_TO_DEVICE: 3000}
    host = sizes(weights=Tier.HOST)
    assert host.moved(LoadWeights(0, 2)) == {Link.HOST_TO_DEVICE: 3000}
    # 10 positions of prompt: two chunks of four are written, the others wait in host memory
    stored = {Link.DEVICE_TO_HOST: 1000, Link.HOST_TO_DISK: 800}
    assert disk.moved(StoreCache(0, 1, 0)) == stored
    assert disk.moved(LoadCache(1, 1, 0)) == {Link.DISK_TO_HOST: 800, Link.HOST_TO_DEVICE: 1000}
    assert disk.moved(StoreCache(1, 1, 0)) == {Link.DEVICE_TO_HOST: 100}
    assert disk.moved(StoreCache(1, 1, 1)) == {Link.DEVICE_TO_HOST: 100, Link.HOST_TO_DISK: 400}
    assert disk.moved(StoreCache(2, 1, 0)) == {}  # nobody reads it
    hosted = sizes(cache=Tier.HOST, sent=0.0)
    assert hosted.moved(LoadCache(1, 1, 0)) == {}
    assert sizes(cache=Tier.DEVICE).moved(LoadCache(1, 1, 0)) == {}
    assert host.moved(LoadHidden(0, 0, 0)) == {}  # tokens
    assert host.moved(StoreHidden(0, 3, 0)) == {}


def test_seconds_by_hand():
    costs = CostModel(workload(cache=Tier.DISK, dense=5000), MACHINE)
    assert costs.pieces(LoadWeights(0, 2)) == (("disk to host", 3e-3), ("host to device", 3e-4))
    ((name, plain),) = costs.pieces(Compute(1, 1, 0))
    # 2 rows at 1 MFLOP/s each, and 10 positions of 100 bytes
    assert name == "device compute"
    assert plain == pytest.approx(2 * 500 / 2e6 + 1000 / 1e8)
    ((_, first),) = costs.pieces(Compute(1, 1, 0), unpack=True)
    assert first - plain == pytest.approx(5e-3)
    ((_, prefill),) = costs.pieces(Compute(0, 1, 0))
    assert prefill == pytest.approx(20 * 500 / 2e7 + 4 * 2 * 100 * 16 / 1e9)
    hosted = CostModel(workload(hosted=True, sent=0.0), MACHINE)
    pieces = dict(hosted.pieces(Compute(1, 1, 0)))
    assert pieces["host compute"] == pytest.approx(1000 / 1e7)
    assert pieces["device compute"] == pytest.approx(5e-4)
    shared = dataclasses.replace(MACHINE, host_to_device=None)
    assert len(CostModel(workload(), shared).pieces(LoadWeights(0, 2))) == 1
    with pytest.raises(ValueError, match="no sizes"):
        CostModel(Workload(num_steps=1, num_layers=1, num_batches=1), MACHINE)


def test_two_streams_share_one_disk():
    """Each alone takes a second; together two, not one."""
    layers = 3
    base = sizes(layers, 1, cache=Tier.DEVICE)
    w = Workload(num_steps=1, num_layers=layers, num_batches=1, sizes=base)
    slow = dataclasses.replace(MACHINE, disk_to_host=1e3, host_to_device=None)
    alone = simulate(zigzag(w), w, slow)
    loads = [s for s in alone.spans if s.op == "LoadWeights"]
    assert [round(s.seconds, 2) for s in loads] == [1, 2, 3]
    both = dataclasses.replace(
        w,
        sizes=dataclasses.replace(
            base,
            batches=(
                dataclasses.replace(base.batches[0], hidden_tier=Tier.DISK, hidden_nbytes=100),
            ),
        ),
    )
    timeline = simulate(zigzag(both), both, dataclasses.replace(slow, host_to_disk_hidden=1e9))
    hidden = [s for s in timeline.spans if s.op == "LoadHidden"]
    assert hidden[0].seconds == pytest.approx(2.0, rel=0.01)  # 1 s of reading beside a load


WORKLOADS = st.builds(
    workload,
    layers=st.integers(2, 5),
    batches=st.integers(1, 3),
    steps=st.integers(1, 3),
    slots=st.integers(2, 4),
    weights=st.sampled_from(list(Tier)),
    cache=st.sampled_from(list(Tier)),
    dense=st.sampled_from([0, 2000]),
)
STAGES = [(0,), (0, 1), (0, 2), (0, 1, 2)]


@st.composite
def any_workloads(draw):
    w = draw(WORKLOADS)
    stages = draw(st.sampled_from([s for s in STAGES if s[-1] < w.num_layers]))
    hosts = draw(st.sampled_from([(), tuple(range(len(stages)))]))
    return staged(w, stages, groups=draw(st.integers(1, 3)), hosts=hosts)


MACHINES = st.builds(
    dataclasses.replace,
    st.just(MACHINE),
    disk_to_host=st.sampled_from([1e4, 1e6, 1e8]),
    host_to_device=st.sampled_from([None, 1e5, 1e8]),
    cached_attention=st.sampled_from([1e5, 1e9]),
)
NAMES = st.sampled_from(sorted(SCHEDULES))


@given(w=any_workloads(), machine=MACHINES, name=NAMES)
def test_between_the_bound_and_one_after_the_other(w, machine, name):
    ops = list(SCHEDULES[name](w))
    timeline = simulate(ops, w, machine)
    _, least = bound(CostModel(w, machine).lower_bound())
    alone = InOrder(CostModel(w, machine))
    total = sum(seconds for op in ops for _, seconds in alone.pieces(op))
    assert least <= timeline.seconds * (1 + 1e-9)
    assert timeline.seconds <= total * (1 + 1e-9)
    serial = simulate(list(serialize(ops)), w, machine)
    assert serial.seconds == pytest.approx(total)


@given(w=any_workloads(), machine=MACHINES, name=NAMES)
def test_streams_are_in_order_and_needs_are_kept(w, machine, name):
    timeline = simulate(SCHEDULES[name](w), w, machine)
    spans = {(s.op, s.step, s.layer, s.batch): s for s in timeline.spans}
    issues = list(bind(SCHEDULES[name](w), w))
    ends = {}
    for issue in issues:
        op = issue.op
        key = (type(op).__name__, *(getattr(op, f, None) for f in ("step", "layer", "batch")))
        if isinstance(op, LoadWeights) and (name != "lock_step"):
            continue  # issued again for the same step
        span = spans.get(key)
        if span is None:
            continue
        assert (span.stage, span.stream) == (issue.stage, issue.stream.value)
        assert span.start >= ends.get(issue.lane, 0.0) - 1e-9
        ends[issue.lane] = span.end
        for need in issue.needs:
            before = issues[need].op
            other = spans.get(
                (
                    type(before).__name__,
                    *(getattr(before, f, None) for f in ("step", "layer", "batch")),
                )
            )
            if other is not None and not isinstance(before, LoadWeights):
                assert span.start >= other.end - 1e-9


@given(w=WORKLOADS, machine=MACHINES)
@settings(max_examples=30)
def test_a_faster_link_is_never_slower_for_one_batch(w, machine):
    """With several streams on a link, in-order queues may in theory trade places; hardly."""
    before = simulate(zigzag(w), w, machine).seconds
    faster = dataclasses.replace(machine, disk_to_host=10 * machine.disk_to_host)
    assert simulate(zigzag(w), w, faster).seconds <= before * 1.02 + 1e-9
    more = dataclasses.replace(w, weight_slots=w.weight_slots + 1)
    assert simulate(zigzag(more), more, machine).seconds <= before * 1.02 + 1e-9


def test_hardware_goes_to_json_and_back(tmp_path):
    for name in ("a5000", "t4", "laptop", "h200"):
        hardware = Hardware.preset(name)
        again = Hardware.from_json(json.loads(json.dumps(hardware.to_json())))
        assert again == hardware
    file = tmp_path / "h.json"
    file.write_text(json.dumps(MACHINE.to_json()))
    assert Hardware.load(str(file)) == MACHINE
    assert Hardware.load("t4") == Hardware.preset("t4")
    with pytest.raises(ValueError, match="no hardware 'abacus'; presets: a5000, h200, laptop, t4"):
        Hardware.preset("abacus")
    with pytest.raises(ValueError, match="neither a preset"):
        Hardware.load(str(tmp_path / "none.json"))
    file.write_text("{")
    with pytest.raises(ValueError, match="is not a hardware file"):
        Hardware.load(str(file))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"disk_to_host": 0}, "disk_to_host must be a positive number"),
        ({"disk_to_host": None}, "disk_to_host must be a positive number"),
        ({"matmul": ()}, "by rising rows"),
        ({"matmul": ((2, 1e9), (1, 1e9))}, "by rising rows"),
        ({"overhead": -1}, "overhead must be"),
    ],
)
def test_hardware_is_checked(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(MACHINE, **change)
    with pytest.raises(ValueError, match="unknown gpu, missing disk"):
        Hardware.from_json(
            {**{k: v for k, v in MACHINE.to_json().items() if k != "disk"}, "gpu": 1}
        )


def test_the_rate_of_products():
    assert MACHINE.matmul_rate(0.5) == pytest.approx(5e5)
    assert MACHINE.matmul_rate(10) == pytest.approx(1e7)
    assert MACHINE.matmul_rate(1000) == 1e8


def test_peak_bytes():
    w = workload()
    phases = peak_nbytes(zigzag(w), w, shared=False)
    peak = highest(phases)
    assert peak[Tier.DISK] >= 10_000
    assert peak[Tier.HOST] >= 100 * (12 + 13) * 2
    # two slots of the largest layers, two of the largest cells
    assert peak[Tier.DEVICE] >= 7000 + 2 * 100 * 13
    # hidden states are those of whole prompts in prefill, of one token after it
    where = w.sizes.batches[0].hidden_tier
    assert phases["prefill"][where] == phases["decode"][where] + 8 * 9


def test_waits_have_reasons():
    """The disk is slow: computing waits for weights, and loading for a slot."""
    w = workload(layers=5, batches=2, cache=Tier.DEVICE)
    slow = dataclasses.replace(MACHINE, disk_to_host=1e4, host_to_device=None)
    timeline = simulate(zigzag(w), w, slow)
    waits = timeline.waits("compute")
    assert next(iter(waits)) == "weights"
    busy = timeline.busy("compute")
    assert sum(waits.values()) + busy == pytest.approx(timeline.seconds, rel=0.01)
    hurried = dataclasses.replace(MACHINE, disk_to_host=1e9, cached_attention=1e4)
    waits = simulate(zigzag(w), w, hurried).waits("load weights")
    assert next(iter(waits)) == "slot"
    serial = simulate(serialize(zigzag(w)), w, MACHINE)
    assert set(serial.waits("load weights")) == {"barrier"}


def test_latency_counts_per_access():
    base = workload()
    w = dataclasses.replace(base, sizes=dataclasses.replace(base.sizes, reads=(0, 3, 2, 1)))
    late = dataclasses.replace(MACHINE, disk_read_latency=0.5, disk_write_latency=0.25)
    took = dict(CostModel(w, late).pieces(LoadWeights(0, 1)))["disk to host"]
    assert took == pytest.approx(1.5 + 2000 / 1e6)
    cells = workload(cache=Tier.DISK)
    stored = dict(CostModel(cells, late).pieces(StoreCache(0, 1, 0)))["host to disk"]
    assert stored == pytest.approx(0.25 + 800 / 5e5)
    slower = dataclasses.replace(late, disk_to_host_cache=1e3)
    loaded = dict(CostModel(cells, slower).pieces(LoadCache(1, 1, 0)))["disk to host"]
    assert loaded == pytest.approx(0.5 + 800 / 1e3)
