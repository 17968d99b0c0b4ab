"""Constants fitted to what ops took: what was off is found again."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling import CostModel, LoadWeights, Policy, Split, simulate, zigzag
from scheduling.calibrate import Observation, calibrated, factors, observations

from .test_search import workload
from .test_simulate import MACHINE

POLICY = Policy(
    device_batch_size=4,
    num_device_batches=2,
    weights=Split(device=50, disk=50),
    cache=Split(device=0, host=100),
)


def rows(truth, believed=MACHINE, policy=POLICY):
    """What is observed on ``truth`` while ``believed`` is what predicts."""
    w = workload(policy)
    ops = list(zigzag(w))
    return observations(ops, w, believed, simulate(ops, w, truth))


def test_a_right_machine_is_left_alone():
    found = factors(rows(MACHINE))
    assert found
    assert all(value == pytest.approx(1, abs=1e-6) for value in found.values())


@settings(max_examples=25)
@given(factor=st.floats(0.3, 4.0), name=st.sampled_from(["disk_to_host", "host_to_device"]))
def test_a_wrong_bandwidth_is_found(factor, name):
    policy = Policy(
        device_batch_size=4,
        num_device_batches=2,
        weights=Split(device=0, disk=100) if name == "disk_to_host" else Split(device=0, host=100),
    )
    machine = dataclasses.replace(MACHINE, host_to_device=1e6)
    truth = machine.scaled({name: factor})
    better = calibrated(machine, rows(truth, machine, policy))
    # Disk and link take turns in one op, so runs tell only what they take together.
    costs = [
        sum(seconds for _, seconds in CostModel(workload(policy), h).pieces(LoadWeights(0, 2)))
        for h in (better, truth)
    ]
    assert costs[0] == pytest.approx(costs[1], rel=0.05)


def test_predictions_after_calibrating_are_nearer():
    truth = MACHINE.scaled({"disk_to_host": 2.0, "host_to_device": 1.5, "cached_attention": 3.0})
    truth = dataclasses.replace(truth, matmul=tuple((r, v / 1.7) for r, v in truth.matmul))
    better = calibrated(MACHINE, rows(truth))
    w = workload(POLICY)

    def off(hardware):
        real = simulate(zigzag(w), w, truth).seconds
        return abs(simulate(zigzag(w), w, hardware).seconds / real - 1)

    assert off(MACHINE) > 0.2
    assert off(better) < 0.05
    assert better.name == "round figures, calibrated"
    assert calibrated(better, rows(truth, better)).name == better.name


def test_observations_go_to_json_and_back():
    for row in rows(MACHINE):
        assert Observation.from_json(row.to_json()) == row
        assert sum(row.terms.values()) == pytest.approx(row.predicted_seconds)
    with pytest.raises(ValueError, match="no observation"):
        Observation.from_json({"op": "Compute"})
    with pytest.raises(ValueError, match="no observations"):
        calibrated(MACHINE, [])


def test_scaling_is_checked():
    assert MACHINE.scaled({"disk_to_host": 2}).disk_to_host == MACHINE.disk_to_host / 2
    assert MACHINE.scaled({"matmul@10": 2}).matmul_rate(10) == pytest.approx(5e6)
    assert dataclasses.replace(MACHINE, overhead=1.0).scaled({"overhead": 3}).overhead == 3
    shared = dataclasses.replace(MACHINE, host_to_device=None)
    assert shared.scaled({"host_to_device": 2}).host_to_device is None
    with pytest.raises(ValueError, match="no constant 'luck'; known: disk_to_host"):
        MACHINE.scaled({"luck": 2})
    with pytest.raises(ValueError, match="factor of overhead must be a positive number"):
        MACHINE.scaled({"overhead": 0})
