"""The shape of a block."""

import dataclasses

import pytest

from scheduling import Workload


def test_all_layers_but_the_ends_keep_a_cache_unless_said_otherwise():
    workload = Workload(num_steps=3, num_layers=4, num_batches=2)
    assert [workload.has_cache(layer) for layer in range(4)] == [False, True, True, False]
    assert workload.gen_len == 3
    assert workload.weight_slots == 2
    for layers in (1, 2):
        short = dataclasses.replace(workload, num_layers=layers)
        assert not any(short.has_cache(layer) for layer in range(layers))
    chosen = dataclasses.replace(workload, cached_layers={0, 3})
    assert [chosen.has_cache(layer) for layer in range(4)] == [True, False, False, True]
    assert isinstance(hash(chosen), int)


def test_the_default_follows_the_number_of_layers():
    workload = Workload(num_steps=1, num_layers=9, num_batches=1)
    assert not dataclasses.replace(workload, num_layers=3).has_cache(2)
    assert dataclasses.replace(workload, num_layers=30).has_cache(28)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must be an integer of at least 1, got -1"),
        ({"num_batches": 1.5}, "num_batches must be an integer of at least 1, got 1.5"),
        ({"weight_slots": 0}, "weight_slots must be an integer of at least 1, got 0"),
        ({"device_batch_size": "8"}, "device_batch_size must be an integer of at least 1, got '8'"),
        ({"prompt_len": True}, "prompt_len must be an integer of at least 1, got True"),
        ({"cached_layers": {1, 4}}, "cached_layers must lie in 0..3, got [4]"),
        ({"cached_layers": {"a"}}, "cached_layers must be None or a set of layer numbers"),
        ({"cached_layers": 3}, "cached_layers must be None or a set of layer numbers, got 3"),
    ],
)
def test_what_cannot_be_is_refused_with_what_was_expected(change, words):
    with pytest.raises(ValueError, match="must") as caught:
        Workload(**{"num_steps": 3, "num_layers": 4, "num_batches": 2} | change)
    assert words in str(caught.value)
