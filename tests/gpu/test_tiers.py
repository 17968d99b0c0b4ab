"""The device's and the host's tier beside an accelerator; on a CPU, with its memory kinds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storage.array_file import ArrayFile
from storage.device import DeviceSequences
from storage.disk import DiskContext, DiskStore
from storage.host import HostSequences, HostStore, PinnedSequences, host_sequences
from storage.slots import Slot
from storage.testing import SequenceStoreContract

pytestmark = pytest.mark.gpu


def cell(positions, seed=0):
    values = np.random.default_rng(seed).standard_normal((2, 3, positions, 4), np.float32)
    return [jnp.asarray(values), jnp.asarray(values, jnp.bfloat16)]


@pytest.mark.usefixtures("gpu")
class TestTheContract(SequenceStoreContract):
    """That of ``tests/storage``, which has the CPU's."""

    @pytest.fixture(
        params=[DeviceSequences, HostSequences, lambda device: PinnedSequences(device, piece=8)],
        ids=["device", "main memory", "pinned"],
    )
    def store(self, request, gpu):
        made = request.param(gpu)
        yield made
        made.close()


def test_weights_lie_in_host_memory_and_come_to_the_device(device):
    store, there = HostStore(device), np.arange(4096, dtype=np.float32).reshape(64, 64)
    want = there.copy()
    store.put("a", there)
    if device.platform != "cpu":
        assert store._arrays["a"].sharding.memory_kind == "pinned_host"
        there[:] = -1  # what was put is a copy
    got = store.load(["a"], Slot())["a"]
    assert got.devices() == {device}
    assert got.sharding.memory_kind != "pinned_host"
    np.testing.assert_array_equal(np.asarray(got), want)
    rows = store.take("a", np.array([[3, 60]]))
    np.testing.assert_array_equal(np.asarray(rows)[0], want[[3, 60]])


def test_many_pinned_arrays_come_in_one_transfer(gpu):
    store = HostStore(gpu)
    names = [str(number) for number in range(40)]
    for name in names:
        store.put(name, np.full((256, 1024), int(name), np.float32))
    found = store.load(names, Slot())
    assert all(float(found[name][17, 5]) == int(name) for name in names)


def test_the_host_tier_is_the_devices(device):
    kind = HostSequences if device.platform == "cpu" else PinnedSequences
    assert isinstance(host_sequences(device), kind)


def test_the_cache_on_the_device_is_written_in_place(device):
    """Donated: another copy of it may not fit."""
    store = DeviceSequences(device)
    store.put("a", [jax.device_put(x, device) for x in cell(16)], 16, length=16, ring=True)
    where = [array.unsafe_buffer_pointer() for array in store.load("a", Slot())]
    for i in range(4):
        store.append("a", [jax.device_put(x, device) for x in cell(1, i)])
        store.renew("a", np.array([1], np.int32), [x[:1] for x in cell(3, 9)])
        assert [array.unsafe_buffer_pointer() for array in store.load("a", Slot())] == where


def test_what_a_slot_is_refilled_with_changes_no_result(device, tmp_path):
    values, chunk = np.arange(1 << 20, dtype=np.float32), tmp_path / "a"
    values.tofile(chunk)
    file = ArrayFile(tmp_path, chunk, values.shape, values.dtype, values.nbytes, raw=True)
    store, slot = DiskStore({"a": file}, DiskContext(mode="direct"), device), Slot()
    twice = jax.jit(lambda x: x + x)
    slot.begin(store.slot_nbytes(["a"]))
    made = twice(store.load(["a"], slot)["a"])
    slot.release([made])
    slot.begin(store.slot_nbytes(["a"]))
    slot.take(values.nbytes)[:] = 0
    np.testing.assert_array_equal(np.asarray(made), 2 * values)
    store.close()


def test_keys_are_sent_before_newer_ones_are_written(gpu):
    """What sparse attention reads lies in main memory, which a transfer may read late."""
    store = HostSequences(gpu)
    first = jnp.ones((64, 16, 512, 64), jnp.float32)
    store.put("a", [first], 512, length=512, ring=True)
    (got,) = store.load("a", Slot())
    store.append("a", [jnp.full((64, 16, 1, 64), 7, jnp.float32)])
    assert float(got.max()) == 1.0
