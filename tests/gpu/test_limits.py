"""What a run may take, and what is seen of it, beside an accelerator."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import flexgen_jax as fg
from flexgen_jax.engine.memory_watch import MemoryExceededError, MemoryWatch
from flexgen_jax.machine.profile import _links
from flexgen_jax.machine.this_machine import nearest_preset
from flexgen_jax.planning.byte_sizes import device_memory
from flexgen_jax.planning.memory_need import MemoryLimitError, MemoryLimits
from storage.memory import available_memory

pytestmark = pytest.mark.gpu
DENSE = Path(__file__).parents[1] / "goldens" / "pre_norm"


def test_a_run_that_would_take_more_is_not_begun(generate):
    with pytest.raises(MemoryLimitError, match="are allowed"):
        generate(DENSE, device_memory=1000)


def test_the_memory_of_the_device_is_watched(gpu):
    before = MemoryWatch().device_bytes
    array = jax.block_until_ready(jnp.ones(1 << 26, jnp.float32, device=gpu))
    watch = MemoryWatch(MemoryLimits(device=before + array.nbytes // 2, host=None))
    assert watch.device_bytes >= before + array.nbytes
    with pytest.raises(MemoryExceededError, match="the device holds"):
        watch.look()
    array.delete()
    watch.look()


def test_what_the_device_has_is_told_apart_from_the_host(gpu):
    stats = gpu.memory_stats()
    assert device_memory() == stats["bytes_limit"]
    found = nearest_preset()
    assert found.device_memory == stats["bytes_limit"]
    assert found.host_memory == pytest.approx(available_memory(), rel=0.2)


def test_the_links_are_measured(gpu):
    inward, outward = _links(gpu, 2)
    assert inward > 1e8
    assert outward > 1e8


@pytest.mark.usefixtures("gpu")
def test_peaks_of_the_device_are_of_what_lies_there(generate):
    host = fg.Split(device=0, host=100)
    _, whole = generate(DENSE)
    _, there = generate(DENSE, policy={"weights": host, "cache": host, "hidden": host})
    peaks = whole.peak_bytes, there.peak_bytes
    assert peaks[0][fg.Tier.DEVICE] > peaks[1][fg.Tier.DEVICE]
    assert peaks[1][fg.Tier.HOST] > peaks[0][fg.Tier.HOST] == 0
