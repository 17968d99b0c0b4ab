"""What the ops of a schedule do for one block.

The executor says when; :mod:`~flexgen_jax.engine.unit_effects` compute a unit of the model, each
role in its own way; :mod:`~flexgen_jax.engine.layer_loading` fetches weights, and
:mod:`~flexgen_jax.engine.block_cells` fetches and keeps the rest.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from flexgen_jax.engine.batch_state import BatchState
from flexgen_jax.engine.block_cells import BlockCells
from flexgen_jax.engine.cells import Cells
from flexgen_jax.engine.hand_over import HandOver
from flexgen_jax.engine.layer_loading import LayerWeights
from flexgen_jax.engine.pipeline import Rings, Stage, fullest
from flexgen_jax.engine.snapshots import Arrays
from flexgen_jax.engine.unit_effects import (
    DecoderEffects,
    EmbeddingEffects,
    HeadEffects,
    UnitEffects,
)
from flexgen_jax.engine.unpacking import Dense
from flexgen_jax.models.params import unit_kinds
from flexgen_jax.planning.blocks import Block
from flexgen_jax.requests.generated import Generated
from scheduling.dependencies import Issue
from scheduling.ops import (
    Barrier,
    Compute,
    FreeWeights,
    LoadCache,
    LoadHidden,
    LoadWeights,
    Op,
    StoreCache,
    StoreHidden,
)
from scheduling.policy import Tier
from scheduling.workload import Workload
from storage.slots import Slot
from storage.store import StorageError

OnLogits = Callable[[int, int, jax.Array], None]
OnTokens = Callable[[int], None]


class Watch(NamedTuple):
    """Who is told what while a block runs.

    Attributes:
        on_tokens: How many new tokens were booked, at each step border of a batch.
        on_logits: (step, batch, logits) of every head computation: for tests and research.
    """

    on_tokens: OnTokens | None = None
    on_logits: OnLogits | None = None


class BlockEffects:
    """The ``Effects`` of one block. Use :meth:`results` after the schedule has run.

    Args:
        states: Of its batches.
        number: Which block of ``stores`` it is.
        workload: Of the block.
        stages: Those that are here, by number, with their rings made.
        stores: Where its cells lie.
        hand_over: Between the stages.
    """

    def __init__(
        self,
        states: Sequence[BatchState],
        number: int,
        workload: Workload,
        stages: Mapping[int, Stage],
        stores: Cells,
        hand_over: HandOver,
        watch: Watch = Watch(),  # noqa: B008 # immutable
    ) -> None:
        self._states, self._stages, self._stores = states, stages, stores
        self._between, self._watch = hand_over, watch
        layers = range(workload.num_layers)
        self._stage_of = [workload.stage_of(layer) for layer in layers]
        self._hands_over = [workload.hands_over(layer) for layer in layers]
        self._head = workload.num_layers - 1
        config, block = stores.config, Block(tuple(state.batch for state in states))
        self._cells = BlockCells(block, number, workload, list(stages), stores)
        self._dense = {stage: Dense(stores.dtype) for stage in stages}
        kinds = unit_kinds(config)
        about = config, self._cells, workload
        by_role: dict[str, UnitEffects] = {
            "embed": EmbeddingEffects(*about),
            "decoder": DecoderEffects(
                *about,
                kinds=kinds,
                sparsity=stores.policy.attention_sparsity,
                dense=self._dense,
            ),
            "head": HeadEffects(*about, on_logits=watch.on_logits),
        }
        self._units = [by_role[kind.role] for kind in kinds]
        # Of each layer the load that is computed with, then those ahead: a stage of one layer loads
        # it again while it computes.
        self._loaded: defaultdict[int, deque[LayerWeights]] = defaultdict(deque)
        self._readers: defaultdict[int, list[jax.Array]] = defaultdict(list)
        self._last_marker: dict[int, jax.Array] = {}  # by stage
        self._finished = False
        self.peak_bytes = dict.fromkeys(Tier, 0)  # of weights, cells, slots and dense copies

    def _sample(self) -> None:
        """Notes what the stores, the slots and the dense copies hold now."""
        shared = any(stage.device.platform == "cpu" for stage in self._stages.values())
        held = fullest([self._held(*item) for item in self._stages.items()], shared=shared)
        held[Tier.HOST] += self._stores.buffered_nbytes
        for tier, nbytes in held.items():
            self.peak_bytes[tier] = max(self.peak_bytes[tier], nbytes)

    def _held(self, number: int, stage: Stage) -> dict[Tier, int]:
        held = {tier: stage.weights.placement.nbytes(tier) for tier in Tier}
        for stores in (self._stores.cache[number], self._stores.hidden[number]):
            for tier, store in stores.items():
                held[tier] += store.nbytes
        held[Tier.DEVICE] += 0 if stage.rings is None else stage.rings.nbytes
        held[Tier.DEVICE] += self._dense[number].nbytes + stage.weights.dense_nbytes
        return held

    def effortless(self, op: Op) -> bool:
        """What lies where it is needed does not move; nor is there work of stages elsewhere."""
        if isinstance(op, Barrier):
            return op.stage is not None and op.stage not in self._stages
        if isinstance(op, StoreHidden) and self._hands_over[op.layer]:
            return not self._between.involves(op.layer)
        stage = self._stages.get(self._stage_of[op.layer])
        if stage is None:
            return True
        if isinstance(op, (LoadWeights, FreeWeights)):
            return stage.weights.resident(op.layer) is not None
        if isinstance(op, Compute):
            return False
        cell = self._cells.of(op)
        if cell is None:
            return True
        loads = isinstance(op, (LoadCache, LoadHidden))
        return cell.store.free_load if loads else cell.store.free_store

    def wanted(self, op: Op) -> bool:
        """Whether anybody waits for it still: a batch that has left does not."""
        if isinstance(op, (FreeWeights, Barrier)):
            return True
        if isinstance(op, LoadWeights):
            return not self._finished
        state = self._states[op.batch]
        if isinstance(op, (LoadCache, StoreCache)) and op.step >= state.batch.num_steps:
            return False  # its cell is gone, even before the batch leaves
        return not state.left

    def finished(self) -> bool:
        """Whether all batches have left."""
        return self._finished

    def make_room(self, issue: Issue) -> None:
        """Waits for what ``issue`` needs beside its predecessors: a slot, or a result."""
        match issue.op:
            case LoadWeights():
                slot = self._weight_slot(issue)
                slot.begin(self._stages[issue.stage].weights.slot_nbytes(issue.op.layer))
            case LoadCache() | LoadHidden():
                cell = self._cells.of(issue.op)
                assert cell is not None
                self._cell_slot(issue).begin(cell.store.slot_nbytes(cell.sizes))
            case StoreCache() | StoreHidden():
                self._cells.wait(issue.op)
            case _:
                pass

    def _weight_slot(self, issue: Issue) -> Slot:
        assert issue.slot is not None
        return _rings(self._stages[issue.stage]).weights[issue.slot]

    def _cell_slot(self, issue: Issue) -> Slot:
        assert issue.slot is not None
        rings = _rings(self._stages[issue.stage])
        return (rings.cache if isinstance(issue.op, LoadCache) else rings.hidden)[issue.slot]

    def perform(self, issue: Issue) -> Any:
        """Does it; a computation is dispatched, and what tells when it has run is returned."""
        op = issue.op
        match op:
            case LoadWeights():
                weights = self._stages[issue.stage].weights
                self._loaded[op.layer].append(weights.load(op.layer, self._weight_slot(issue)))
            case FreeWeights():
                readers = self._readers.pop(op.layer, [])
                if self._loaded[op.layer]:
                    self._loaded[op.layer].popleft()
                    self._weight_slot(issue).release(readers)
            case LoadCache() | LoadHidden():
                try:
                    self._cells.load(op, self._cell_slot(issue))
                except (KeyError, StorageError):
                    if self.wanted(op):  # else the batch, and its cells with it, left meanwhile
                        raise
            case StoreHidden() if self._hands_over[op.layer]:
                self._hand_over(op, self._cells.leaving(op) or ())
            case StoreCache() | StoreHidden():
                prompt_len = self._states[op.batch].batch.prompt_len
                try:
                    self._cells.store(op, self._cells.leaving(op), prompt_len)
                except KeyError:
                    if self.wanted(op):
                        raise
            case Compute():
                return self._compute(op)
            case Barrier():
                # Dispatched is not computed: a barrier means computed.
                markers = self._last_marker
                jax.block_until_ready(markers if op.stage is None else markers.get(op.stage))
        return None

    def _hand_over(self, op: StoreHidden, arrays: tuple[jax.Array, ...]) -> None:
        """To the next stage; from the last one it is tokens, which end the step for all stages.

        Args:
            arrays: What is handed over; empty: another process has it.
        """
        state = self._states[op.batch]
        if op.layer == self._head:
            self._between.tokens(op, state)
            self._border(op.batch, state)
            return
        arrived = self._between.hidden(op, arrays, state)
        self._cells.arrive(self._stage_of[op.layer] + 1, op.batch, arrived)

    def _compute(self, op: Compute) -> jax.Array | None:
        state = self._states[op.batch]
        if op.layer == 0 and op.step > 0 and self._border(op.batch, state):
            return None
        number = self._stage_of[op.layer]
        stage = self._stages[number]
        weights = stage.weights.resident(op.layer) or self._loaded[op.layer][0]
        dense = stage.weights.dense(weights)
        marker = self._units[op.layer].compute(op, state, stage, dense)
        if self._loaded[op.layer]:
            self._readers[op.layer].append(marker)
        self._cells.read(op.layer, op.batch, marker)
        self._last_marker[number] = marker
        return marker

    def _border(self, batch: int, state: BatchState) -> bool:
        """Books the tokens of the step before; True if the batch is finished and leaves."""
        if batch in (0, len(self._states) - 1):
            self._sample()
        self._book(state)
        if state.finished:
            self._leave(batch, state)
            self._finished = all(s.left for s in self._states)
        return state.left

    def _leave(self, batch: int, state: BatchState) -> None:
        state.left = True
        self._cells.leave(batch)

    def _book(self, state: BatchState) -> None:
        count = state.collect()
        if count and self._watch.on_tokens is not None:
            self._watch.on_tokens(count)

    def settle(self) -> None:
        """Between two schedules of one block: books tokens, and drops what was loaded ahead."""
        for number, state in enumerate(self._states):
            if not state.left:
                self._book(state)
                if state.finished:
                    self._leave(number, state)
        self._finished = all(s.left for s in self._states)
        self._loaded.clear()
        self._readers.clear()
        self._cells.forget()

    def batches(self) -> list[dict[str, Any]]:
        """What each batch has produced, as plain JSON."""
        return [state.to_json() for state in self._states]

    def cells(self) -> Iterator[tuple[str, Arrays]]:
        """The cache, cell by cell, of the batches that go on."""
        return self._cells.saved(self._states)

    def restore(
        self,
        batches: Sequence[Mapping[str, Any]],
        cells: Iterator[tuple[str, Arrays]],
        peak_bytes: Mapping[str, int],
    ) -> None:
        """Takes what :meth:`batches` and :meth:`cells` gave, and ``peak_bytes`` by tier."""
        self.peak_bytes = {tier: peak_bytes[tier.value] for tier in Tier}
        for state, values in zip(self._states, batches, strict=True):
            state.restore(values)
        devices = {number: stage.device for number, stage in self._stages.items()}
        self._cells.restore(self._states, cells, devices)

    def results(self) -> Iterator[Generated]:
        """What every request of the block produced; books the last step's tokens first."""
        for state in self._states:
            self._book(state)
            yield from state.results

    def close(self) -> None:
        """Gives back the room of all cells."""
        for number, state in enumerate(self._states):
            self._leave(number, state)


def _rings(stage: Stage) -> Rings:
    assert stage.rings is not None
    return stage.rings
