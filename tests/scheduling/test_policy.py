"""Splits and policies: what they accept, and their JSON form."""

import dataclasses
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scheduling import Policy, Split, Tier


@st.composite
def splits(draw):
    device = draw(st.floats(0, 100))
    host = draw(st.floats(0, 100 - device))
    return Split(device=device, host=host, disk=max(0.0, 100 - device - host))


policies = st.builds(
    Policy,
    device_batch_size=st.integers(1, 512),
    num_device_batches=st.integers(1, 64),
    weights=splits(),
    cache=splits(),
    hidden=splits(),
    overlap=st.booleans(),
    host_attention=st.booleans(),
    weight_bits=st.sampled_from([None, 4, 8]),
    cache_bits=st.sampled_from([None, 4, 8]),
    attention_sparsity=st.floats(0, 1, exclude_min=True),
    num_stages=st.integers(1, 8),
)


@given(policies)
def test_a_policy_survives_json(policy):
    assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


def test_defaults():
    policy = Policy()
    assert policy.weights == policy.cache == policy.hidden == Split(device=100, host=0, disk=0)
    assert policy.block_size == 32
    assert policy.overlap
    assert Policy.from_json({}) == policy
    assert [tier.value for tier in Tier] == ["device", "host", "disk"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.overlap = False
    with pytest.raises(TypeError):
        Policy(8)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((50, 40, 0), "sum to 100, got device 50 + host 40 + disk 0 = 90"),
        ((100, 0, 1), "sum to 100, got device 100 + host 0 + disk 1 = 101"),
        ((-10, 110, 0), "device must be a percentage in [0, 100], got -10"),
        ((0, 0, 101), "disk must be a percentage in [0, 100], got 101"),
        ((float("nan"), 0, 100), "device must be a percentage in [0, 100], got nan"),
        (("100", 0, 0), "device must be a percentage in [0, 100], got '100'"),
        ((True, 99, 0), "device must be a percentage in [0, 100], got True"),
    ],
)
def test_a_split_that_does_not_add_up_is_refused(shares, words):
    device, host, disk = shares
    with pytest.raises(ValueError, match="must") as caught:
        Split(device=device, host=host, disk=disk)
    assert words in str(caught.value)


def test_thirds_add_up():
    Split(device=100 / 3, host=100 / 3, disk=100 / 3)
    Split(device=33.3333333, host=33.3333333, disk=33.3333334)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device_batch_size": 0}, "device_batch_size must be an integer of at least 1, got 0"),
        ({"num_device_batches": 2.0}, "num_device_batches must be an integer"),
        ({"num_stages": -1}, "num_stages must be an integer of at least 1, got -1"),
        ({"weights": 100}, "weights must be a Split"),
        ({"cache": {"device": 100}}, "cache must be a Split"),
        ({"overlap": 1}, "overlap must be True or False, got 1"),
        ({"host_attention": None}, "host_attention must be True or False, got None"),
        ({"weight_bits": 3}, "weight_bits must be None, 4 or 8, got 3"),
        ({"cache_bits": 4.0}, "cache_bits must be None, 4 or 8, got 4.0"),
        ({"attention_sparsity": 0}, "attention_sparsity must be a number in (0, 1], got 0"),
        ({"attention_sparsity": 1.1}, "attention_sparsity must be a number in (0, 1], got 1.1"),
        ({"attention_sparsity": "all"}, "attention_sparsity must be a number in (0, 1]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match="must") as caught:
        Policy(**change)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gpu_batch_size": 4}, "unknown Policy field 'gpu_batch_size'; known: device_batch_size"),
        ({"weights": {"gpu": 100}}, "unknown Split field 'gpu'; known: device, host, disk"),
        ({"weights": [0, 100]}, "expected a JSON object of Split fields, got [0, 100]"),
        ([], "expected a JSON object of Policy fields, got []"),
    ],
)
def test_unknown_fields_are_refused_by_name(values, words):
    with pytest.raises(ValueError, match="field") as caught:
        Policy.from_json(values)
    assert words in str(caught.value)


def test_the_six_numbers():
    policy = Policy.from_percent(20, 30, 0, 100, 100, 0, device_batch_size=2)
    assert policy.weights == Split(device=20, host=30, disk=50)
    assert policy.cache == Split(device=0, host=100, disk=0)
    assert policy.hidden == Split(device=100, host=0, disk=0)
    assert policy.device_batch_size == 2


@given(st.integers(0, 1000))
@example(644)  # 100 - 64.4 - 35.6 is a little less than nothing
def test_rounding_does_not_refuse_what_adds_up_to_a_hundred(tenths):
    split = Policy.from_percent(tenths / 10, (1000 - tenths) / 10, 100, 0, 100, 0).weights
    assert 0 <= split.disk < 1e-9


@pytest.mark.parametrize(
    ("percent", "words"),
    [
        ((60, 50, 100, 0, 100, 0), "weights: 60 percent on the device and 50 on the host exceed"),
        ((100, 0, -5, 0, 100, 0), "cache: device must be a percentage in [0, 100], got -5"),
    ],
)
def test_six_numbers_that_cannot_be_are_refused_by_name(percent, words):
    with pytest.raises(ValueError, match="percent") as caught:
        Policy.from_percent(*percent)
    assert words in str(caught.value)


def test_batches_go_alone_through_stages_that_have_all_weights():
    """Each group of batches is a pass over what the devices do not hold, experts among it."""
    shape = {"num_device_batches": 6, "num_stages": 2}
    assert Policy(**shape).groups == 6
    assert Policy(**shape, experts=Split(device=0, host=100)).groups == 2
    assert Policy(**shape, weights=Split(device=0, host=100)).groups == 2
