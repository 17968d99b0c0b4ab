"""The cells of one block: where each lies, what is on its way to or from it, what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexgen_jax.engine.batch_state import BatchState
from flexgen_jax.engine.cells import Cells
from flexgen_jax.engine.snapshots import Arrays
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


class BlockCell(NamedTuple):
    """What moves at once, and the store that keeps it.

    Attributes:
        sizes: Bytes of each array at its full capacity.
        hosted: Attention to it is computed on the host.
        values: Where the values lie if only some of them will be read.
        room: Its positions; of hidden states nobody asks.
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

    def begin(self, arrays: tuple[jax.Array, ...], length: int) -> None:
        """Puts the first ``length`` positions, or what a ring keeps of them."""
        ring: dict[str, Any] = {"length": length, "ring": True} if self.room.ring else {}
        for name, part in self.parts(arrays):
            self.store.put(name, part, self.room.capacity, **ring)


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
            sizes = [hidden_nbytes(batch, config, dtype)]
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
        self._leaving: dict[tuple[type, int, int], tuple[jax.Array, ...]] = {}

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
        arrays = cell.store.load(cell.name, slot)
        self._slots.setdefault((op.layer, op.batch), []).append(slot)
        self._arrived[_key(op)] = arrays

    def taken(self, op: Load) -> tuple[jax.Array, ...]:
        """What was loaded, or what need not be."""
        cell = self.of(op)
        assert cell is not None
        if cell.store.free_load:
            return cell.store.load(cell.name, _NO_SLOT)
        return self._arrived.pop(_key(op))

    def read(self, layer: int, batch: int, marker: jax.Array) -> None:
        """``marker`` is ready when what was loaded for the computation has been read."""
        for slot in self._slots.pop((layer, batch), ()):
            slot.release([marker])

    def leaving(self, op: Store) -> tuple[jax.Array, ...] | None:
        """What waits to be stored; it waits no more."""
        return self._leaving.pop(_key(op), None)

    def wait(self, op: Store) -> None:
        """Until what is to be stored has been computed."""
        jax.block_until_ready(self._leaving.get(_key(op)))

    def keep(self, op: Store, arrays: tuple[jax.Array, ...]) -> None:
        """Has ``arrays`` wait until ``op`` comes."""
        self._leaving[_key(op)] = arrays

    def store(self, op: Store, arrays: tuple[jax.Array, ...] | None, prompt_len: int) -> None:
        """Puts what was computed where it is kept.

        Raises:
            KeyError: the cell was discarded.
        """
        cell = self.of(op)
        if cell is None or arrays is None:
            return
        if isinstance(op, StoreHidden):
            cell.store.put(cell.name, arrays, arrays[0].shape[-2])
        elif op.step == 0:
            cell.begin(arrays, prompt_len)
        else:
            for name, part in cell.parts(arrays):
                cell.store.append(name, part)

    def arrive(self, stage: int, batch: int, arrays: tuple[jax.Array, ...]) -> None:
        """Keeps hidden states that another stage has handed over."""
        cell = self.hidden.get((stage, batch))
        if cell is None:
            return
        cell.store.put(cell.name, arrays, arrays[0].shape[-2])
        if cell.store.free_store:  # dispatched is not done
            jax.block_until_ready(cell.store.load(cell.name, _NO_SLOT))

    def discard(self, cell: BlockCell) -> None:
        """Gives its room back."""
        cell.store.discard(cell.name)
        if cell.values is not None:
            cell.store.discard(cell.values)
            self.value_sums.pop(cell.name, None)

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

    def saved(self, states: Sequence[BatchState]) -> Iterator[tuple[str, Arrays]]:
        """The cache, cell by cell, of the batches that go on: for a snapshot at a step's border."""
        for (_, number), cell in self.cache.items():
            state = states[number]
            if state.left or not state.begun:
                continue
            filled = min(state.length, cell.room.capacity)
            slot, arrays = Slot(), []
            for name in (cell.name, cell.values):
                if name is not None:
                    slot.begin(cell.store.slot_nbytes(cell.sizes))
                    # Copied: the slot is used again.
                    arrays += [np.array(a[..., :filled, :]) for a in cell.store.load(name, slot)]
            found = {f"{place}": array for place, array in enumerate(arrays)}
            if cell.name in self.value_sums:
                found["value_sum"] = np.asarray(self.value_sums[cell.name])
            yield cell.name, found

    def restore(
        self,
        states: Sequence[BatchState],
        cells: Iterator[tuple[str, Arrays]],
        devices: Mapping[int, Any],
    ) -> None:
        """Takes what :meth:`saved` gave; ``devices``: of the stages."""
        of_name = {cell.name: (*place, cell) for place, cell in self.cache.items()}
        for name, found in cells:
            layer, number, cell = of_name[name]
            home = self.host if cell.hosted else devices[self._stage_of[layer]]
            if "value_sum" in found:
                self.value_sums[name] = jnp.array(found.pop("value_sum"), device=home)
            arrays = tuple(jnp.array(found[f"{i}"], device=home) for i in range(len(found)))
            cell.begin(arrays, states[number].length)


def _key(op: Load | Store) -> tuple[type, int, int]:
    return type(op), op.layer, op.batch
