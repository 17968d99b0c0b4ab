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


def _values(seed: int, positions: int, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Two arrays (batch 2, heads 3, seq, dim) of different dims."""
    keys = jax.random.split(jax.random.key(seed))
    return tuple(  # type: ignore[return-value]
        jax.random.normal(k, (2, 3, positions, dim), jnp.float32).astype(dtype)
        for k, dim in zip(keys, (4, 5), strict=True)
    )


class SequenceStoreContract:
    """What a :class:`SequenceStore` must do."""

    def load(self, store: Any, name: str, sizes: tuple[int, ...] = (8192, 8192)) -> list[Any]:
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

    def test_it_keeps_the_contract(self, store: Any) -> None:
        assert isinstance(store, SequenceStore)
        assert store.nbytes == 0

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("first", [1, 7, 8, 19, 30])
    def test_what_grows_comes_back_bit_by_bit(self, store: Any, first: int, dtype: str) -> None:
        whole = _values(0, 30, dtype)
        store.put("a", [w[..., :first, :] for w in whole], 30)
        for end in range(first, 31):
            if end > first:
                store.append("a", [w[..., end - 1 : end, :] for w in whole])
            if end % 5 == 0 or end in (first, first + 1):
                self.check(store, "a", tuple(w[..., :end, :] for w in whole), 30)

    def test_many_positions_may_come_at_once(self, store: Any) -> None:
        whole = _values(1, 40)
        cuts = [0, 3, 20, 21, 40]
        for start, end in itertools.pairwise(cuts):
            part = [w[..., start:end, :] for w in whole]
            if start == 0:
                store.put("a", part, 40)
            else:
                store.append("a", part)
            self.check(store, "a", tuple(w[..., :end, :] for w in whole), 40)

    def test_names_do_not_mix(self, store: Any) -> None:
        for seed, name in enumerate("abc"):
            store.put(name, _values(seed, 6), 12)
        store.append("b", _values(9, 2))
        for seed, name in enumerate("abc"):
            self.check(store, name, _values(seed, 6), 12)

    def test_put_replaces_what_was(self, store: Any) -> None:
        store.put("a", _values(0, 20), 24)
        store.append("a", _values(1, 4))
        store.put("a", _values(2, 9), 24)
        self.check(store, "a", _values(2, 9), 24)
        store.put("a", _values(3, 5), 5)
        self.check(store, "a", _values(3, 5), 5)
        with pytest.raises(StorageError, match="room for 5"):
            store.append("a", _values(4, 1))

    def test_more_than_the_capacity_is_refused_by_name(self, store: Any) -> None:
        with pytest.raises(StorageError, match="cell has room for 4 positions: 0 are filled and 5"):
            store.put("cell", _values(0, 5), 4)
        store.put("cell", _values(0, 3), 4)
        with pytest.raises(StorageError, match="3 are filled and 2 more came"):
            store.append("cell", _values(0, 2))

    def test_bytes_are_counted_at_full_capacity_and_given_back(self, store: Any) -> None:
        store.put("a", _values(0, 3), 16)
        store.put("b", _values(1, 3), 16)
        assert store.nbytes == 2 * 6 * 16 * (4 + 5) * 4
        store.discard("a")
        store.discard("never there")
        assert store.nbytes == 6 * 16 * (4 + 5) * 4
        with pytest.raises(KeyError):
            self.load(store, "a")
        with pytest.raises(KeyError):
            store.append("a", _values(0, 1))
        store.put("a", _values(5, 4), 16)
        self.check(store, "a", _values(5, 4), 16)
