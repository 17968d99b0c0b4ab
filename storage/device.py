"""The device tier: arrays that already are where computation wants them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from storage.ring_index import resized_index, spans
from storage.slots import Slot
from storage.store import check_capacity, check_renewal, check_resize, sequence_length


class DeviceStore:
    """Arrays resident on ``device``; loading hands them out as they are."""

    def __init__(self, device: Any = None) -> None:
        self._device = device or jax.local_devices()[0]
        self._arrays: dict[str, jax.Array] = {}

    def put(self, name: str, array: np.ndarray) -> None:
        """Moves ``array`` to the device; aligned host memory is aliased, not copied, on a CPU."""
        self._arrays[name] = jax.block_until_ready(jax.device_put(array, self._device))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def slot_nbytes(self, names: Sequence[str]) -> int:
        return 0

    def load(self, names: Sequence[str], slot: Slot) -> dict[str, jax.Array]:
        return {name: self._arrays[name] for name in names}

    def take(self, name: str, rows: np.ndarray) -> jax.Array:
        return take_rows(self._arrays[name], rows)

    def close(self) -> None:
        self._arrays.clear()


@jax.jit
def take_rows(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """``matrix[rows]``"""
    return matrix[rows]


@dataclasses.dataclass
class _Group:
    arrays: tuple[jax.Array, ...]
    length: int
    capacity: int
    ring: bool
    shared: bool  # the caller may still read the arrays


class DeviceSequences:
    """Sequences resident on ``device``. Storing is dispatch only: it never waits.

    What comes from another device is brought here.
    """

    free_load = free_store = True

    def __init__(self, device: Any = None) -> None:
        self._device = device or jax.local_devices()[0]
        self._groups: dict[str, _Group] = {}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for group in list(self._groups.values()) for array in group.arrays)

    def slot_nbytes(self, sizes: Sequence[int]) -> int:
        return 0

    def put(
        self,
        name: str,
        arrays: Sequence[jax.Array],
        capacity: int,
        *,
        length: int | None = None,
        ring: bool = False,
    ) -> None:
        length = sequence_length(name, arrays, capacity, length, ring)
        arrays = self._here(arrays)
        if length < capacity:
            whole = grow(arrays, capacity)
        elif ring:
            # A full ring is still written to, in place: the caller's arrays stay what they are.
            whole = tuple(array.copy() for array in arrays)
        else:
            whole = arrays
        self._groups[name] = _Group(whole, length, capacity, ring, whole is arrays)

    def _here(self, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        if self._device in arrays[0].devices():
            return tuple(arrays)
        return jax.device_put(tuple(arrays), self._device)

    def append(self, name: str, arrays: Sequence[jax.Array]) -> None:
        group, more = self._groups[name], arrays[0].shape[-2]
        if not group.ring:
            check_capacity(name, group.length, more, group.capacity)
        for start, source, size in spans(group.length, more, group.capacity):
            part = tuple(arrays)
            if size < more:
                part = tuple(array[..., source : source + size, :] for array in arrays)
            group.arrays = _write(group.arrays, part, np.int32(start))
        group.length += more

    def renew(self, name: str, rows: np.ndarray, arrays: Sequence[jax.Array]) -> None:
        group, positions = self._groups[name], arrays[0].shape[-2]
        check_renewal(name, positions, group.length, group.capacity)
        if group.shared:
            group.arrays = tuple(array.copy() for array in group.arrays)
            group.shared = False
        if (rows < 0).all():
            return
        # What goes nowhere: another row's once more.
        source = np.where(rows < 0, rows.argmax(), np.arange(len(rows))).astype(np.int32)
        start = np.int32((group.length - positions) % group.capacity)
        new = self._here(arrays)
        group.arrays = _renew(group.arrays, rows[source], source, new, start)

    def resize(self, name: str, capacity: int) -> None:
        group = self._groups[name]
        check_resize(name, group.ring, capacity)
        if capacity == group.capacity:
            return
        index = resized_index(group.length, group.capacity, capacity)
        group.arrays = gathered(group.arrays, index)
        group.capacity, group.shared = capacity, False

    def load(self, name: str, slot: Slot) -> tuple[jax.Array, ...]:
        return self._groups[name].arrays

    def take(self, name: str, index: jax.Array) -> tuple[jax.Array, ...]:
        return take_positions(self._groups[name].arrays, index)

    def discard(self, name: str) -> None:
        self._groups.pop(name, None)

    def close(self) -> None:
        self._groups.clear()


def _codes(x: jax.Array) -> jax.Array:
    """Floats of 16 bits as integers, all others as they are.

    What is moved within bfloat16 is moved within a copy of the whole in float32 by XLA's CPU
    backend.
    """
    floats = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if floats else x


def _floats(codes: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of :func:`_codes`."""
    return codes if codes.dtype == dtype else jax.lax.bitcast_convert_type(codes, dtype)


@jax.jit
def take_positions(arrays: tuple[jax.Array, ...], index: jax.Array) -> tuple[jax.Array, ...]:
    """``array[..., index[..., i], :]`` of each array."""
    return tuple(jnp.take_along_axis(a, index[..., None], axis=-2) for a in arrays)


@jax.jit
def gathered(arrays: tuple[jax.Array, ...], index: jax.Array) -> tuple[jax.Array, ...]:
    """``array[..., index, :]`` of each array."""
    return tuple(_floats(jnp.take(_codes(a), index, axis=-2, mode="clip"), a.dtype) for a in arrays)


@partial(jax.jit, static_argnums=1)
def grow(arrays: tuple[jax.Array, ...], capacity: int) -> tuple[jax.Array, ...]:
    """The arrays with zeros after their sequences, up to ``capacity`` positions."""

    def padded(x: jax.Array) -> jax.Array:
        room = capacity - x.shape[-2]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, room), (0, 0)])

    return tuple(map(padded, arrays))


@partial(jax.jit, donate_argnums=0)
def _write(
    arrays: tuple[jax.Array, ...], more: tuple[jax.Array, ...], start: jax.Array
) -> tuple[jax.Array, ...]:
    """In place: the arrays are donated."""

    def written(a: jax.Array, m: jax.Array) -> jax.Array:
        codes = jax.lax.dynamic_update_slice_in_dim(_codes(a), _codes(m), start, axis=a.ndim - 2)
        return _floats(codes, a.dtype)

    return tuple(map(written, arrays, more))


@partial(jax.jit, donate_argnums=0)
def _renew(
    arrays: tuple[jax.Array, ...],
    rows: jax.Array,
    source: jax.Array,
    new: tuple[jax.Array, ...],
    start: jax.Array,
) -> tuple[jax.Array, ...]:
    """``new[source]`` in ``rows`` from ``start`` on, round the ring's end; in place, as
    :func:`_write`.

    Row by row, and all of a row, where the other positions mean nothing: XLA's CPU backend has
    nothing else that stays in place with 16 bits. Where the ring ends is a value, so it takes no
    program of its own.
    """

    def renewed(a: jax.Array, n: jax.Array) -> jax.Array:
        positions = n.shape[-2]
        index = jnp.minimum((jnp.arange(a.shape[-2]) - start) % a.shape[-2], positions - 1)

        def one(number: jax.Array, a: jax.Array) -> jax.Array:
            at = source[number]
            part = jax.lax.dynamic_index_in_dim(_codes(n), at, 0)
            whole = jnp.take(part, index, axis=-2)
            codes = jax.lax.dynamic_update_slice_in_dim(_codes(a), whole, rows[number], 0)
            return _floats(codes, a.dtype)

        return jax.lax.fori_loop(0, rows.shape[0], one, a)

    return tuple(map(renewed, arrays, new))
