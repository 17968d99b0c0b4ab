"""Policies that were once faster than what the search found, as ``benchmarks/search_grid.py`` or
people found them."""

from __future__ import annotations

import pytest

import flexgen_jax as fg

HOST = (0, 100)
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
]


@pytest.mark.parametrize(("job", "fixed", "percent", "shape", "choices"), CASES)
def test_nothing_is_predicted_to_be_faster(job, fixed, percent, shape, choices):
    model, machine, prompt_len, gen_len = job
    rows, batches = shape
    policy = fg.Policy.from_percent(
        *percent, device_batch_size=rows, num_device_batches=batches, **choices
    )
    lengths = {"prompt_len": prompt_len, "gen_len": gen_len, "num_hosts": policy.num_stages}
    other = fg.plan(model, policy, fg.Hardware.preset(machine), **lengths)
    auto = fg.plan(model, "auto", fg.Hardware.preset(machine), **lengths, fixed=fixed)
    assert not auto.misfits
    assert auto.tokens_per_second >= 0.99 * other.tokens_per_second
