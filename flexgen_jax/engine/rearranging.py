"""Rows that go on in another arrangement of batches: put together, or read from a snapshot.

Between two runs of the schedule only, when nothing is on its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexgen_jax.engine.batch_state import BatchState, Living, Step
from flexgen_jax.engine.block_cells import BlockCells
from flexgen_jax.engine.snapshots import Arrays
from flexgen_jax.planning.blocks import Batch, Block, Room, rows_for


class Place(NamedTuple):
    """Where a row was."""

    batch: int
    row: int


class Moved(NamedTuple):
    """A batch of the new arrangement: who is in its rows, from where, its newest column, and how
    many rows it has."""

    rows: list[Living]
    places: list[Place]
    column: int
    num_rows: int


def together(states: Sequence[BatchState], room: Room | None) -> list[Moved]:
    """Those who are left in ``states``, in as few batches and rows as they fit into."""
    found = [
        (living, Place(number, place))
        for number, state in enumerate(states)
        for place, living in enumerate(state.living if state.begun and not state.left else ())
        if living is not None
    ]
    size = rows_for(len(found), max(len(state.rows) for state in states if not state.left))
    moved = []
    for start in range(0, len(found), size):
        rows, places = zip(*found[start : start + size], strict=True)
        # A prompt lies before now: the longest that there is room for, too.
        longest = max(row.length for row in rows)
        column = max(longest, 0 if room is None else room.prompt_len) - 1
        moved.append(Moved(list(rows), list(places), column, size))
    return moved


def block_of(moved: Sequence[Moved], room: Room | None) -> Block:
    """The block that goes on with them."""
    batches = [
        Batch(tuple(r.generated.request for r in m.rows), m.num_rows, m.column + 1, room)
        for m in moved
    ]
    return Block(tuple(batches))


def move_cells(
    moved: Sequence[Moved],
    old: BlockCells,
    steps: Sequence[Step],
    new: BlockCells,
    states: Sequence[BatchState],
    devices: Mapping[int, Any],
) -> None:
    """Brings the cache along, layer after layer; the old cells are gone.

    Args:
        steps: Of each old batch the last one.
        states: Of the new batches.
        devices: Of the stages that are here.
    """
    sources = sorted({place.batch for m in moved for place in m.places})
    for layer, device in new.homes(devices).items():
        arrays = {b: old.positions(layer, b, steps[b]) for b in sources}
        sums = {b: old.value_sums.get(old.cache[layer, b].name) for b in sources}
        old.discard_layer(layer)
        for number, m in enumerate(moved):
            rows = new.num_rows(number)
            found = [
                _gathered([arrays[p.batch][i][p.row] for p in m.places], rows, m.column + 1)
                for i in range(len(arrays[sources[0]]))
            ]
            new.begin(layer, number, found, states[number].now, device)
            if all(sums[p.batch] is not None for p in m.places):
                each = [np.asarray(sums[p.batch])[p.row] for p in m.places]
                whole = np.zeros((rows, *each[0].shape), each[0].dtype)
                whole[: len(each)] = each
                new.set_value_sum(layer, number, whole, device)


def _gathered(parts: Sequence[np.ndarray], rows: int, length: int) -> np.ndarray:
    """(rows, heads, positions, dim) of parts (heads, positions, dim), which end together."""
    longest = min(length, max(part.shape[-2] for part in parts))
    heads, _, dim = parts[0].shape
    whole = np.zeros((rows, heads, longest, dim), parts[0].dtype)
    for row, part in enumerate(parts):
        count = min(longest, part.shape[-2])
        whole[row, :, longest - count :] = part[:, part.shape[-2] - count :]
    return whole


def saved(states: Sequence[BatchState], cells: BlockCells) -> Iterator[tuple[str, Arrays]]:
    """The cache, cell by cell, of the batches that go on."""
    for (layer, number), cell in cells.cache.items():
        state = states[number]
        if not (state.begun and state.num_live):
            continue
        arrays = cells.positions(layer, number, state.now)
        found = {f"{place}": array for place, array in enumerate(arrays)}
        if cell.name in cells.value_sums:
            found["value_sum"] = np.array(cells.value_sums[cell.name])
        # A row that failed may hold what is no number, and whoever takes it later would see it.
        nobody = [place for place, row in enumerate(state.rows) if row is None]
        for array in found.values():
            array[nobody] = 0
        yield cell.name, found


def restore(
    kept: Iterator[tuple[str, Arrays]],
    states: Sequence[BatchState],
    cells: BlockCells,
    devices: Mapping[int, Any],
) -> None:
    """Takes what :func:`saved` gave."""
    of_name = {cell.name: place for place, cell in cells.cache.items()}
    homes = cells.homes(devices)
    for name, found in kept:
        layer, number = of_name[name]
        state = states[number]
        if not state.begun or state.left:
            continue  # all that was in it has been finished since
        if "value_sum" in found:
            cells.set_value_sum(layer, number, found.pop("value_sum"), homes[layer])
        arrays = [np.asarray(found[f"{i}"]) for i in range(len(found))]
        cells.begin(layer, number, arrays, state.now, homes[layer])
