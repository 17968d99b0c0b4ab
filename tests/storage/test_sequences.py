"""Sequences in every tier, by one contract; and what is particular to the disk."""

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

import storage.chunks
import storage.device
from storage.device import DeviceSequences
from storage.disk import DiskContext
from storage.disk_sequences import DiskSequences
from storage.host import HostSequences, PinnedSequences, host_sequences
from storage.slots import Slot
from storage.store import StorageError
from storage.testing import SequenceStoreContract, in_ring_order
from storage.wrappers import Faulty, Logged, Throttled

DISKS = {
    "mapped": DiskContext(mode="mapped", chunk_positions=8),
    "direct": DiskContext(mode="direct", chunk_positions=8),
    "tensorstore": DiskContext(mode="tensorstore", chunk_positions=8),
    "a chunk a position": DiskContext(chunk_positions=1),
    "chunks of more than there is": DiskContext(chunk_positions=64),
}
OTHERS = {
    "device": DeviceSequences,
    "host": HostSequences,
    "pinned": lambda: PinnedSequences(piece=8),
    "logged": lambda: Logged(HostSequences(), lambda *_: None),
    "throttled": lambda: Throttled(HostSequences(), 1e12),
    "faulty": lambda: Faulty(HostSequences(), lambda *_: None),
}


def make(kind, directory):
    return DiskSequences(directory, DISKS[kind]) if kind in DISKS else OTHERS[kind]()


class TestEveryTier(SequenceStoreContract):
    @pytest.fixture(params=[*OTHERS, *DISKS])
    def store(self, request, tmp_path):
        made = make(request.param, tmp_path)
        yield made
        made.close()
        assert list(tmp_path.iterdir()) == []


# Few sizes: each is a program on the device.
FEW, CAPACITIES = st.sampled_from([1, 3, 8, 20]), st.sampled_from([1, 8, 13, 30])


@pytest.mark.parametrize("kind", ["device", "host", "pinned", "direct", "tensorstore"])
def test_any_order_of_calls_agrees_with_a_dictionary(kind, tmp_path_factory):
    class Machine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.store = make(kind, tmp_path_factory.mktemp("machine"))
            self.model = {}
            self.count = 0

        def fresh(self, positions):
            self.count += 1
            values = np.arange(2 * positions * 3, dtype=np.float32) + 1000 * self.count
            return values.reshape(2, positions, 3)

        @rule(name=st.sampled_from("abc"), positions=FEW, more=st.sampled_from([0, 5, 12]))
        def put(self, name, positions, more):
            array = self.fresh(positions)
            self.store.put(name, [jnp.asarray(array)], positions + more)
            self.model[name] = (array, positions + more, False)

        @rule(name=st.sampled_from("abc"), positions=FEW, capacity=CAPACITIES)
        def put_ring(self, name, positions, capacity):
            array = self.fresh(positions)
            ring = jnp.asarray(in_ring_order(array, capacity))
            self.store.put(name, [ring], capacity, length=positions, ring=True)
            self.model[name] = (array, capacity, True)

        @precondition(lambda self: self.model)
        @rule(data=st.data())
        def append(self, data):
            name = data.draw(st.sampled_from(sorted(self.model)))
            array, capacity, ring = self.model[name]
            room = 2 * capacity if ring else capacity - array.shape[1]
            count = data.draw(FEW)
            if count <= room:
                more = self.fresh(count)
                self.store.append(name, [jnp.asarray(more)])
                self.model[name] = (np.concatenate([array, more], axis=1), capacity, ring)

        @rule(name=st.sampled_from("abc"))
        def discard(self, name):
            self.store.discard(name)
            self.model.pop(name, None)

        @precondition(lambda self: self.model)
        @rule(data=st.data())
        def load(self, data):
            name = data.draw(st.sampled_from(sorted(self.model)))
            array, capacity, ring = self.model[name]
            slot = Slot(max(1, self.store.slot_nbytes([capacity * 24])))
            slot.begin()
            (got,) = self.store.load(name, slot)
            assert got.shape == (2, capacity, 3)
            want = in_ring_order(array, capacity) if ring else array
            np.testing.assert_array_equal(np.asarray(got)[:, : want.shape[1]], want)

        def teardown(self):
            self.store.close()

    Machine.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
    Machine.TestCase("runTest").runTest()


def cut_by(positions, kind, directory):
    """A store that cuts its sequences so, if it cuts them."""
    if kind == "pinned":
        return PinnedSequences(piece=positions)
    if kind in DISKS:
        return DiskSequences(directory, DiskContext(mode=kind, chunk_positions=positions))
    return OTHERS[kind]()


@pytest.mark.parametrize("kind", ["device", "host", "pinned", "mapped", "direct", "tensorstore"])
def test_any_ring_holds_its_last_positions(kind, tmp_path_factory):
    @settings(max_examples=25)
    @given(
        capacity=CAPACITIES,
        cut=st.sampled_from([1, 3, 7, 8, 26]),
        first=st.sampled_from([1, 5, 13, 60]),
        steps=st.lists(FEW | st.just(1), max_size=8),
    )
    def check(capacity, cut, first, steps):
        store = cut_by(cut, kind, tmp_path_factory.mktemp("ring"))
        whole = np.arange(2 * 3 * (first + sum(steps)), dtype=np.float32).reshape(2, -1, 3)
        end = first
        given = in_ring_order(whole[:, :end], capacity)
        store.put("a", [jnp.asarray(given)], capacity, length=end, ring=True)
        for step in [0, *steps]:
            if step:
                store.append("a", [jnp.asarray(whole[:, end : end + step])])
            end += step
            slot = Slot(max(1, store.slot_nbytes([capacity * 24])))
            slot.begin()
            (got,) = store.load("a", slot)
            want = in_ring_order(whole[:, :end], capacity)
            assert got.shape == (2, capacity, 3)
            np.testing.assert_array_equal(np.asarray(got)[:, : want.shape[1]], want)
        store.close()

    check()


@pytest.mark.parametrize("kind", ["device", "host", "pinned", "mapped", "direct", "tensorstore"])
def test_any_order_of_appending_renewing_and_resizing_agrees_with_an_array(kind, tmp_path_factory):
    append = st.sampled_from([1, 2, 11])
    resize = st.sampled_from(["5", "12", "19"])
    # Few shapes: each is a program on the device.
    renew = st.tuples(
        st.sampled_from([(-1, 0), (2, 1), (1, -1), (0, 2)]), st.sampled_from([1, 7, 12])
    )

    @settings(max_examples=15, deadline=None)
    @given(
        ring=st.booleans(),
        cut=st.sampled_from([1, 4, 5, 14]),
        first=st.sampled_from([1, 11, 12, 25]),
        steps=st.lists(append | renew | resize, max_size=12),
    )
    def check(ring, cut, first, steps):
        capacity = 12 if ring else 172
        store = cut_by(cut, kind, tmp_path_factory.mktemp("renewed"))
        whole = np.arange(3 * 172 * 2, dtype=np.float32).reshape(3, 172, 2)
        end, fresh, known = first, whole.size, min(first, capacity)
        begin = in_ring_order(whole[:, :end], capacity)
        store.put("a", [jnp.asarray(begin)], capacity, length=end, ring=ring)
        for step in steps:
            if isinstance(step, int):
                store.append("a", [jnp.asarray(whole[:, end : end + step])])
                end += step
                known = min(known + step, capacity)
            elif isinstance(step, str):
                if ring:
                    capacity = int(step)
                    store.resize("a", capacity)
                    known = min(known, capacity)
            elif step[1] <= known:
                rows, positions = step
                new = fresh + np.arange(2 * positions * 2, dtype=np.float32)
                new = new.reshape(2, positions, 2)
                fresh += new.size
                store.renew("a", np.array(rows, np.int32), [jnp.asarray(new)])
                slot = Slot(max(1, store.slot_nbytes([whole.nbytes])))
                slot.begin()
                (got,) = store.load("a", slot)
                older = np.arange(end - known, end - positions)
                for row, values in zip(rows, new, strict=True):
                    if row >= 0:
                        whole[row, end - positions : end] = values
                        whole[row, older] = np.asarray(got)[row, older % capacity]
                slot.release([])
            slot = Slot(max(1, store.slot_nbytes([whole.nbytes])))
            slot.begin()
            (got,) = store.load("a", slot)
            at = np.arange(end - known, end)
            np.testing.assert_array_equal(np.asarray(got)[:, at % capacity], whole[:, at])
        store.close()

    check()


def cell(positions, seed=0):
    values = np.random.default_rng(seed).normal(size=(2, 4, positions, 16))
    return [jnp.asarray(values.astype(np.float32))]


def newer(positions, seed=0):
    """What comes for one row of a cell."""
    values = np.random.default_rng(seed).normal(size=(1, 4, positions, 16))
    return [jnp.asarray(values.astype(np.float32))]


def load(store, name):
    slot = Slot(store.slot_nbytes([1 << 20]))
    slot.begin()
    return store.load(name, slot)


def test_the_disk_is_written_in_whole_chunks_and_read_up_to_what_is_filled(tmp_path):
    store = DiskSequences(tmp_path, DiskContext(mode="direct", chunk_positions=8))
    chunk = 4096  # 8 rows x 8 positions x 16 floats: one page
    store.put("a", cell(19), 64)
    assert store.bytes_written == 2 * chunk
    load(store, "a")
    assert store.bytes_read == 2 * chunk
    for i in range(4):
        store.append("a", cell(1, i))
    assert store.bytes_written == 2 * chunk
    store.append("a", cell(1, 5))  # the 24th position fills the third chunk
    assert store.bytes_written == 3 * chunk
    assert (tmp_path / "a").stat().st_size == 3 * chunk
    load(store, "a")
    assert store.bytes_read == 5 * chunk
    store.close()


def test_what_cannot_grow_lies_on_the_disk_at_once(tmp_path):
    store = DiskSequences(tmp_path, DiskContext(chunk_positions=32))
    store.put("hidden", cell(5), 5)
    assert (tmp_path / "hidden").stat().st_size > 0
    store.close()


def test_a_ring_on_disk_is_written_a_chunk_a_time_and_once_a_lap(tmp_path):
    store = DiskSequences(tmp_path, DiskContext(mode="direct", chunk_positions=8))
    chunk = 4096  # 8 rows x 8 positions x 16 floats: one page
    store.put("a", cell(22), 22, length=22, ring=True)  # chunks of 8, 8 and 6
    assert store.bytes_written == 3 * chunk
    assert store.buffered_nbytes == chunk
    written = [3] * 8 + [4] * 8 + [5] * 6 + [6] * 8
    for i, count in enumerate(written):
        assert store.bytes_written == count * chunk, i
        store.append("a", cell(1, i))
    assert (tmp_path / "a").stat().st_size == 3 * chunk
    assert store.buffered_nbytes == chunk
    store.append("a", cell(60))  # the last 22, from a position that begins no chunk
    assert store.bytes_written == (7 + 3) * chunk
    assert store.bytes_read == 0
    load(store, "a")
    assert store.bytes_read == 3 * chunk
    store.put("a", cell(22), 22, length=49, ring=True)  # five of the first chunk are newer
    assert store.bytes_written == (10 + 3) * chunk
    store.append("a", cell(2))
    assert store.bytes_written == (10 + 3) * chunk
    store.append("a", cell(1))
    assert store.bytes_written == (10 + 4) * chunk
    store.put("a", cell(12), 22, ring=True)
    assert store.bytes_written == (14 + 1) * chunk
    load(store, "a")
    assert store.bytes_read == (3 + 1) * chunk
    store.close()


@pytest.mark.parametrize("mode", ["mapped", "direct", "tensorstore"])
def test_only_the_chunks_that_are_touched_are_renewed(tmp_path, mode):
    store = DiskSequences(tmp_path, DiskContext(mode=mode, chunk_positions=8))
    chunk, row = 4096, np.array([1], np.int32)
    store.put("a", cell(22), 22, length=27, ring=True)  # chunks of 8, 8 and 6; five wait
    written = store.bytes_written
    moved = 0
    for positions, chunks in [(5, 0), (6, 1), (11, 1), (12, 2), (19, 2), (20, 3), (22, 3)]:
        store.renew("a", row, newer(positions))
        moved += chunks * chunk
        assert (store.bytes_read, store.bytes_written - written) == (moved, moved), positions
    store.renew("a", -row, newer(22))
    assert store.bytes_read == moved
    store.close()


def test_any_zarr_reader_finds_a_ring_of_its_capacity(tmp_path):
    store = DiskSequences(tmp_path, DiskContext(mode="tensorstore", chunk_positions=8))
    store.put("a", cell(22), 22, length=22 * 3, ring=True)
    metadata = json.loads((tmp_path / "a" / "0" / "zarr.json").read_text())
    assert metadata["shape"] == [8, 22, 16]
    store.close()


def fill(monkeypatch, store, mode):
    """From now on the disk is full."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if mode == "tensorstore":
        monkeypatch.setattr(store._chunks, "_arrays", full)
    else:
        monkeypatch.setattr(storage.chunks.os, "pwritev", full)


@pytest.mark.parametrize("mode", ["mapped", "direct", "tensorstore"])
def test_a_disk_that_is_full_when_a_ring_goes_round_is_named(tmp_path, monkeypatch, mode):
    store = DiskSequences(tmp_path, DiskContext(mode=mode, chunk_positions=8))
    store.put("cell", cell(22), 22, length=27, ring=True)  # five are in the chunk already
    with monkeypatch.context() as disk:
        fill(disk, store, mode)
        store.append("cell", cell(2))
        before = np.array(load(store, "cell")[0])
        with pytest.raises(StorageError, match=r"cannot write .*cell: No space left on device"):
            store.append("cell", cell(1, 9))
        np.testing.assert_array_equal(np.array(load(store, "cell")[0]), before)
    store.append("cell", cell(1, 9))
    (after,) = load(store, "cell")
    np.testing.assert_array_equal(np.asarray(after)[..., 7:8, :], cell(1, 9)[0])
    store.close()


@pytest.mark.parametrize("mode", ["mapped", "direct", "tensorstore"])
def test_a_disk_that_does_not_take_what_is_renewed_is_named(tmp_path, monkeypatch, mode):
    store = DiskSequences(tmp_path, DiskContext(mode=mode, chunk_positions=8))
    store.put("cell", cell(22), 22, length=27, ring=True)
    before = np.array(load(store, "cell")[0])
    with monkeypatch.context() as disk:
        fill(disk, store, mode)
        with pytest.raises(StorageError, match=r"cannot renew .*cell: No space left on device"):
            store.renew("cell", np.array([1], np.int32), newer(9))
    np.testing.assert_array_equal(np.array(load(store, "cell")[0]), before)
    store.close()


def test_one_thread_may_renew_what_is_in_runs_while_another_one_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.chunks, "_RUN_NBYTES", 4096)
    store = DiskSequences(tmp_path, DiskContext(mode="direct", chunk_positions=8))
    for name in "ab":
        store.put(name, cell(22), 22, length=27, ring=True)
    before = np.array(load(store, "b")[0])
    want = np.array(load(store, "a")[0])
    read = store.bytes_read
    slot = Slot(store.slot_nbytes([1 << 20]))

    def renew():
        for i in range(30):
            store.renew("a", np.array([1], np.int32), newer(20, i))

    with ThreadPoolExecutor(1) as other:
        renewing = other.submit(renew)
        loads = 0
        while loads < 10 or not renewing.done():
            slot.begin()
            np.testing.assert_array_equal(np.array(store.load("b", slot)[0]), before)
            loads += 1
        renewing.result()
    assert store.bytes_read == read + 3 * 4096 * (loads + 30)
    want[1][:, np.arange(7, 27) % 22] = newer(20, 29)[0][0]
    np.testing.assert_array_equal(np.array(load(store, "a")[0]), want)
    store.close()


@pytest.mark.parametrize("mode", ["mapped", "direct", "tensorstore"])
def test_a_full_disk_is_named(tmp_path, monkeypatch, mode):
    store = DiskSequences(tmp_path, DiskContext(mode=mode, chunk_positions=8))
    fill(monkeypatch, store, mode)
    with pytest.raises(StorageError, match=r"cannot write .*cell: No space left on device"):
        store.put("cell", cell(8), 16)
    store.close()


def test_short_and_failing_reads_are_named(tmp_path, monkeypatch):
    store = DiskSequences(tmp_path, DiskContext(mode="direct", chunk_positions=8))
    store.put("cell", cell(16), 32)
    os.truncate(tmp_path / "cell", 4096)
    with pytest.raises(StorageError, match=r"cannot read .*cell: 4096 of 8192 bytes are missing"):
        load(store, "cell")

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage.chunks.os, "preadv", broken)
    with pytest.raises(StorageError, match=r"cannot read .*cell: Input/output error"):
        load(store, "cell")
    store.close()


def test_a_file_system_without_direct_io_is_read_and_written_all_the_same(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *mode, **more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *mode, **more)

    monkeypatch.setattr(storage.chunks.os, "open", refusing)
    store = DiskSequences(tmp_path, DiskContext(mode="direct", chunk_positions=8))
    store.put("cell", cell(16), 32)
    (got,) = load(store, "cell")
    np.testing.assert_array_equal(np.asarray(got)[..., :16, :], cell(16)[0])
    store.close()


def test_the_host_tier_of_this_machine():
    kind = HostSequences if jax.default_backend() == "cpu" else PinnedSequences
    assert isinstance(host_sequences(), kind)


def test_the_host_tier_is_read_where_it_lies():
    store = HostSequences()
    store.put("a", cell(64), 128)
    (array,) = store.load("a", Slot())
    assert array.unsafe_buffer_pointer() == store._groups["a"].arrays[0].ctypes.data
    store.append("a", cell(1, 7))
    np.testing.assert_array_equal(np.asarray(array)[..., 64:65, :], cell(1, 7)[0])


@pytest.mark.parametrize("first", [5, 16, 37])
def test_a_ring_on_the_device_is_written_in_place(first):
    store = DeviceSequences()
    store.put("a", cell(min(first, 16)), 16, length=first, ring=True)
    (where,) = (array.unsafe_buffer_pointer() for array in store.load("a", Slot()))
    for i in range(20):
        store.append("a", cell(1, i))
        (array,) = store.load("a", Slot())
        assert array.unsafe_buffer_pointer() == where
    store.append("a", cell(7))
    (array,) = store.load("a", Slot())
    assert array.unsafe_buffer_pointer() == where


def test_a_ring_on_the_device_is_renewed_in_place_by_one_program():
    store = DeviceSequences()
    store.put("a", cell(16), 16, length=37, ring=True)
    (where,) = (array.unsafe_buffer_pointer() for array in store.load("a", Slot()))
    programs = storage.device._renew._cache_size()
    for i in range(20):
        store.append("a", cell(1, i))
        store.renew("a", np.array([1], np.int32), newer(9, i))
        (array,) = store.load("a", Slot())
        assert array.unsafe_buffer_pointer() == where
    assert storage.device._renew._cache_size() == programs + 1


def test_a_ring_in_pinned_memory_takes_its_capacity_and_no_more():
    store = PinnedSequences(piece=8)
    store.put("a", cell(22), 22, length=45, ring=True)
    for i in range(50):
        store.append("a", cell(1, i))
        store.renew("a", np.array([1], np.int32), newer(9))
        pinned = store._groups["a"]._pieces.values()
        assert sum(array.nbytes for piece in pinned for array in piece) == store.nbytes
        assert {a.sharding.memory_kind for piece in pinned for a in piece} == {"pinned_host"}


class TestWrappers:
    def test_a_log(self):
        lines = []
        store = Logged(HostSequences(), lambda *line: lines.append(line))
        store.put("a", cell(2), 4)
        store.append("a", cell(1))
        store.renew("a", np.array([1], np.int32), newer(1))
        store.load("a", Slot())
        assert lines == [
            ("put", "a", 1024),
            ("append", "a", 512),
            ("renew", "a", 256),
            ("load", "a", 2048),
        ]

    def test_a_ring_is_passed_on(self):
        lines = []
        store = Faulty(Logged(HostSequences(), lambda *line: lines.append(line)), lambda *_: None)
        store.put("a", cell(4), 4, length=6, ring=True)
        store.append("a", cell(1, 1))
        (array,) = store.load("a", Slot())
        np.testing.assert_array_equal(np.asarray(array)[..., 2:3, :], cell(1, 1)[0])
        assert lines[:2] == [("put", "a", 2048), ("append", "a", 512)]

    def test_a_throttle_takes_the_time_of_its_link(self, monkeypatch):
        slept = []
        monkeypatch.setattr("storage.wrappers.time.sleep", slept.append)
        monkeypatch.setattr("storage.wrappers.time.perf_counter", lambda: 100.0)
        store = Throttled(HostSequences(), 512)
        store.put("a", cell(2), 4)
        store.load("a", Slot())
        assert slept == pytest.approx([2.0, 4.0])
        with pytest.raises(ValueError, match="must be positive"):
            Throttled(HostSequences(), 0)

    def test_a_fault_comes_instead_of_the_move(self):
        def fault(verb, name):
            return OSError("broken") if (verb, name) == ("append", "a") else None

        store = Faulty(HostSequences(), fault)
        store.put("a", cell(2), 4)
        with pytest.raises(OSError, match="broken"):
            store.append("a", cell(1))
        (array,) = store.load("a", Slot())
        assert not np.asarray(array)[..., 2:, :].any()


def test_two_threads_may_put(tmp_path):
    """A stage stores its own hidden states, while the one before it hands over others."""
    store = DiskSequences(tmp_path)
    arrays = [jnp.full((4, 2, 64, 64), value, jnp.float32) for value in (1, 2)]
    wrong = []

    def often(value):
        slot = Slot()
        for _ in range(60):
            store.put(f"hidden {value}", (arrays[value],), 64)
            slot.begin(store.slot_nbytes([arrays[value].nbytes]))
            (found,) = store.load(f"hidden {value}", slot)
            wrong.extend([value] * bool((np.asarray(found) != value + 1).any()))

    threads = [threading.Thread(target=often, args=(value,)) for value in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    assert not wrong
