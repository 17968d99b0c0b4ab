"""What computing a unit of the model is: an embedding, a decoder layer, a head.

Each takes what was loaded for it from the block's cells and leaves there what is to be stored.
Knows no order.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flexgen_jax.engine import kernels
from flexgen_jax.engine.batch_state import BatchState
from flexgen_jax.engine.block_cells import BlockCell, BlockCells, Kept, Leaving
from flexgen_jax.engine.layer_loading import LayerWeights
from flexgen_jax.engine.layer_parts import LayerParts, in_parts
from flexgen_jax.engine.pipeline import Stage
from flexgen_jax.engine.routing import Pool, Waiting, waiting
from flexgen_jax.engine.sampling import sample
from flexgen_jax.engine.unpacking import Dense
from flexgen_jax.models.family import Config, Kind, Routed
from flexgen_jax.models.kv_cache import KeptCache, LayerCache
from scheduling.ops import (
    Attend,
    Compute,
    ComputeExperts,
    LoadCache,
    LoadChosen,
    LoadHidden,
    Project,
    StoreCache,
    StoreHidden,
)
from scheduling.workload import Workload

Markers = list[jax.Array]


class UnitEffects(abc.ABC):
    """Of the units of a role.

    Args:
        hands_over: Layer -> whether what it computes is for another stage.
    """

    def __init__(self, config: Config, cells: BlockCells, workload: Workload) -> None:
        self._config, self._cells = config, cells
        layers = range(workload.num_layers)
        self._hands_over = [workload.hands_over(layer) for layer in layers]
        self._stage_of = [workload.stage_of(layer) for layer in layers]

    @abc.abstractmethod
    def compute(
        self, op: Compute, state: BatchState, stage: Stage, weights: LayerWeights
    ) -> Markers:
        """Dispatches the computation; returns what is ready when all of it has run.

        Each program's own marker: a CPU may run two that do not need each other at once, so that
        one that was dispatched later does not tell of one before.
        """

    def _output(self, op: StoreCache | StoreHidden, leaving: Leaving, state: BatchState) -> None:
        """Keeps what a computation made: at once where that is no work, else until it is stored."""
        if isinstance(op, StoreHidden) and self._hands_over[op.layer]:
            self._cells.keep(op, leaving)
            return
        cell = self._cells.of(op)
        if cell is None:
            return
        if not cell.store.free_store:
            self._cells.keep(op, leaving)
            return
        try:
            self._cells.store(op, leaving)
        except KeyError:
            if not state.left:
                raise


class EmbeddingEffects(UnitEffects):
    """Of the tokens that were sampled last, or of the prompts."""

    def compute(
        self, op: Compute, state: BatchState, stage: Stage, weights: LayerWeights
    ) -> Markers:
        now = state.now
        first = np.int32(0 if now.fresh else now.column)
        padding = state.padding_on(stage.device)
        hidden, marker = self._embedded(state.tokens, first, padding, stage, weights)
        found: tuple[jax.Array, ...] = (hidden,)
        markers = [marker]
        if now.joining is not None:
            batch = now.joining.batch
            padding = jax.device_put(batch.padding(), stage.device)
            tokens = batch.tokens()
            joined, marker = self._embedded(tokens, np.int32(0), padding, stage, weights)
            found = (hidden, joined)
            markers.append(marker)
        self._output(StoreHidden(op.step, op.layer, op.batch), found, state)
        return markers

    def _embedded(
        self,
        tokens: np.ndarray,
        first: np.int32,
        padding: jax.Array,
        stage: Stage,
        weights: LayerWeights,
    ) -> tuple[jax.Array, jax.Array]:
        rows = stage.weights.token_rows(tokens)
        return kernels.embed(weights.params, rows, first, padding, config=self._config)


class DecoderEffects(UnitEffects):
    """Of whole prompts, or of one new token per row with the cache.

    Args:
        kinds: Of each layer.
        sparsity: The share of the positions that are attended to.
        dense: Stage -> where what is kept in codes becomes arrays.
        experts: Takes what layers with experts make.
    """

    def __init__(
        self,
        config: Config,
        cells: BlockCells,
        workload: Workload,
        *,
        kinds: tuple[Kind, ...],
        sparsity: float,
        dense: dict[int, Dense],
        experts: ExpertEffects,
    ) -> None:
        super().__init__(config, cells, workload)
        self._kinds, self._dense, self._experts = kinds, dense, experts
        of_layer = {
            layer: dense[stage] for layer, stage in enumerate(self._stage_of) if stage in dense
        }
        self._parts = LayerParts(config, cells, kinds, sparsity, of_layer)

    def compute(
        self, op: Compute, state: BatchState, stage: Stage, weights: LayerWeights
    ) -> Markers:
        step, layer, number = op.step, op.layer, op.batch
        given, *joined = self._cells.taken(LoadHidden(step, layer, number))
        cell, now = self._cells.cache.get((layer, number)), state.now
        if now.fresh:
            self._cells.drop(LoadCache(step, layer, number))
            padding = state.padding_on(stage.device)
            length, ring = now.column + 1, None
            if cell is not None and cell.room.ring:
                ring = cell.capacity(now.capacity), length
            made, new, marker = self._prefill(layer, padding, weights, given, ring=ring)
            kept = Kept(_leaves(new), length, now.capacity)
            if ring is None:
                self._sum_values(cell, new, padding)
            else:
                self._sum_values(cell, new, state.starts, np.int32(length))
        else:
            assert cell is not None
            made, new, marker = self._decode(op, state, stage, weights, given, cell)
            kept = Kept(_leaves(new), capacity=now.capacity if now.resized else None)
        found, markers = [made], [marker]
        if now.joining is not None:
            assert cell is not None
            padding = jax.device_put(now.joining.batch.padding(), stage.device)
            keep = cell.capacity(now.capacity) if cell.room.ring else None
            out, theirs, marker = self._prefill(layer, padding, weights, joined[0], keep=keep)
            self._sum_values(cell, theirs, padding, rows=now.joining.rows)
            kept = kept._replace(joined=_leaves(theirs), rows=now.joining.rows)
            found.append(out)
            markers.append(marker)
        if not now.last:
            self._output(StoreCache(step, layer, number), kept, state)
        elif cell is not None and not now.fresh and state.over:
            self._cells.discard(cell)  # nobody reads it any more
        routed = [one for one in found if isinstance(one, Routed)]
        if routed:
            self._experts.wait(layer, number, routed, state)
        else:
            hidden = tuple(one for one in found if not isinstance(one, Routed))
            self._output(StoreHidden(step, layer, number), hidden, state)
        return markers

    def _prefill(
        self,
        layer: int,
        padding: jax.Array,
        weights: LayerWeights,
        hidden: jax.Array,
        *,
        keep: int | None = None,
        ring: tuple[int, int] | None = None,
    ) -> tuple[jax.Array | Routed, KeptCache, jax.Array]:
        """See :func:`kernels.prefill_layer`; no program is made for what changes nothing."""
        seq = hidden.shape[1]
        if keep is not None and keep >= seq:
            keep = None
        if ring is not None and ring[1] == seq <= ring[0]:
            ring = None
        return kernels.prefill_layer(
            weights.params,
            hidden,
            padding,
            config=self._config,
            kind=self._kinds[layer],
            form=self._cells.form,
            keep=keep,
            ring=ring,
        )

    def _sum_values(
        self,
        cell: BlockCell | None,
        new: KeptCache,
        padding: jax.Array | np.ndarray,
        length: np.int32 | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        """Of prompts, which sparse attention needs; ``rows``: of those that join.

        Args:
            length: They are kept in a ring, of sequences of so many positions.
        """
        if cell is None or cell.values is None:
            return
        sums = kernels.sum_values(new.value, padding, length)
        if cell.hosted:
            sums = jax.device_put(sums, self._cells.host)
        if rows is not None:
            sums = kernels.put_rows(self._cells.value_sums[cell.name], sums, rows)
        self._cells.value_sums[cell.name] = sums

    def _decode(
        self,
        op: Compute,
        state: BatchState,
        stage: Stage,
        weights: LayerWeights,
        hidden: jax.Array,
        cell: BlockCell,
    ) -> tuple[jax.Array | Routed, KeptCache, jax.Array]:
        if in_parts(cell):
            if not self._parts.attended(op):
                self._parts.project(op, state, stage.device, weights.params, hidden)
                self._parts.attend(op, state, stage.device, cell)
            return self._parts.rest(op, weights.params, hidden)
        form = self._cells.form
        arrays = self._cells.taken(LoadCache(op.step, op.layer, op.batch))
        with self._parts.unpacking:
            dense = self._dense[self._stage_of[op.layer]]
            cached = dense.of(form.unflatten(arrays, self._config.head_dim))
            return kernels.decode_layer(
                weights.params,
                hidden,
                LayerCache(*cached),
                np.int32(state.now.column),
                state.padding_on(stage.device),
                config=self._config,
                kind=self._kinds[op.layer],
                form=form,
            )

    def apart(self, op: Project | Attend, state: BatchState) -> bool:
        """Whether the part is work of its own: else its layer's Compute does it."""
        return not state.now.fresh and in_parts(self._cells.cache[op.layer, op.batch])

    def project(
        self, op: Project, state: BatchState, stage: Stage, weights: LayerWeights
    ) -> Markers:
        """Dispatches what comes before attention; newcomers' prompts are the Compute's."""
        hidden, *_ = self._cells.seen(LoadHidden(op.step, op.layer, op.batch))
        return [self._parts.project(op, state, stage.device, weights.params, hidden)]

    def wait(self, op: Attend) -> None:
        """Until what attention takes of the new tokens has been computed."""
        self._parts.wait(op)

    def attend(self, op: Attend, state: BatchState, stage: Stage) -> Markers:
        """Dispatches attention."""
        cell = self._cells.cache[op.layer, op.batch]
        return [self._parts.attend(op, state, stage.device, cell)]

    def forget(self) -> None:
        """Drops what is between two parts of a layer."""
        self._parts.forget()


class ExpertEffects(UnitEffects):
    """Of units of experts, over the tokens of all batches that have come.

    Args:
        kinds: Of each layer.
        units: Layer -> which experts it is a unit of.
        dtype: Of hidden states.
        block_size: Rows of the policy's blocks.
    """

    def __init__(
        self,
        config: Config,
        cells: BlockCells,
        workload: Workload,
        *,
        kinds: tuple[Kind, ...],
        units: Mapping[int, tuple[int, ...]],
        dtype: Any,
        block_size: int,
    ) -> None:
        super().__init__(config, cells, workload)
        self._workload, self._kinds, self._units, self._dtype = workload, kinds, units, dtype
        self._block_size = block_size
        self._waiting: dict[tuple[int, int], list[Waiting]] = {}
        # Of the batches that go through a layer's experts together, by the sizes of tiles.
        self._pools: dict[tuple[int, tuple[int, ...]], dict[int, Pool]] = {}

    @property
    def nbytes(self) -> int:
        """Of the device's memory, for all that waits."""
        pieces = [piece for several in list(self._waiting.values()) for piece in several]
        pools = [pool for several in list(self._pools.values()) for pool in several.values()]
        return sum(piece.nbytes for piece in pieces) + sum(pool.nbytes for pool in pools)

    def wait(self, layer: int, batch: int, made: Sequence[Routed], state: BatchState) -> None:
        """Keeps what layer ``layer`` has made of a batch, and of those who join it."""
        experts, now = self._kinds[layer].experts, state.now
        valid = [state.valid(), *([] if now.joining is None else [now.joining.valid()])]
        self._waiting[layer, batch] = [
            waiting(
                routed,
                of_tokens,
                experts=experts,
                block_size=self._block_size,
                joins=number > 0,
            )
            for number, (routed, of_tokens) in enumerate(zip(made, valid, strict=True))
        ]

    def chosen(self, op: LoadChosen) -> list[int]:
        """Which experts of a unit are to be loaded; waits for the router."""
        router = self._workload.router_of(op.layer)
        pieces = [p for b in op.batches for p in self._waiting.get((router, b), ())]
        units = self._units[op.layer]
        return [number for number in units if any(number in p.experts for p in pieces)]

    def compute_experts(
        self, op: ComputeExperts, states: Sequence[BatchState], stage: Stage, weights: LayerWeights
    ) -> Markers:
        """Dispatches the computation, as :meth:`compute`."""
        router, experts = self._workload.router_of(op.layer), self._units[op.layer]
        there = tuple(b for b in op.batches if (router, b) in self._waiting)
        pools = self._pooled(router, there)
        markers = []
        for pool in pools.values():
            if used := pool.chose(experts):
                only = {f"expert_{number}": weights.params[f"expert_{number}"] for number in used}
                dense = stage.weights.dense(LayerWeights(only, None)).params
                params = {number: dense[f"expert_{number}"] for number in used}
                markers.append(pool.add(params, experts, self._config))
        if self._workload.gives_hidden(op.layer):
            self._finish(op, router, there, pools, states)
        return markers

    def _pooled(self, router: int, batches: tuple[int, ...]) -> dict[int, Pool]:
        key = router, batches
        if key not in self._pools:
            by_tile: dict[int, list[Waiting]] = {}
            for piece in (p for b in batches for p in self._waiting[router, b]):
                by_tile.setdefault(piece.tile, []).append(piece)
            experts = self._kinds[router].experts
            self._pools[key] = {tile: Pool(some, experts) for tile, some in by_tile.items()}
            for piece in (p for some in by_tile.values() for p in some):
                piece.release()
        return self._pools[key]

    def _finish(
        self,
        op: ComputeExperts,
        router: int,
        batches: tuple[int, ...],
        pools: Mapping[int, Pool],
        states: Sequence[BatchState],
    ) -> None:
        """Hands on the hidden states of each batch."""
        made = {tile: iter(pool.taken(self._dtype)) for tile, pool in pools.items()}
        del self._pools[router, batches]
        for batch in batches:
            pieces = self._waiting.pop((router, batch))
            found = tuple(next(made[piece.tile]) for piece in pieces)
            self._output(StoreHidden(op.step, op.layer, batch), found, states[batch])

    def forget(self) -> None:
        """Drops what waits."""
        self._waiting.clear()
        self._pools.clear()

    def compute(
        self, op: Compute, state: BatchState, stage: Stage, weights: LayerWeights
    ) -> Markers:
        raise AssertionError("experts compute several batches at once")


class HeadEffects(UnitEffects):
    """The next token of every row, and the scores of the prompts.

    Args:
        on_logits: Given (step, batch, logits) of every computation.
    """

    def __init__(
        self, config: Config, cells: BlockCells, workload: Workload, *, on_logits: Any
    ) -> None:
        super().__init__(config, cells, workload)
        self._on_logits = on_logits

    def compute(
        self, op: Compute, state: BatchState, stage: Stage, weights: LayerWeights
    ) -> Markers:
        hidden, *joined = self._cells.taken(LoadHidden(op.step, op.layer, op.batch))
        head = weights.params, weights.token_table
        state.scores = [
            kernels.score(*head, prompts, wanted, config=self._config, k=state.sampling.num_scores)
            for prompts in (*joined, hidden)[:1]
            for wanted in state.wanted_scores()
        ]
        if state.now.joining is not None:
            hidden = kernels.put_last(hidden, joined[0], state.now.joining.rows)
        logits = kernels.head(*head, hidden, config=self._config)
        if self._on_logits is not None:
            self._on_logits(state.num_done, op.batch, logits)
        state.sampled = sample(
            logits,
            state.sampling.arrays,
            state.steps,
            state.forced(),
            state.history(),
            state.allowed(),
            features=state.sampling.features,
        )
        if self._hands_over[op.layer]:
            self._output(StoreHidden(op.step, op.layer, op.batch), tuple(state.sampled), state)
        return [state.sampled.token, *(scored.token for scored in state.scores)]


def _leaves(new: KeptCache) -> tuple[jax.Array, ...]:
    return tuple(jax.tree.leaves(new))
