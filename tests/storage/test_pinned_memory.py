"""Pinned host memory, with the memory kinds of the CPU backend; and what is said without room."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexgen_jax.planning import auto
from flexgen_jax.planning.memory_need import MemoryLimits
from storage import pinned_memory
from storage.host import HostSequences, HostStore, PinnedSequences
from storage.pinned_memory import LIMIT, allow_pinned_memory, on_host, pin, pinned_limit
from storage.slots import Slot
from storage.store import StorageError


def pinned(device=None):
    device = device or jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")


def test_values_that_go_through_pinned_memory_stay_what_they_are():
    arrays = [jnp.arange(12.0).reshape(3, 4), jnp.ones((2, 2), jnp.bfloat16)]
    found = pinned_memory.through_pinned(arrays, pinned())
    for array, want in zip(found, arrays, strict=True):
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, np.asarray(want))


def test_what_leaves_an_accelerator_goes_through_pinned_memory(monkeypatch):
    """Here there is none: the CPU is taken for one."""
    kinds = []

    def noted(arrays, sharding):
        kinds.append(sharding)
        return [np.asarray(array) for array in arrays]

    class Device:
        platform = "gpu"

    store, array = HostSequences(), jnp.arange(8.0).reshape(2, 4, 1)
    np.testing.assert_array_equal(on_host([array])[0], np.asarray(array))
    np.testing.assert_array_equal(on_host([np.asarray(array)])[0], np.asarray(array))
    with monkeypatch.context() as patch:
        patch.setattr(pinned_memory, "through_pinned", noted)
        patch.setattr(type(array), "devices", lambda self: {Device()})
        patch.setattr(jax.sharding, "SingleDeviceSharding", lambda _, memory_kind: memory_kind)
        store.put("a", [array], 8)
        store.append("a", [array])
    assert kinds == ["pinned_host"] * 2
    (got,) = store.load("a", Slot())
    np.testing.assert_array_equal(np.asarray(got), np.concatenate([array, array], axis=1))


@pytest.mark.parametrize("ring", [False, True])
def test_a_device_other_than_the_stores(ring):
    """As between pipeline stages."""
    here, there = jax.local_devices()[:2]
    store = PinnedSequences(here, piece=8)
    array = jax.device_put(jnp.arange(64.0).reshape(2, 16, 2), there)
    store.put("a", [array], 16, length=16, ring=ring)
    (got,) = store.load("a", Slot())
    assert got.devices() == {here}
    np.testing.assert_array_equal(np.asarray(got), np.asarray(array))


def full(*_, **__):
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of host memory while trying to allocate 4096 bytes"
    )


def test_no_room_says_what_to_set(monkeypatch):
    store, device = HostStore(), PinnedSequences(piece=4)
    device.put("a", [jnp.zeros((2, 3, 4))], 16)
    array = jnp.ones((2, 4, 4))
    monkeypatch.setattr(jax, "device_put", full)
    for call in (
        lambda: store.put("w", np.zeros(32, np.float32)),
        lambda: device.put("b", [array], 16),
        lambda: device.append("a", [array]),
        lambda: device.put("c", [array], 4, length=4, ring=True),
    ):
        with pytest.raises(StorageError, match=rf"128 more bytes.*{LIMIT}.*--percent"):
            call()


def test_other_errors_stay_what_they_are(monkeypatch):
    def gone(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: the driver is gone")

    monkeypatch.setattr(jax, "device_put", gone)
    with pytest.raises(jax.errors.JaxRuntimeError, match="driver is gone"):
        pin((np.zeros(4),), pinned())


@pytest.mark.parametrize(
    ("variables", "gibibytes"),
    [
        ({}, 64),
        ({LIMIT: "200"}, 200),
        ({LIMIT: "much"}, 64),
        ({"XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE": "true"}, 16),
    ],
)
def test_how_much_is_pinned_at_most(monkeypatch, variables, gibibytes):
    monkeypatch.delenv(LIMIT, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pinned_limit() == gibibytes << 30


def test_all_there_is_may_be_pinned_unless_somebody_says_otherwise(monkeypatch):
    monkeypatch.setattr(pinned_memory, "total_memory", lambda: 208 << 30)
    monkeypatch.setattr(pinned_memory, "memory_limit", lambda: 100 << 30)
    monkeypatch.setenv(LIMIT, "7")
    allow_pinned_memory()
    assert pinned_limit() == 7 << 30
    monkeypatch.delenv(LIMIT)
    allow_pinned_memory()
    assert pinned_limit() == 100 << 30
    monkeypatch.delenv(LIMIT)


def test_policy_auto_plans_for_no_more_than_is_pinned(monkeypatch, tmp_path):
    class Device:
        platform = "gpu"

    monkeypatch.delenv(LIMIT, raising=False)
    monkeypatch.setattr(auto, "available_memory", lambda: 500 << 30)
    monkeypatch.setattr(auto, "device_memory", lambda: 16 << 30)
    monkeypatch.setattr(auto.jax, "local_devices", lambda: [Device()])
    found = auto.limits_of_this_machine(MemoryLimits(), tmp_path, 0, 1e9)
    assert found.host == 64 << 30
    assert not found.shared
    monkeypatch.setenv(LIMIT, "300")
    assert auto.limits_of_this_machine(MemoryLimits(), tmp_path, 0, 1e9).host == 300 << 30
