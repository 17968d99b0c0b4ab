"""A decoder layer in three parts: before attention, attention where the cache lies, the rest.

The programs of a cell are the same whether its ops come one by one or a Compute runs all three, and
whatever schedule it is: so are the bits.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np

from flexgen_jax.engine import kernels
from flexgen_jax.engine.batch_state import BatchState
from flexgen_jax.engine.block_cells import BlockCell, BlockCells
from flexgen_jax.engine.unpacking import Dense
from flexgen_jax.models.family import Config, Kind, Routed
from flexgen_jax.models.kv_cache import KeptCache, LayerCache
from scheduling.ops import Cell, LoadCache


class Attended(NamedTuple):
    """What attention has made, on the layer's device; and of the token what the cache keeps."""

    heads: jax.Array
    kept: KeptCache


def in_parts(cell: BlockCell) -> bool:
    """Whether attention to it is a program of its own: on the host, or to a selection.

    Else a layer is one program, which its Compute runs.
    """
    return cell.hosted or cell.values is not None


class LayerParts:
    """Of the decoder layers of a block, and what is between two parts.

    Args:
        kinds: Of each layer.
        sparsity: The share of the positions that are attended to.
        dense: Layer -> where what is kept in codes becomes arrays.

    Attributes:
        unpacking: Of a cache in codes, held from when a cell was made dense until what reads it is
            dispatched: the next takes its place, and attention has a thread of its own.
    """

    def __init__(
        self,
        config: Config,
        cells: BlockCells,
        kinds: tuple[Kind, ...],
        sparsity: float,
        dense: Mapping[int, Dense],
    ) -> None:
        self._config, self._cells, self._kinds = config, cells, kinds
        self._sparsity, self._dense = sparsity, dense
        self._projected: dict[tuple[int, int], kernels.Projected] = {}  # by layer and batch
        self._attended: dict[tuple[int, int], Attended] = {}
        self.unpacking: AbstractContextManager[Any] = (
            threading.Lock() if cells.form.bits else nullcontext()
        )

    def project(
        self, op: Cell, state: BatchState, device: Any, params: Any, hidden: jax.Array
    ) -> jax.Array:
        """The query, and the token's key and value; returns a marker."""
        made, marker = kernels.decode_qkv(
            params,
            hidden,
            np.int32(state.now.column),
            state.padding_on(device),
            config=self._config,
            kind=self._kinds[op.layer],
            form=self._cells.form,
        )
        self._projected[op.layer, op.batch] = made
        return marker

    def wait(self, op: Cell) -> None:
        """Until the first part has been computed, if it was dispatched."""
        jax.block_until_ready(self._projected.get((op.layer, op.batch)))

    def attended(self, op: Cell) -> bool:
        """Whether the second part is done, and the third is not."""
        return (op.layer, op.batch) in self._attended

    def attend(self, op: Cell, state: BatchState, device: Any, cell: BlockCell) -> jax.Array:
        """On the host: the query goes there and the result comes back; the cache never moves. To a
        selection: only the values of the selected positions are fetched.

        Returns:
            What is ready when the cache has been read.
        """
        cells, kind = self._cells, self._kinds[op.layer]
        arrays = cells.taken(LoadCache(op.step, op.layer, op.batch))
        made = self._projected.pop((op.layer, op.batch))
        if cell.hosted:
            made = jax.device_put(made, cells.host)
        padding = state.padding_on(cells.host if cell.hosted else device)
        position = np.int32(state.now.column)
        with self.unpacking:
            dense = self._dense[op.layer]
            cached = dense.of(cells.form.unflatten(arrays, self._config.head_dim))
            if cell.values is None:
                heads = kernels.attend_cached(
                    made.query,
                    LayerCache(*cached),
                    made.new,
                    position,
                    padding,
                    made.sinks,
                    kind=kind,
                )
            else:
                (key,) = cached
                heads = self._to_selection(cell, key, made, position, padding, kind)
        heads = jax.device_put(heads, device)
        self._attended[op.layer, op.batch] = Attended(heads, made.kept)
        return heads

    def _to_selection(
        self,
        cell: BlockCell,
        key: jax.Array,
        made: kernels.Projected,
        position: np.int32,
        padding: jax.Array,
        kind: Kind,
    ) -> jax.Array:
        chosen = kernels.select_cached(
            made.query,
            key,
            made.new,
            position,
            padding,
            made.sinks,
            kind=kind,
            sparsity=self._sparsity,
        )
        assert cell.values is not None
        taken = cell.store.take(cell.values, chosen.positions)
        (value,) = self._cells.form.unflatten(taken, self._config.head_dim)
        sums = self._cells.value_sums
        heads, sums[cell.name] = kernels.attend_selected(
            chosen, value, made.new, made.kept, sums[cell.name]
        )
        return heads

    def rest(
        self, op: Cell, params: Any, hidden: jax.Array
    ) -> tuple[jax.Array | Routed, KeptCache, jax.Array]:
        """What the layer makes, what the cache keeps, and a marker."""
        attended = self._attended.pop((op.layer, op.batch))
        made, marker = kernels.decode_rest(
            params, hidden, attended.heads, config=self._config, kind=self._kinds[op.layer]
        )
        return made, attended.kept, marker

    def forget(self) -> None:
        """Drops what is between two parts."""
        self._projected.clear()
        self._attended.clear()
