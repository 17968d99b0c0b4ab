"""Policies that were once faster than what the search found, as ``benchmarks/search_grid.py`` or
people found them."""

from __future__ import annotations

import dataclasses

import pytest

import flexgen_jax as fg

HOST = (0, 100)
T4, A5000 = fg.Hardware.preset("t4"), fg.Hardware.preset("a5000")
# As in benchmarks/search_grid.py.
MACHINES = {
    "little memory": dataclasses.replace(A5000, device_memory=8e9, host_memory=16e9),
    "many cores": dataclasses.replace(T4, host_memory=512e9, host_attention=300e9),
}
CASES = [
    # model, machine, prompt, new; fields that auto keeps; percent, rows x batches, other fields
    (
        ("facebook/opt-30b", "t4", 512, 32),
        {"host_attention": False},
        (*HOST, *HOST, *HOST),
        (64, 3),
        {"host_attention": False},
    ),
    (
        ("facebook/opt-30b", "t4", 512, 32),
        {},
        (*HOST, 14, 86, 20, 80),
        (36, 3),
        {"host_attention": True},
    ),
    (
        ("facebook/opt-30b", "t4", 512, 32),
        {"cache_bits": 4},
        (*HOST, *HOST, *HOST),
        (64, 8),
        {"cache_bits": 4},
    ),
    (  # a machine for each stage
        ("facebook/opt-30b", "t4", 512, 32),
        {"host_attention": False, "num_stages": 4, "device_batch_size": 3},
        (100, 0, *HOST, 10, 90),
        (3, 16),
        {"num_stages": 4},
    ),
    (  # where moving weights took more than there was room for
        ("facebook/opt-66b", "h200", 32, 128),
        {},
        (60, 40, 20, 80, 100, 0),
        (256, 3),
        {"host_attention": True},
    ),
    (
        ("facebook/opt-6.7b", "many cores", 32, 32),
        {},
        (20, 80, *HOST, 100, 0),
        (256, 32),
        {"host_attention": True},
    ),
    (  # which a few layers call slower than another shape
        ("facebook/opt-66b", "h200", 128, 128),
        {},
        (*HOST, 20, 80, 100, 0),
        (256, 4),
        {"host_attention": True},
    ),
    *(  # far from what is estimated to be best
        (
            ("Qwen/Qwen3-30B-A3B", machine, prompt_len, gen_len),
            {},
            (20, 80, *HOST, 100, 0),
            shape,
            {"host_attention": True, "experts": fg.Split(device=0, host=100)},
        )
        for machine, prompt_len, gen_len, shape in (
            ("many cores", 2048, 8, (16, 16)),
            ("t4", 512, 32, (128, 8)),
        )
    ),
    *(
        (
            ("Qwen/Qwen3-30B-A3B", "little memory", 2048, new),
            {},
            (0, 10, 0, 10, 0, 20),
            (8, 16),
            {"host_attention": True, "experts": fg.Split(device=0, host=20, disk=80)},
        )
        for new in (32, 512)
    ),
]


@pytest.mark.parametrize(("job", "fixed", "percent", "shape", "choices"), CASES)
def test_nothing_is_predicted_to_be_faster(job, fixed, percent, shape, choices):
    model, machine, prompt_len, gen_len = job
    rows, batches = shape
    policy = fg.Policy.from_percent(
        *percent, device_batch_size=rows, num_device_batches=batches, **choices
    )
    hardware = MACHINES.get(machine) or fg.Hardware.preset(machine)
    lengths = {"prompt_len": prompt_len, "gen_len": gen_len, "num_hosts": policy.num_stages}
    other = fg.plan(model, policy, hardware, **lengths)
    auto = fg.plan(model, "auto", hardware, **lengths, fixed=fixed)
    assert not auto.misfits
    assert auto.tokens_per_second >= 0.99 * other.tokens_per_second
