"""What every tier's store must do, and what the disk's must say when it cannot."""

import errno
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import storage.disk
from storage.array_file import create_array, describe_array
from storage.descriptors import Descriptors
from storage.device import DeviceStore
from storage.disk import DiskContext, DiskStore
from storage.host import HostStore
from storage.memory import PAGE, aligned_bytes, round_up
from storage.slots import Ring, Slot
from storage.store import StorageError, Store

ARRAYS = {
    "matrix": np.arange(64 * 96, dtype=np.float32).reshape(64, 96),
    "half": np.arange(37 * 53).reshape(37, 53).astype(ml_dtypes.bfloat16),
    "vector": np.linspace(-1, 1, 1025, dtype=np.float32),
    "single": np.array([3.5], np.float32),
}

CONTEXTS = {
    "auto": DiskContext(),
    "auto without spare memory": DiskContext(small_nbytes=0, cache_share=0.0),
    "mapped": DiskContext(mode="mapped"),
    "direct": DiskContext(mode="direct", small_nbytes=0, direct_nbytes=PAGE),
    "tensorstore": DiskContext(mode="tensorstore"),
}


def aligned(array):
    block = aligned_bytes(round_up(array.nbytes))
    copy = block[: array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("arrays")
    for name, array in ARRAYS.items():
        with create_array(root / name, array.shape, array.dtype) as writer:
            writer.append(array)
    return {name: describe_array(root / name) for name in ARRAYS}


@pytest.fixture(params=["device", "host", *CONTEXTS])
def store(request, files):
    if request.param in CONTEXTS:
        made = DiskStore(files, CONTEXTS[request.param])
    else:
        made = DeviceStore() if request.param == "device" else HostStore()
        for name, array in ARRAYS.items():
            made.put(name, aligned(array))
    yield made
    made.close()


def load(store, names):
    slot = Slot(max(1, store.slot_nbytes(names)))
    slot.begin()
    return store.load(names, slot)


class TestEveryStore:
    def test_it_keeps_the_contract(self, store):
        assert isinstance(store, Store)

    def test_it_gives_back_what_it_holds_bit_by_bit(self, store):
        loaded = load(store, tuple(ARRAYS))
        assert set(loaded) == set(ARRAYS)
        for name, array in ARRAYS.items():
            assert isinstance(loaded[name], jax.Array)
            assert loaded[name].dtype == array.dtype
            assert np.asarray(loaded[name]).tobytes() == array.tobytes()

    def test_it_knows_its_names(self, store):
        assert "matrix" in store
        assert "nothing" not in store
        with pytest.raises(KeyError):
            load(store, ("nothing",))

    def test_a_slot_of_the_size_it_asks_for_is_enough(self, store):
        for names in (("matrix",), ("vector", "half"), tuple(ARRAYS)):
            assert set(load(store, names)) == set(names)

    def test_slots_are_refilled(self, store):
        ring = Ring(2)
        for turn in range(6):
            name = ("matrix", "half")[turn // 2 % 2]
            slot = ring[turn % 2]
            slot.begin(store.slot_nbytes((name,)))
            (array,) = store.load((name,), slot).values()
            total = jnp.sum(array.astype(jnp.float32))
            slot.release([total])
            assert float(total) == float(ARRAYS[name].astype(np.float32).sum())
        ring.close()

    def test_rows_come_by_themselves(self, store):
        rows = np.array([[3, 0], [63, 3]])
        got = store.take("matrix", rows)
        assert isinstance(got, jax.Array)
        np.testing.assert_array_equal(np.asarray(got), ARRAYS["matrix"][rows])
        many = np.arange(64).repeat(9)
        np.testing.assert_array_equal(
            np.asarray(store.take("matrix", many)), ARRAYS["matrix"][many]
        )

    def test_results_outlive_the_store(self, store):
        loaded = load(store, ("matrix",))["matrix"]
        total = float(jnp.sum(loaded))
        store.close()
        assert total == ARRAYS["matrix"].sum()


def test_a_slot_waits_for_the_results_of_its_readers():
    """JAX aliases the slot and computes later: refilling early gives the new values' result."""
    slot = Slot(1 << 22)
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda _, y: jnp.sin(y) + x, x).sum())
    slow(jnp.ones(1 << 20)).block_until_ready()  # compiled before it matters
    for turn in range(4):
        slot.begin()
        block = slot.take(1 << 22).view(np.float32)
        block[:] = turn
        result = slow(jax.device_put(block))
        slot.release([result])
        slot.begin()  # must wait here
        slot.take(1 << 22).view(np.float32)[:] = -99
        expected = slow(jnp.full(1 << 20, turn, jnp.float32))
        assert float(result) == float(expected)


def test_slots_are_page_aligned_and_bounded():
    ring = Ring(2)
    assert len(ring) == 2
    assert ring.nbytes == 0
    slot = ring[0]
    slot.begin(3 * PAGE + 1)
    assert ring.nbytes == 4 * PAGE
    first, second = slot.take(10), slot.take(PAGE + 1)
    assert first.ctypes.data % PAGE == 0
    assert second.ctypes.data - first.ctypes.data == PAGE
    assert second.nbytes == 2 * PAGE
    with pytest.raises(ValueError, match=r"has no room for 8192 more after 12288"):
        slot.take(2 * PAGE)
    slot.begin(PAGE)  # it never shrinks
    assert slot.take(4 * PAGE).nbytes == 4 * PAGE
    slot.begin(5 * PAGE)
    assert slot.take(5 * PAGE).nbytes == 5 * PAGE
    with pytest.raises(ValueError, match="at least one slot, got 0"):
        Ring(0)
    ring.close()


class TestDiskFaults:
    @pytest.fixture
    def own(self, tmp_path):
        with create_array(tmp_path / "a", (100, 100), np.dtype(np.float32)) as writer:
            writer.append(np.ones((100, 100), np.float32))
        return describe_array(tmp_path / "a")

    @pytest.mark.parametrize("mode", ["mapped", "direct"])
    def test_a_file_cut_short_is_named(self, own, mode):
        os.truncate(own.chunk, 4096)
        disk = DiskStore({"a": own}, DiskContext(mode=mode, small_nbytes=0))
        with pytest.raises(StorageError, match="short read of a: ") as caught:
            load(disk, ("a",))
        assert str(own.chunk) in str(caught.value)
        assert "expected 40000" in str(caught.value)
        assert "convert the model again" in str(caught.value)
        disk.close()

    @pytest.mark.parametrize("mode", ["auto", "mapped", "direct"])
    @pytest.mark.parametrize("small", [0, 1 << 20])
    def test_a_file_that_becomes_shorter_later_is_named(self, own, mode, small):
        """It may be mapped by then: touching it would end the process."""
        disk = DiskStore({"a": own}, DiskContext(mode=mode, small_nbytes=small))
        few, many = np.array([0]), np.arange(100)
        load(disk, ("a",))
        disk.take("a", few)
        os.truncate(own.chunk, 4096)
        for call in (
            lambda: load(disk, ("a",)),
            *(lambda r=r: disk.take("a", r) for r in (few, many)),
        ):
            with pytest.raises(StorageError, match=rf"a.*{own.chunk}"):
                call()
        disk.close()

    @pytest.mark.parametrize("mode", ["mapped", "direct"])
    def test_a_file_that_is_gone_is_named(self, own, mode):
        own.chunk.unlink()
        disk = DiskStore({"a": own}, DiskContext(mode=mode, small_nbytes=0))
        with pytest.raises(StorageError, match="cannot read a from ") as caught:
            load(disk, ("a",))
        assert str(own.chunk) in str(caught.value)
        assert "No such file" in str(caught.value)
        disk.close()

    def test_a_read_error_is_named(self, own, monkeypatch):
        def broken(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(storage.disk.os, "preadv", broken)
        disk = DiskStore({"a": own}, DiskContext(mode="direct", small_nbytes=0))
        with pytest.raises(StorageError, match=r"cannot read a from .*Input/output error"):
            load(disk, ("a",))
        disk.close()

    def test_where_direct_reads_are_refused_it_reads_through_the_cache(self, own, monkeypatch):
        original, refused = os.preadv, []

        def picky(descriptor, *rest):
            if not refused:
                refused.append(descriptor)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return original(descriptor, *rest)

        monkeypatch.setattr(storage.disk.os, "preadv", picky)
        disk = DiskStore({"a": own}, DiskContext(mode="direct", small_nbytes=0))
        assert float(jnp.sum(load(disk, ("a",))["a"])) == 10_000
        assert refused
        disk.close()

    def test_close_closes_every_file(self, files):
        before = set(os.listdir("/proc/self/fd"))
        disk = DiskStore(files, DiskContext(mode="direct", small_nbytes=0))
        load(disk, tuple(ARRAYS))
        assert len(set(os.listdir("/proc/self/fd"))) >= len(before) + len(ARRAYS)
        disk.close()
        assert set(os.listdir("/proc/self/fd")) <= before

    def test_bytes_read_are_counted(self, files):
        disk = DiskStore(files)
        load(disk, ("matrix", "half"))
        load(disk, ("matrix",))
        assert disk.bytes_read == 2 * ARRAYS["matrix"].nbytes + ARRAYS["half"].nbytes
        disk.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fast"}, "mode must be one of auto, mapped"),
        ({"direct_nbytes": 1000}, "whole pages"),
        ({"cache_share": 2}, r"\[0, 1\]"),
    ],
)
def test_a_context_is_checked(options, words):
    with pytest.raises(ValueError, match=words):
        DiskContext(**options)


def test_many_small_tensors_are_read_with_few_open_files(tmp_path):
    """Several at a time, and each what it is."""
    rng = np.random.default_rng(0)
    arrays = {f"t{n}": rng.integers(0, 255, 5000 + n, np.uint8) for n in range(40)}
    files = {}
    for name, array in arrays.items():
        with create_array(tmp_path / name, array.shape, array.dtype) as writer:
            writer.append(array)
        files[name] = writer.file
    before = len(os.listdir("/proc/self/fd"))
    disk = DiskStore(files, DiskContext(mode="direct", small_nbytes=0))
    slot = Slot()
    for _ in range(2):
        slot.begin(disk.slot_nbytes(list(files)))
        found = disk.load(list(files), slot)
        assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    disk.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_files_that_were_not_read_for_longest_are_closed(tmp_path):
    paths = [tmp_path / str(n) for n in range(5)]
    for path in paths:
        path.write_text(path.name)
    descriptors = Descriptors(most=2)
    for path in (*paths, paths[0]):
        with descriptors.opened(path, os.O_RDONLY) as descriptor:
            assert os.pread(descriptor, 1, 0) == path.name.encode()
        assert len(descriptors) <= 2
    with descriptors.opened(paths[0], os.O_RDONLY) as first:
        for path in paths[1:]:
            with descriptors.opened(path, os.O_RDONLY):
                pass
        assert os.pread(first, 1, 0) == b"0"  # it is being read: it stays open
    descriptors.close()
    assert len(descriptors) == 0


def test_small_tensors_are_mapped_unless_they_are_many(tmp_path, monkeypatch):
    files = {}
    for n in range(4):
        with create_array(tmp_path / str(n), (4096,), np.dtype(np.uint8)) as writer:
            writer.append(np.zeros(4096, np.uint8))
        files[str(n)] = writer.file
    for spare, slots in ((1 << 30, 0), (4096, 4 * 4096)):
        monkeypatch.setattr("storage.disk.available_memory", lambda spare=spare: spare)
        disk = DiskStore(files, DiskContext(mode="auto"))
        assert disk.slot_nbytes(list(files)) == slots
        disk.close()


def test_a_place_of_a_slot_has_one_array():
    """Making an array takes longer than reading a small tensor; a larger slot is another place."""
    slot, device = Slot(), jax.local_devices(backend="cpu")[0]
    seen = []
    for nbytes, value in ((1 << 12, 1), (1 << 12, 2), (1 << 24, 3), (1 << 12, 4)):
        slot.begin(nbytes)
        block = slot.take(1 << 12).view(np.float32)
        block[:] = value
        seen.append(slot.alias(block, device))
        assert np.asarray(seen[-1]).max() == np.asarray(seen[-1]).min() == value
        assert seen[-1].unsafe_buffer_pointer() == block.ctypes.data
    assert seen[0] is seen[1]
    assert seen[1] is not seen[2]
    assert seen[2] is seen[3]
    slot.begin()
    assert slot.alias(slot.take(64).view(np.int8), device).dtype == np.int8
