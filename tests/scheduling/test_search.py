"""The policy search on a model of a few numbers, against trying everything."""

import dataclasses
import gc
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling import SCHEDULES, Hardware, Policy, Split, Tier, Workload, simulate
from scheduling.advice import advice
from scheduling.estimate import busiest, estimate, lanes, shortened
from scheduling.limits import Limits
from scheduling.peak import highest, peak_nbytes, room_nbytes
from scheduling.placement import place
from scheduling.remembered import Remembered
from scheduling.search import NothingFitsError, search
from scheduling.sizes import BatchSizes, CacheCell, Sizes

from .test_simulate import MACHINE

LAYERS, STEPS, PROMPT = 8, 6, 8
ZIGZAG = SCHEDULES["zigzag"]


def workload(policy, steps=STEPS):
    """Layers of two tensors of 1 kB, 10 bytes of cache a position and row, 2 of hidden states."""
    rows, batches = policy.device_batch_size, policy.num_device_batches
    bits = (policy.weight_bits or 16) / 16
    tensors = place([round(1000 * bits)] * (2 * LAYERS), policy.weights)
    weights = [
        {tier: tensors[2 * i : 2 * i + 2].count(tier) * round(1000 * bits) for tier in Tier}
        for i in range(LAYERS)
    ]
    per_cell = 10 * rows
    capacity = PROMPT + steps - 1
    cells = [(layer, batch) for layer in range(1, LAYERS - 1) for batch in range(batches)]
    tiers = place([per_cell * capacity] * len(cells), policy.cache)
    hidden = place([2 * rows * PROMPT] * batches, policy.hidden)
    sizes = Sizes(
        weights=tuple(weights),
        dense=(2000 if policy.weight_bits else 0,) * LAYERS,
        batches=tuple(
            BatchSizes(
                rows=rows,
                prompt_len=PROMPT,
                capacity=capacity,
                num_steps=steps,
                hidden_tier=tier,
                hidden_nbytes=2 * rows,
                workspace=10 * rows,
            )
            for tier in hidden
        ),
        cache={
            cell: CacheCell(
                tier=tier,
                position_nbytes=per_cell,
                hosted=policy.host_attention and tier is not Tier.DEVICE,
                sent=0.0 if policy.host_attention else 1.0,
            )
            for cell, tier in zip(cells, tiers, strict=True)
        },
        resident=({t: sum(w[t] for w in weights) for t in Tier},),
        matmul_flops=(0.0, *[500.0] * (LAYERS - 1)),
        hidden_size=16,
        chunk_positions=4,
    )
    return Workload(num_steps=steps, num_layers=LAYERS, num_batches=batches, sizes=sizes)


def blocks(policy):
    return [(workload(policy), 1 / policy.block_size)]


def seconds(policy, hardware=MACHINE):
    """Of a request, simulated in full."""
    w = workload(policy)
    return simulate(ZIGZAG(w), w, hardware).seconds / policy.block_size


def fits(policy, limits):
    return not limits.exceeded(room_nbytes(workload(policy), shared=limits.shared))


def brute_force(limits, shapes, step=25):
    """The best of every split in steps of so many percent."""
    splits = [
        Split(device=d, host=h, disk=100 - d - h)
        for d, h in itertools.product(range(0, 101, step), repeat=2)
        if d + h <= 100
    ]
    found = []
    for size, batches in shapes:
        for weights, cache in itertools.product(splits, repeat=2):
            policy = Policy(
                device_batch_size=size, num_device_batches=batches, weights=weights, cache=cache
            )
            if fits(policy, limits):
                found.append(seconds(policy))
    return min(found)


@pytest.mark.parametrize(("device", "host"), [(6_000, 8_000), (12_000, 4_000), (9_000, 100_000)])
def test_nothing_tried_by_hand_is_faster(device, host):
    limits = Limits(device=device, host=host, disk=1e6)
    shapes = [(4, 1), (4, 4), (16, 1), (16, 2)]
    best = brute_force(limits, shapes)
    found = search(blocks, MACHINE, limits, schedule=ZIGZAG, requests=10**9)
    assert fits(found.best.policy, limits)
    assert seconds(found.best.policy) <= best * 1.05
    assert found.considered > 10
    assert "considered" in found.why()


@settings(max_examples=12)
@given(
    device=st.integers(4_000, 60_000),
    host=st.integers(1_000, 60_000),
    shared=st.booleans(),
    requests=st.integers(1, 40),
)
def test_what_is_found_fits(device, host, shared, requests):
    limits = Limits(device=device, host=0 if shared else host, disk=1e6, shared=shared)
    machine = dataclasses.replace(MACHINE, host_to_device=None) if shared else MACHINE
    try:
        found = search(blocks, machine, limits, schedule=ZIGZAG, requests=requests)
    except NothingFitsError:
        smallest = Policy(
            device_batch_size=1,
            num_device_batches=1,
            **dict.fromkeys(("weights", "cache", "hidden"), Split(device=0, disk=100)),
        )
        assert not fits(smallest, limits)
        return
    policy = found.best.policy
    assert fits(policy, limits)
    # No batch of the block is empty, and none is twice as large as need be.
    assert policy.num_device_batches == 1 or (
        policy.device_batch_size * (policy.num_device_batches - 1) < requests
    )
    assert policy.device_batch_size == 1 or policy.device_batch_size < 2 * requests


def test_what_fits_lies_on_the_device():
    found = search(
        blocks, MACHINE, Limits(device=1e9, host=1e9, disk=1e9), schedule=ZIGZAG, requests=64
    )
    policy = found.best.policy
    assert policy.weights == policy.cache == policy.hidden == Split()


def test_what_is_fixed_stays():
    weights = Split(device=0, host=50, disk=50)
    fixed = {"device_batch_size": 4, "num_device_batches": 3, "weights": weights, "overlap": False}
    found = search(
        blocks,
        MACHINE,
        Limits(device=1e6, host=1e6, disk=1e6),
        schedule=ZIGZAG,
        requests=10**9,
        fixed=fixed,
    )
    assert {name: getattr(found.best.policy, name) for name in fixed} == fixed
    assert found.considered == 1


def test_only_what_is_allowed_is_used():
    tight = Limits(device=9_000, host=6_000, disk=1e6)
    slow = dataclasses.replace(MACHINE, disk_to_host=1e4)
    plain = search(blocks, slow, tight, schedule=ZIGZAG, requests=10**9)
    assert plain.best.policy.weight_bits is None
    allowed = search(blocks, slow, tight, schedule=ZIGZAG, requests=10**9, allow=["weight_bits"])
    assert allowed.best.policy.weight_bits == 4
    assert allowed.best.seconds < plain.best.seconds
    with pytest.raises(ValueError, match="nothing to allow by speed; known: host_attention"):
        search(blocks, slow, tight, schedule=ZIGZAG, requests=1, allow=["speed"])


def test_the_host_attends_where_the_link_is_slow():
    limits = Limits(device=9_000, host=1e6, disk=1e6)
    slow = dataclasses.replace(MACHINE, host_to_device=1e5, host_attention=1e8)
    found = search(blocks, slow, limits, schedule=ZIGZAG, requests=10**9, allow=["host_attention"])
    assert found.best.policy.host_attention
    assert found.best.policy.cache.device < 100


def test_what_would_help():
    limits = Limits(device=9_000, host=6_000, disk=1e6)
    slow = dataclasses.replace(MACHINE, disk_to_host=1e4, host_to_disk_cache=1e4)
    policy = search(blocks, slow, limits, schedule=ZIGZAG, requests=10**9).best.policy
    gains = advice(blocks, slow, limits, policy, schedule=ZIGZAG)
    assert gains["a disk that reads and writes twice as fast"] > 1.2
    assert gains["twice the host memory"] > 1.2
    assert list(gains.values()) == sorted(gains.values(), reverse=True)
    roomy = Limits(device=1e9, host=1e9, disk=1e9)
    policy = search(blocks, slow, roomy, schedule=ZIGZAG, requests=64).best.policy
    assert "twice the host memory" not in advice(blocks, slow, roomy, policy, schedule=ZIGZAG)


def test_what_would_help_is_what_the_search_finds():
    limits = Limits(device=9_000, host=6_000, disk=1e6)
    slow = dataclasses.replace(MACHINE, disk_to_host=1e4)
    now = search(blocks, slow, limits, schedule=ZIGZAG, requests=10**9).best
    changed = {"weight_bits": 4}
    then = search(blocks, slow, limits, schedule=ZIGZAG, requests=10**9, fixed=changed).best
    gains = advice(blocks, slow, limits, now.policy, schedule=ZIGZAG)
    assert gains["4-bit weights"] == pytest.approx(now.seconds / then.seconds, rel=0.15)


def test_methods_that_are_settled_are_not_advised():
    limits = Limits(device=9_000, host=6_000, disk=1e6)
    slow = dataclasses.replace(MACHINE, disk_to_host=1e4)
    policy = search(blocks, slow, limits, schedule=ZIGZAG, requests=10**9).best.policy
    for settled in ([], ["weight_bits"]):
        gains = advice(blocks, slow, limits, policy, schedule=ZIGZAG, settled=settled)
        assert ("4-bit weights" in gains) is (not settled)


def test_searching_leaves_the_collection_of_garbage_as_it_was():
    seen = []

    def watched(policy):
        seen.append(gc.isenabled())
        return blocks(policy)

    roomy, tiny = Limits(device=1e9, host=1e9, disk=1e9), Limits(device=1, host=1, disk=1)
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            search(watched, MACHINE, roomy, schedule=ZIGZAG, requests=4)
            assert gc.isenabled() is enabled
            with pytest.raises(NothingFitsError):
                search(watched, MACHINE, tiny, schedule=ZIGZAG, requests=4)
            assert gc.isenabled() is enabled
        finally:
            gc.enable()
    assert not any(seen)


def test_a_search_has_no_need_of_what_another_one_found_out():
    asked = []

    def counted(policy):
        asked.append(policy)
        return blocks(policy)

    limits = Limits(device=9_000, host=6_000, disk=1e6)
    known = Remembered.of(counted, ZIGZAG)
    assert Remembered.of(known, ZIGZAG) is known
    first = search(known, MACHINE, limits, schedule=ZIGZAG, requests=10**9)
    count = len(asked)
    again = search(known, MACHINE, limits, schedule=ZIGZAG, requests=10**9)
    assert again == first == search(blocks, MACHINE, limits, schedule=ZIGZAG, requests=10**9)
    assert len(asked) == count
    # On another machine and with more room the blocks are the same, and times are not.
    slow = dataclasses.replace(MACHINE, disk_to_host=1e4)
    room = Limits(device=9_000, host=3_000, disk=1e6)
    found = search(known, slow, room, schedule=ZIGZAG, requests=10**9)
    assert found == search(blocks, slow, room, schedule=ZIGZAG, requests=10**9)


POLICIES = st.builds(
    Policy,
    device_batch_size=st.integers(1, 6),
    num_device_batches=st.integers(1, 4),
    weights=st.sampled_from([Split(), Split(device=0, host=50, disk=50)]),
    cache=st.sampled_from([Split(), Split(device=30, host=30, disk=40)]),
    host_attention=st.booleans(),
    weight_bits=st.sampled_from([None, 4]),
)


@given(policy=POLICIES)
def test_busy_lanes_are_what_the_ops_cost(policy):
    """The lanes of a phase sum up what the simulator spends on each stream."""
    w = workload(policy)
    found = lanes(w, MACHINE)
    slow = simulate(ZIGZAG(w), w, MACHINE)
    assert busiest(found) <= slow.seconds * 1.02
    compute = sum(found["compute"][phase].get("compute", 0.0) for phase in (0, 1))
    assert compute == pytest.approx(slow.busy("compute"), rel=0.02)
    cpu = found["weights"]
    loads = sum(cpu[phase].get("load weights", 0.0) for phase in (0, 1))
    assert loads <= slow.busy("load weights") * 1.001 + 1e-12


@settings(max_examples=40)
@given(policy=POLICIES, name=st.sampled_from(["zigzag", "row_by_row", "lock_step"]))
def test_a_few_steps_stand_for_all(policy, name):
    order, w = SCHEDULES[name], workload(policy, steps=24)
    whole = simulate(order(w), w, MACHINE).seconds
    assert sum(estimate(order, w, MACHINE)) == pytest.approx(whole, rel=0.05)
    assert sum(estimate(order, w, MACHINE, decode_steps=23)) == pytest.approx(whole)
    assert shortened(w, 23) is w


@given(policy=POLICIES, name=st.sampled_from(sorted(SCHEDULES)))
def test_room_is_enough_for_any_order(policy, name):
    w = workload(policy)
    peak = highest(peak_nbytes(SCHEDULES[name](w), w, shared=False))
    room = room_nbytes(w, shared=False)
    for tier in Tier:
        assert peak[tier] <= room[tier]
    if name == "zigzag":
        assert peak[Tier.DISK] == room[Tier.DISK]


def test_one_batch_at_a_time_takes_the_room_of_one():
    policy = Policy(device_batch_size=4, num_device_batches=4, cache=Split(device=0, host=100))
    w = workload(policy)
    one = highest(peak_nbytes(SCHEDULES["row_by_row"](w), w, shared=False))[Tier.HOST]
    all_at_once = highest(peak_nbytes(ZIGZAG(w), w, shared=False))[Tier.HOST]
    assert one * 4 == all_at_once


@pytest.mark.parametrize(("prompt", "steps"), [(8, 33), (64, 33), (4, 65)])
def test_the_diagonal_order_needs_less_room(prompt, steps):
    """The paper's appendix A.2: of batches that are evenly spaced, the ages sum to less.

    Of so many that one leaves at each step, (2s + n)(n - 1) / 2n against s + n; of a few, the
    youngest is a part of a stretch old, the oldest a whole one.
    """
    batches = 4
    base = workload(Policy(num_device_batches=batches, cache=Split(device=0, host=100)))
    sizes = dataclasses.replace(
        base.sizes,
        batches=tuple(
            dataclasses.replace(
                b, prompt_len=prompt, num_steps=steps, capacity=prompt + steps, hidden_nbytes=0
            )
            for b in base.sizes.batches
        ),
        resident=(dict.fromkeys(Tier, 0),),
    )
    w = dataclasses.replace(base, num_steps=steps, sizes=sizes)

    def most(name):
        peak = peak_nbytes(SCHEDULES[name](w), w, shared=False, filled=True)
        return highest(peak)[Tier.HOST]

    ratio = most("diagonal") / most("zigzag")
    ages = steps * (batches + 1) / (2 * batches)
    assert ratio == pytest.approx((prompt + ages) / (prompt + steps), rel=0.05)


def test_faults_are_named():
    everything = Limits(device=1e9, host=1e9, disk=1e9)
    with pytest.raises(TypeError):
        search(blocks, MACHINE, everything, schedule=ZIGZAG, requests=1, fixed={"sped": 1})
    bare = Workload(num_steps=1, num_layers=2, num_batches=1)
    for call in (
        lambda: shortened(bare, 1),
        lambda: lanes(bare, MACHINE),
        lambda: room_nbytes(bare, shared=False),
        lambda: peak_nbytes([], bare, shared=False),
    ):
        with pytest.raises(ValueError, match="no sizes"):
            call()
    with pytest.raises(NothingFitsError, match=r"nothing fits within device 1\.00 kB.*4-bit"):
        search(blocks, MACHINE, Limits(device=1e3, host=1e3, disk=1e3), schedule=ZIGZAG, requests=8)


def test_limits_of_a_machine():
    assert Limits.of(Hardware.preset("t4")).host == 208e9
    laptop = Limits.of(Hardware.preset("laptop"))
    assert laptop.shared
    assert laptop.device == 24e9
    over = laptop.exceeded({Tier.DEVICE: 20e9, Tier.HOST: 5e9, Tier.DISK: 0})
    assert over == {Tier.DEVICE: pytest.approx(1e9 + laptop.aside)}
    assert laptop.aside == Hardware.preset("laptop").runtime_memory > 0
    apart = Limits.of(Hardware.preset("t4"))
    over = apart.exceeded({Tier.DEVICE: 16e9, Tier.HOST: 208e9, Tier.DISK: 0})
    assert over == {Tier.HOST: pytest.approx(apart.aside)}
