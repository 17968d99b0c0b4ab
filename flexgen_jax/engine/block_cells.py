"""The cells of one block: where each lies, what is on its way to or from it, what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexgen_jax.engine.batch_state import Step
from flexgen_jax.engine.cells import Cells
from flexgen_jax.models.params import unit_kinds
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.cell_layout import (
    CellRoom,
    cache_format,
    cache_name,
    cache_places,
    cache_sizes,
    cell_room,
    hidden_name,
    hidden_nbytes,
)
from scheduling.ops import LoadCache, LoadHidden, StoreCache, StoreHidden
from scheduling.policy import Tier
from scheduling.workload import Workload
from storage.slots import Slot
from storage.store import SequenceStore

Load = LoadCache | LoadHidden
Store = StoreCache | StoreHidden

_NO_SLOT = Slot()


class Kept(NamedTuple):
    """What a computation leaves for a cell of the cache.

    Attributes:
        arrays: Keys and values: of one position of all rows, or of whole prompts.
        length: Positions so far, where the batch begins; None: it goes on.
        capacity: That a rolling batch has from now on.
        joined: Likewise of the prompts of newcomers. ``rows``: where they go; -1: nowhere.
    """

    arrays: tuple[jax.Array, ...]
    length: int | None = None
    capacity: int | None = None
    joined: tuple[jax.Array, ...] = ()
    rows: np.ndarray | None = None


Leaving = Kept | tuple[jax.Array, ...]  # the latter: hidden states


class BlockCell(NamedTuple):
    """What moves at once, and the store that keeps it.

    Attributes:
        sizes: Bytes of each array at its full capacity.
        hosted: Attention to it is computed on the host.
        values: Where the values lie if only some of them will be read.
        room: Its positions at most; of hidden states nobody asks.
    """

    name: str
    store: SequenceStore
    sizes: list[int]
    hosted: bool = False
    values: str | None = None
    room: CellRoom = CellRoom(0, False, False)

    def parts(self, arrays: tuple[jax.Array, ...]) -> list[tuple[str, tuple[jax.Array, ...]]]:
        """What is stored under which name: keys and values apart where they are read so."""
        if self.values is None:
            return [(self.name, arrays)]
        half = len(arrays) // 2
        return [(self.name, arrays[:half]), (self.values, arrays[half:])]

    @property
    def names(self) -> list[str]:
        """Of all parts."""
        return [self.name] if self.values is None else [self.name, self.values]

    def capacity(self, of_batch: int | None) -> int:
        """Its positions while those of a rolling batch are ``of_batch``."""
        whole = self.room.capacity
        return whole if of_batch is None else min(whole, of_batch)

    def begin(self, arrays: tuple[jax.Array, ...], length: int, of_batch: int | None) -> None:
        """Puts the first ``length`` positions, or what a ring keeps of them."""
        ring: dict[str, Any] = {"length": length, "ring": True} if self.room.ring else {}
        for name, part in self.parts(arrays):
            self.store.put(name, part, self.capacity(of_batch), **ring)

    def add(self, kept: Kept) -> None:
        """Puts or appends what was computed."""
        if kept.length is not None:
            self.begin(kept.arrays, kept.length, kept.capacity)
            return
        for name, part in self.parts(kept.arrays):
            if kept.capacity is not None:
                self.store.resize(name, self.capacity(kept.capacity))
            self.store.append(name, part)
        if kept.rows is not None:
            for name, part in self.parts(kept.joined):
                self.store.renew(name, kept.rows, part)


class BlockCells:
    """The cells of a block on the stages that are here.

    Args:
        number: Which block of ``stores`` it is.
        stages: Their numbers.

    Attributes:
        cache: (layer, batch) -> cell. ``hidden``: (stage, batch) -> cell.
        form: How keys and values are kept.
        host: The device for what is computed on the host.
        value_sums: Of sparse attention, by the cell's name: over the values that are visible.
    """

    def __init__(
        self, block: Block, number: int, workload: Workload, stages: Sequence[int], stores: Cells
    ) -> None:
        config, dtype, policy = stores.config, stores.dtype, stores.policy
        self._head = workload.num_layers - 1
        self._rows = [batch.rows for batch in block.batches]
        self._stage_of = [workload.stage_of(layer) for layer in range(workload.num_layers)]
        self.form = cache_format(policy)
        self.host = jax.local_devices(backend="cpu")[0]
        self.cache: dict[tuple[int, int], BlockCell] = {}
        self.hidden: dict[tuple[int, int], BlockCell] = {}
        self.value_sums: dict[str, jax.Array] = {}
        tier_of = {
            cell.name: cell.tier
            for placement in (stores.cache_of[number], stores.hidden_of[number])
            for cell in placement.cells
        }
        for index, batch in enumerate(block.batches):
            name = hidden_name(index)
            whole = hidden_nbytes(batch, config, dtype)
            each = whole // batch.longest_prompt  # of one position of all rows
            # Newcomers are prefilled beside a step of those who are there.
            sizes = [whole] if batch.room is None else [whole, each]
            for stage in stages:
                store = stores.hidden[stage][tier_of[name]]
                self.hidden[stage, index] = BlockCell(name, store, sizes)
        kinds = unit_kinds(config)
        for layer, index in cache_places(block, config):
            stage = self._stage_of[layer]
            if stage not in stages:
                continue
            name = cache_name(config, layer, index)
            tier, batch = tier_of[name], block.batches[index]
            sizes = cache_sizes(batch, config, dtype, self.form, kinds[layer])
            room = cell_room(batch, kinds[layer])
            # A window is attended to as a whole: it is what sparse attention would leave.
            sparse = policy.attention_sparsity < 1 and not room.windowed
            self.cache[layer, index] = BlockCell(
                name,
                stores.cache[stage][tier],
                sizes[: len(sizes) // 2] if sparse else sizes,
                hosted=policy.host_attention and tier is not Tier.DEVICE,
                values=f"{name}.values" if sparse else None,
                room=room,
            )
        # What was loaded for a computation, and what is to be stored after it.
        self._arrived: dict[tuple[type, int, int], tuple[jax.Array, ...]] = {}
        self._slots: dict[tuple[int, int], list[Slot]] = {}
        self._leaving: dict[tuple[type, int, int], Leaving] = {}
        self._with_newcomers: set[str] = set()  # hidden states that newcomers' lie beside

    def of(self, op: Load | Store) -> BlockCell | None:
        """None for what has no cell: the tokens that a step begins and ends with, and a cache
        that nobody will read."""
        if isinstance(op, (LoadCache, StoreCache)):
            return self.cache.get((op.layer, op.batch))
        ends = 0 if isinstance(op, LoadHidden) else self._head
        return None if op.layer == ends else self.hidden[self._stage_of[op.layer], op.batch]

    def load(self, op: Load, slot: Slot) -> None:
        """Brings what ``op`` is about to the device; ``slot`` has been begun.

        Raises:
            KeyError: it was discarded.
            StorageError: the tier could not deliver.
        """
        cell = self.of(op)
        assert cell is not None
        arrays = self._load(cell, slot)
        self._slots.setdefault((op.layer, op.batch), []).append(slot)
        self._arrived[_key(op)] = arrays

    def _load(self, cell: BlockCell, slot: Slot) -> tuple[jax.Array, ...]:
        arrays = cell.store.load(cell.name, slot)
        if cell.name in self._with_newcomers:
            arrays = (*arrays, *cell.store.load(_newcomers(cell.name), slot))
        return arrays

    def seen(self, op: Load) -> tuple[jax.Array, ...]:
        """What was loaded, or what need not be; of hidden states the newcomers' behind them."""
        cell = self.of(op)
        assert cell is not None
        if cell.store.free_load:
            return self._load(cell, _NO_SLOT)
        return self._arrived[_key(op)]

    def taken(self, op: Load) -> tuple[jax.Array, ...]:
        """Likewise; it is there no more."""
        arrays = self.seen(op)
        self.drop(op)
        return arrays

    def drop(self, op: Load) -> None:
        """What was loaded for ``op`` is not needed any more."""
        self._arrived.pop(_key(op), None)

    def read(self, layer: int, batch: int, markers: Sequence[jax.Array]) -> None:
        """``markers`` are ready when what was loaded for the computation has been read."""
        for slot in self._slots.pop((layer, batch), ()):
            slot.release(markers)

    def leaving(self, op: Store) -> Leaving | None:
        """What waits to be stored; it waits no more."""
        return self._leaving.pop(_key(op), None)

    def wait(self, op: Store) -> None:
        """Until what is to be stored has been computed."""
        jax.block_until_ready(self._leaving.get(_key(op)))

    def keep(self, op: Store, leaving: Leaving) -> None:
        """Has it wait until ``op`` comes."""
        self._leaving[_key(op)] = leaving

    def store(self, op: Store, leaving: Leaving | None) -> None:
        """Puts what was computed where it is kept.

        Raises:
            KeyError: the cell was discarded.
        """
        cell = self.of(op)
        if cell is None or leaving is None:
            return
        if isinstance(leaving, Kept):
            cell.add(leaving)
        else:
            self._put_hidden(cell, leaving)

    def _put_hidden(self, cell: BlockCell, arrays: tuple[jax.Array, ...]) -> None:
        names = cell.name, _newcomers(cell.name)
        for name, array in zip(names, arrays, strict=False):
            cell.store.put(name, (array,), array.shape[-2])
        if len(arrays) == len(names):
            self._with_newcomers.add(cell.name)
        elif cell.name in self._with_newcomers:
            self._with_newcomers.discard(cell.name)
            cell.store.discard(names[1])

    def arrive(self, stage: int, batch: int, arrays: tuple[jax.Array, ...]) -> None:
        """Keeps hidden states that another stage has handed over."""
        cell = self.hidden.get((stage, batch))
        if cell is None:
            return
        self._put_hidden(cell, arrays)
        if cell.store.free_store:  # dispatched is not done
            jax.block_until_ready(self._load(cell, _NO_SLOT))

    def discard(self, cell: BlockCell) -> None:
        """Gives its room back."""
        for name in cell.names:
            cell.store.discard(name)
        self.value_sums.pop(cell.name, None)
        if cell.name in self._with_newcomers:
            cell.store.discard(_newcomers(cell.name))
            self._with_newcomers.discard(cell.name)

    def discard_layer(self, layer: int) -> None:
        """Gives back the room of the cache of a layer."""
        for (number, _), cell in self.cache.items():
            if number == layer:
                self.discard(cell)

    def leave(self, batch: int) -> None:
        """The batch's cells make room at once."""
        for (_, number), cell in (*self.hidden.items(), *self.cache.items()):
            if number == batch:
                self.discard(cell)
        for key in [k for k in list(self._leaving) if k[2] == batch]:
            self._leaving.pop(key, None)

    def forget(self) -> None:
        """Drops what is on its way."""
        for kept in (self._arrived, self._slots, self._leaving):
            kept.clear()

    def positions(self, layer: int, batch: int, now: Step) -> list[np.ndarray]:
        """What a cell has after the batch's step ``now``, before the next one, copied.

        Returns:
            Of each array (rows, heads, positions, dim), in the order of the columns: those that
            there are, at most as many as the cell keeps.
        """
        cell = self.cache[layer, batch]
        capacity = cell.capacity(now.capacity)
        count = min(now.column + 1, capacity)
        index = np.arange(now.column + 1 - count, now.column + 1) % capacity
        slot, arrays = Slot(), []
        for name in cell.names:
            slot.begin(cell.store.slot_nbytes(cell.sizes))
            # Copied: the slot is used again.
            loaded = cell.store.load(name, slot)
            arrays += [np.take(np.asarray(array), index, axis=-2) for array in loaded]
        return arrays

    def begin(
        self, layer: int, batch: int, arrays: Sequence[np.ndarray], now: Step, device: Any
    ) -> None:
        """Fills a cell with the newest positions, as :meth:`positions` gives them.

        Args:
            now: The batch's step, which is over.
            device: Of the layer's stage.
        """
        cell = self.cache[layer, batch]
        capacity, length = cell.capacity(now.capacity), now.column + 1
        count = min(length, capacity)
        home = self.host if cell.hosted else device
        there = []
        for array in arrays:
            have = array.shape[-2]
            array = array[..., max(0, have - count) :, :]
            if have < count:
                room = [(0, 0)] * (array.ndim - 2) + [(count - have, 0), (0, 0)]
                array = np.pad(array, room)
            shift = (length - count) % capacity
            there.append(jnp.array(np.roll(array, shift, axis=-2), device=home))
        cell.begin(tuple(there), length, now.capacity)

    def set_value_sum(self, layer: int, batch: int, value_sum: np.ndarray, device: Any) -> None:
        """Of a cell that sparse attention attends to; ``device``: of the layer's stage."""
        cell = self.cache[layer, batch]
        home = self.host if cell.hosted else device
        self.value_sums[cell.name] = jnp.array(value_sum, device=home)

    def num_rows(self, batch: int) -> int:
        """Of a batch."""
        return self._rows[batch]

    def homes(self, devices: Mapping[int, Any]) -> dict[int, Any]:
        """Layer -> the device of its stage, of ``devices``, for layers with a cache."""
        return {layer: devices[self._stage_of[layer]] for layer, _ in self.cache}


def _newcomers(name: str) -> str:
    """Where the hidden states of newcomers lie, beside those of ``name``."""
    return f"{name}.newcomers"


def _key(op: Load | Store) -> tuple[type, int, int]:
    return type(op), op.layer, op.batch
