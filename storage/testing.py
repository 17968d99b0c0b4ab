"""The contract suites: what every store must do, whatever the tier.

Inherit from one and give it a ``store`` fixture; pytest runs the rest. For the stores here, and for
whoever writes another.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storage.slots import Slot
from storage.store import SequenceStore, StorageError


def _values(seed: int, positions: int, dtype: Any = jnp.float32) -> tuple[np.ndarray, ...]:
    """Two arrays (batch 2, heads 3, seq, dim) of different dims.

    On the host: cut there, they take no program for each of their shapes.
    """
    rng = np.random.default_rng(seed)
    made = (rng.normal(size=(2, 3, positions, dim)) for dim in (4, 5))
    return tuple(array.astype(jnp.dtype(dtype)) for array in made)


def _given(arrays: Any) -> list[jax.Array]:
    """As a store is given them."""
    return [jnp.asarray(array) for array in arrays]


def _codes(seed: int, positions: int) -> list[np.ndarray]:
    """Quantized keys, values and their scales: of several dtypes and dims."""
    rng = np.random.default_rng(seed)
    kinds = [(np.int8, 4), (np.uint8, 5), (jnp.bfloat16, 1)]
    return [rng.integers(0, 99, (2, 3, positions, dim)).astype(dtype) for dtype, dim in kinds]


def _numbers(seed: int, positions: int) -> list[np.ndarray]:
    """As :func:`_values`, to be written to."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(2, 3, positions, dim)).astype(np.float32) for dim in (4, 5)]


# What is renewed, as rows and positions: few shapes, since the device compiles one program each.
RENEWALS = [((1,), 5), ((-1, 0), 5), ((1, 0), 20), ((0,), 5), ((-1,), 5)]


def in_ring_order(sequence: np.ndarray, capacity: int) -> np.ndarray:
    """The last ``capacity`` positions of a whole sequence, position p at index p % capacity."""
    length = sequence.shape[-2]
    positions = np.arange(max(0, length - capacity), length)
    ring = np.empty((*sequence.shape[:-2], len(positions), sequence.shape[-1]), sequence.dtype)
    ring[..., positions % capacity, :] = sequence[..., positions, :]
    return ring


class SequenceStoreContract:
    """What a :class:`SequenceStore` must do."""

    def load(self, store: Any, name: str, sizes: tuple[int, ...] = (8192,) * 3) -> list[Any]:
        slot = Slot(max(1, store.slot_nbytes(sizes)))
        slot.begin()
        return [np.array(array) for array in store.load(name, slot)]

    def check(self, store: Any, name: str, expected: tuple[Any, ...], capacity: int) -> None:
        loaded = self.load(store, name)
        assert len(loaded) == len(expected)
        for got, want in zip(loaded, expected, strict=True):
            assert got.dtype == want.dtype
            assert got.shape == (*want.shape[:-2], capacity, want.shape[-1])
            np.testing.assert_array_equal(got[..., : want.shape[-2], :], np.asarray(want))
            assert np.isfinite(got.astype(np.float32)).all()

    def put_ring(self, store: Any, name: str, whole: Any, length: int, capacity: int) -> None:
        ring = [in_ring_order(np.asarray(w)[..., :length, :], capacity) for w in whole]
        store.put(name, _given(ring), capacity, length=length, ring=True)

    def append(self, store: Any, name: str, whole: Any, start: int, end: int) -> None:
        store.append(name, _given(w[..., start:end, :] for w in whole))

    def check_ring(self, store: Any, name: str, whole: Any, length: int, capacity: int) -> None:
        ring = tuple(in_ring_order(np.asarray(w)[..., :length, :], capacity) for w in whole)
        self.check(store, name, ring, capacity)

    def test_it_keeps_the_contract(self, store: Any) -> None:
        assert isinstance(store, SequenceStore)
        assert store.nbytes == 0

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("first", [1, 7, 8, 19, 30])
    def test_what_grows_comes_back_bit_by_bit(self, store: Any, first: int, dtype: str) -> None:
        whole = _values(0, 30, dtype)
        store.put("a", _given(w[..., :first, :] for w in whole), 30)
        for end in range(first, 31):
            if end > first:
                store.append("a", _given(w[..., end - 1 : end, :] for w in whole))
            if end % 5 == 0 or end in (first, first + 1):
                self.check(store, "a", tuple(w[..., :end, :] for w in whole), 30)

    def test_many_positions_may_come_at_once(self, store: Any) -> None:
        whole = _values(1, 40)
        cuts = [0, 3, 20, 21, 40]
        for start, end in itertools.pairwise(cuts):
            part = _given(w[..., start:end, :] for w in whole)
            if start == 0:
                store.put("a", part, 40)
            else:
                store.append("a", part)
            self.check(store, "a", tuple(w[..., :end, :] for w in whole), 40)

    def test_names_do_not_mix(self, store: Any) -> None:
        for seed, name in enumerate("abc"):
            store.put(name, _given(_values(seed, 6)), 12)
        store.append("b", _given(_values(9, 2)))
        for seed, name in enumerate("abc"):
            self.check(store, name, _values(seed, 6), 12)

    def test_put_replaces_what_was(self, store: Any) -> None:
        store.put("a", _given(_values(0, 20)), 24)
        store.append("a", _given(_values(1, 4)))
        store.put("a", _given(_values(2, 9)), 24)
        self.check(store, "a", _values(2, 9), 24)
        store.put("a", _given(_values(3, 5)), 5)
        self.check(store, "a", _values(3, 5), 5)
        with pytest.raises(StorageError, match="room for 5"):
            store.append("a", _given(_values(4, 1)))
        for first in (8, 3, 8):
            store.put("a", _given(_values(5, first)), 8)
            self.check(store, "a", _values(5, first), 8)

    def test_more_than_the_capacity_is_refused_by_name(self, store: Any) -> None:
        with pytest.raises(StorageError, match="cell has room for 4 positions: 0 are filled and 5"):
            store.put("cell", _given(_values(0, 5)), 4)
        store.put("cell", _given(_values(0, 3)), 4)
        with pytest.raises(StorageError, match="3 are filled and 2 more came"):
            store.append("cell", _given(_values(0, 2)))

    def test_bytes_are_counted_at_full_capacity_and_given_back(self, store: Any) -> None:
        store.put("a", _given(_values(0, 3)), 16)
        store.put("b", _given(_values(1, 3)), 16)
        assert store.nbytes == 2 * 6 * 16 * (4 + 5) * 4
        store.discard("a")
        store.discard("never there")
        assert store.nbytes == 6 * 16 * (4 + 5) * 4
        with pytest.raises(KeyError):
            self.load(store, "a")
        with pytest.raises(KeyError):
            store.append("a", _given(_values(0, 1)))
        store.put("a", _given(_values(5, 4)), 16)
        self.check(store, "a", _values(5, 4), 16)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("capacity", [1, 5, 8, 20])
    def test_a_ring_keeps_the_last_positions(self, store: Any, capacity: int, dtype: str) -> None:
        whole = _values(0, 2 * capacity + 3, dtype)
        first = min(3, capacity)
        self.put_ring(store, "a", whole, first, capacity)
        self.check_ring(store, "a", whole, first, capacity)
        for end in range(first + 1, 2 * capacity + 4):
            self.append(store, "a", whole, end - 1, end)
            self.check_ring(store, "a", whole, end, capacity)

    @pytest.mark.parametrize("capacity", [1, 7, 16, 20])
    def test_many_positions_may_cross_the_end_of_a_ring(self, store: Any, capacity: int) -> None:
        whole = _values(1, 12 * capacity + 12)
        steps = [1, 2, capacity - 1, capacity, 5, capacity + 1, 2, 2 * capacity + 3, capacity, 4]
        self.put_ring(store, "a", whole, 1, capacity)
        length = 1
        for step in steps:
            self.append(store, "a", whole, length, length + step)
            length += step
            self.check_ring(store, "a", whole, length, capacity)

    def test_a_ring_that_is_not_full_may_be_overrun_at_once(self, store: Any) -> None:
        whole = _values(2, 60)
        self.put_ring(store, "a", whole, 2, 20)
        self.append(store, "a", whole, 2, 57)
        self.check_ring(store, "a", whole, 57, 20)
        self.append(store, "a", whole, 57, 60)
        self.check_ring(store, "a", whole, 60, 20)

    @pytest.mark.parametrize("capacity", [1, 8, 11, 20])
    def test_a_ring_may_begin_with_more_than_it_holds(self, store: Any, capacity: int) -> None:
        whole = _values(3, 2 * capacity + 10)
        for length in range(capacity, 2 * capacity + 1):
            self.put_ring(store, "a", whole, length, capacity)
            self.check_ring(store, "a", whole, length, capacity)
            self.append(store, "a", whole, length, length + 1)
            self.check_ring(store, "a", whole, length + 1, capacity)
            self.append(store, "a", whole, length + 1, length + 10)
            self.check_ring(store, "a", whole, length + 10, capacity)

    @pytest.mark.parametrize("capacity", [16, 20])
    def test_a_name_may_become_a_ring_and_no_ring_again(self, store: Any, capacity: int) -> None:
        whole = _values(4, 3 * capacity)
        for length in (2 * capacity + 3, 5, capacity):
            self.put_ring(store, "a", whole, length, capacity)
            self.append(store, "a", whole, length, length + 4)
            self.check_ring(store, "a", whole, length + 4, capacity)
            line = _values(length, capacity)
            store.put("a", _given(x[..., :3, :] for x in line), capacity)
            self.append(store, "a", line, 3, capacity)
            self.check(store, "a", line, capacity)
            with pytest.raises(StorageError, match=f"room for {capacity}"):
                self.append(store, "a", line, 0, 1)
            store.put("a", _given(line), capacity)
            self.check(store, "a", line, capacity)

    def test_what_is_taken_lies_at_these_indices(self, store: Any) -> None:
        whole = _values(5, 50)
        index = np.random.default_rng(0).integers(0, 20, (2, 3, 6)).astype(np.int32)

        def check(kept: list[np.ndarray]) -> None:
            taken = store.take("a", jnp.asarray(index))
            for got, array in zip(taken, kept, strict=True):
                want = np.take_along_axis(array, index[..., None], axis=-2)
                np.testing.assert_array_equal(np.array(got), want)

        store.put("a", _given(w[..., :20, :] for w in whole), 24)
        check([np.asarray(w) for w in whole])
        self.put_ring(store, "a", whole, 18, 20)
        for start, end in itertools.pairwise([18, 20, 21, 33, 50]):
            self.append(store, "a", whole, start, end)
            check([in_ring_order(np.asarray(w)[..., :end, :], 20) for w in whole])

    @pytest.mark.parametrize("length", [5, 8, 11])
    def test_what_a_ring_was_put_from_stays_as_it_is(self, store: Any, length: int) -> None:
        given = _given(_values(6, min(length, 8)))
        store.put("a", given, 8, length=length, ring=True)
        for seed in range(9):
            store.append("a", _given(_values(seed, 1)))
        for array, want in zip(given, _values(6, min(length, 8)), strict=True):
            np.testing.assert_array_equal(np.asarray(array), np.asarray(want))

    def test_rings_count_their_capacity_and_mix_with_nothing(self, store: Any) -> None:
        whole = _values(7, 40)
        self.put_ring(store, "a", whole, 33, 16)
        store.put("b", _given(_values(8, 3)), 16)
        self.put_ring(store, "c", whole, 2, 16)
        assert store.nbytes == 3 * 6 * 16 * (4 + 5) * 4
        self.append(store, "a", whole, 33, 40)
        self.check_ring(store, "a", whole, 40, 16)
        self.check(store, "b", _values(8, 3), 16)
        self.check_ring(store, "c", whole, 2, 16)
        store.discard("a")
        assert store.nbytes == 2 * 6 * 16 * (4 + 5) * 4
        with pytest.raises(KeyError):
            self.append(store, "a", whole, 0, 1)

    def test_arrays_that_do_not_have_the_length_are_refused(self, store: Any) -> None:
        with pytest.raises(ValueError, match="cell has arrays of 5 positions and a length of 6"):
            store.put("cell", _given(_values(0, 5)), 8, length=6)
        with pytest.raises(ValueError, match=r"expected arrays of 6 positions .* got 5"):
            store.put("cell", _given(_values(0, 5)), 8, length=6, ring=True)
        with pytest.raises(ValueError, match=r"expected arrays of 4 positions .* got 5"):
            store.put("cell", _given(_values(0, 5)), 4, ring=True)
        with pytest.raises(ValueError, match="ring of 0 positions"):
            store.put("cell", _given(_values(0, 5)), 0, ring=True)
        store.put("cell", _given(_values(0, 5)), 8, length=5)
        self.check(store, "cell", _values(0, 5), 8)

    def renew(
        self, store: Any, whole: list[np.ndarray], length: int, rows: Any, new: list[np.ndarray]
    ) -> None:
        """Renews rows of "a", and of ``whole``, which has what "a" should."""
        store.renew("a", np.array(rows, np.int32), [jnp.asarray(n) for n in new])
        for array, values, got in zip(whole, new, self.load(store, "a"), strict=True):
            capacity, oldest = got.shape[-2], length - values.shape[-2]
            older = np.arange(max(0, length - capacity), oldest)
            for row, value in zip(rows, values, strict=True):
                if row >= 0:
                    array[row, :, oldest:length] = value
                    array[row, :, older] = got[row][:, older % capacity].swapaxes(0, 1)

    def new(self, source: list[np.ndarray], rows: Any, positions: int, at: int) -> list[np.ndarray]:
        """Values of ``source`` for some rows."""
        return [np.roll(s, at, axis=-2)[: len(rows), :, :positions] for s in source]

    @pytest.mark.parametrize("make", [_numbers, _codes])
    def test_rows_of_a_ring_are_renewed(self, store: Any, make: Any) -> None:
        capacity = 20
        whole, source = make(0, 64), make(1, 64)
        for first in (6, 33):
            self.put_ring(store, "a", whole, first, capacity)
            for length in range(first + 1, first + 26):
                self.append(store, "a", whole, length - 1, length)
                rows, positions = RENEWALS[length % len(RENEWALS)]
                if positions <= length:
                    new = self.new(source, rows, positions, length)
                    self.renew(store, whole, length, rows, new)
                    self.check_ring(store, "a", whole, length, capacity)

    def test_rows_of_what_does_not_wrap_are_renewed(self, store: Any) -> None:
        whole, source = _numbers(0, 30), _numbers(1, 30)
        store.put("a", _given(w[..., :11, :] for w in whole), 30)
        for length in range(12, 31):
            self.append(store, "a", whole, length - 1, length)
            rows, positions = RENEWALS[length % len(RENEWALS)]
            if positions <= length:
                self.renew(store, whole, length, rows, self.new(source, rows, positions, length))
                self.check(store, "a", tuple(w[..., :length, :] for w in whole), 30)

    def test_what_cannot_grow_is_renewed_and_what_it_was_put_from_is_not(self, store: Any) -> None:
        whole = _numbers(2, 20)
        given = [jnp.asarray(w) for w in whole]
        store.put("a", given, 20)
        for rows, positions in RENEWALS[:2]:
            self.renew(store, whole, 20, rows, self.new(_numbers(3, 20), rows, positions, 0))
            self.check(store, "a", tuple(whole), 20)
        for array, want in zip(given, _numbers(2, 20), strict=True):
            np.testing.assert_array_equal(np.asarray(array), want)

    @pytest.mark.parametrize("capacity", [5, 20])
    def test_what_is_renewed_is_overwritten_by_a_lap_and_a_put(
        self, store: Any, capacity: int
    ) -> None:
        whole = _numbers(4, 80)
        for length in (27, 35):
            self.put_ring(store, "a", whole, length, capacity)
            self.renew(store, whole, length, (1, 0), self.new(_numbers(5, 80), (1, 0), capacity, 0))
            self.check_ring(store, "a", whole, length, capacity)
            self.append(store, "a", whole, length, length + 3)
            self.check_ring(store, "a", whole, length + 3, capacity)
            self.append(store, "a", whole, length + 3, length + 3 + capacity)
            self.check_ring(store, "a", whole, length + 3 + capacity, capacity)

    def test_no_other_name_is_renewed(self, store: Any) -> None:
        whole, other = _numbers(6, 33), _numbers(7, 33)
        for name, values in {"a": whole, "b": other}.items():
            self.put_ring(store, name, values, 33, 20)
        self.renew(store, whole, 33, (1,), self.new(_numbers(8, 33), (1,), 5, 0))
        self.check_ring(store, "a", whole, 33, 20)
        self.check_ring(store, "b", other, 33, 20)

    def test_positions_that_are_not_kept_cannot_be_renewed(self, store: Any) -> None:
        whole, rows = _numbers(9, 33), np.array([1], np.int32)
        new = [jnp.asarray(w[:1, :, :21]) for w in whole]
        with pytest.raises(KeyError):
            store.renew("a", rows, new)
        self.put_ring(store, "a", whole, 33, 20)
        store.put("b", _given(w[..., :20, :] for w in whole), 30)
        for name in "ab":
            with pytest.raises(ValueError, match=f"{name} keeps 20 positions: 21 cannot"):
                store.renew(name, rows, new)
        self.check_ring(store, "a", whole, 33, 20)
        self.check(store, "b", tuple(w[..., :20, :] for w in whole), 30)

    @pytest.mark.parametrize("length", [3, 9, 33])
    def test_a_ring_gets_another_capacity(self, store: Any, length: int) -> None:
        whole, kept = _values(0, 90), 12
        self.put_ring(store, "a", whole, length, kept)
        for capacity in (20, 8, 8, 13, 1, 24):
            kept = min(kept, capacity)
            store.resize("a", capacity)
            assert store.nbytes == 6 * capacity * (4 + 5) * 4
            for more in (0, 2, 1):
                if more:
                    self.append(store, "a", whole, length, length + more)
                length, kept = length + more, min(kept + more, capacity)
                self.check_newest(store, "a", whole, length, capacity, min(kept, length))

    def test_what_a_ring_was_put_from_stays_when_it_is_resized(self, store: Any) -> None:
        given = _given(_values(6, 8))
        store.put("a", given, 8, ring=True)
        store.resize("a", 5)
        for seed in range(7):
            store.append("a", _given(_values(seed, 1)))
        for array, want in zip(given, _values(6, 8), strict=True):
            np.testing.assert_array_equal(np.asarray(array), np.asarray(want))

    def test_only_a_ring_has_another_capacity(self, store: Any) -> None:
        with pytest.raises(KeyError):
            store.resize("a", 5)
        store.put("a", _given(_values(0, 5)), 8)
        with pytest.raises(ValueError, match="a is not a ring"):
            store.resize("a", 16)
        self.put_ring(store, "a", _values(0, 5), 5, 8)
        with pytest.raises(ValueError, match="a cannot have a capacity of 0 positions"):
            store.resize("a", 0)
        self.check_ring(store, "a", _values(0, 5), 5, 8)

    def check_newest(
        self, store: Any, name: str, whole: Any, length: int, capacity: int, kept: int
    ) -> None:
        """That a ring has the last ``kept`` positions of ``whole[..., :length, :]``."""
        at = np.arange(length - kept, length)
        for got, array in zip(self.load(store, name), whole, strict=True):
            assert got.shape[-2] == capacity
            assert np.isfinite(np.asarray(got)).all()
            np.testing.assert_array_equal(
                np.asarray(got)[..., at % capacity, :], np.asarray(array)[..., at, :]
            )
