"""What the ops of a schedule do for one block.

The executor says when; :mod:`~flexgen_jax.engine.unit_effects` compute a unit of the model, each
role in its own way; :mod:`~flexgen_jax.engine.layer_loading` fetches weights, and
:mod:`~flexgen_jax.engine.block_cells` fetches and keeps the rest.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from flexgen_jax.engine.batch_state import BatchState, Step
from flexgen_jax.engine.block_cells import BlockCells, Kept
from flexgen_jax.engine.cells import Cells
from flexgen_jax.engine.hand_over import HandOver
from flexgen_jax.engine.layer_loading import LayerWeights
from flexgen_jax.engine.pipeline import Rings, Stage, fullest
from flexgen_jax.engine.unit_effects import (
    DecoderEffects,
    EmbeddingEffects,
    ExpertEffects,
    HeadEffects,
    Markers,
    UnitEffects,
)
from flexgen_jax.engine.unpacking import Dense
from flexgen_jax.engine.waiting import Waiting
from flexgen_jax.models.params import unit_experts, unit_kinds
from flexgen_jax.planning.blocks import Block, fit_into_less
from flexgen_jax.requests.generated import Generated
from scheduling.dependencies import Issue
from scheduling.ops import (
    Attend,
    Barrier,
    Compute,
    ComputeExperts,
    FreeWeights,
    LoadCache,
    LoadChosen,
    LoadHidden,
    LoadWeights,
    Op,
    Project,
    StoreCache,
    StoreHidden,
)
from scheduling.policy import Tier
from scheduling.workload import Workload
from storage.slots import Slot
from storage.store import StorageError

OnLogits = Callable[[int, int, jax.Array], None]
OnTokens = Callable[[int], None]
OnPrefill = Callable[[int, int], None]


class Watch(NamedTuple):
    """Who is told what while a block runs.

    Attributes:
        on_tokens: How many new tokens were booked, at each step border of a batch.
        on_logits: (step, batch, logits) of every head computation: for tests and research.
        on_prefill: (done, of), whenever one more layer is through with a batch's first prompts.
        on_pass: Called twice a pass, at borders of steps; what it raises ends the run.
    """

    on_tokens: OnTokens | None = None
    on_logits: OnLogits | None = None
    on_prefill: OnPrefill | None = None
    on_pass: Callable[[], None] | None = None


@dataclasses.dataclass
class Tally:
    """What a block has computed.

    Attributes:
        passes: Over the weights.
        rows_computed, rows_used: Of all steps; of them those that gave a token.
        padded_tokens: Positions of prompts, padding and empty rows included.
    """

    passes: int = 0
    rows_computed: int = 0
    rows_used: int = 0
    padded_tokens: int = 0

    def step(self, rows: int, used: int, now: Step) -> None:
        """Counts a step of a batch."""
        self.rows_computed += rows
        self.rows_used += used
        if now.fresh:
            self.padded_tokens += rows * now.prompt_len
        elif now.joining is not None:
            joined = now.joining.batch
            self.padded_tokens += joined.rows * joined.prompt_len


class BlockEffects:
    """The ``Effects`` of one block. Use :meth:`results` after the schedule has run.

    Args:
        block: As it begins.
        states: Of its batches.
        number: Which block of ``stores`` it is.
        workload: Of the block.
        stages: Those that are here, by number, with their rings made.
        stores: Where its cells lie.
        hand_over: Between the stages.
        waiting: Who takes the places of those that have finished.
        tally: Goes on counting.
        most_steps: Of a run of the schedule: then the batches pause; None: no limit.
        gathers: Whether all pause once the rows that are left fit into fewer batches or rows.

    Attributes:
        finished_rows: What was finished and is not taken yet.
        peak_bytes: Of weights, cells, slots and dense copies, by tier.
    """

    def __init__(
        self,
        block: Block,
        states: Sequence[BatchState],
        number: int,
        workload: Workload,
        stages: Mapping[int, Stage],
        stores: Cells,
        hand_over: HandOver,
        waiting: Waiting,
        tally: Tally,
        watch: Watch = Watch(),  # noqa: B008 # immutable
        *,
        most_steps: int | None = None,
        gathers: bool = False,
    ) -> None:
        self._states, self._stages, self._stores = states, stages, stores
        self._room, self._waiting, self._tally = block.room, waiting, tally
        self._most_steps, self._gathers = most_steps, gathers
        self._gathering = False
        self._at_batch = len(states)  # that was computed last; a smaller one begins a pass
        self.finished_rows: deque[Generated] = deque()
        self._between, self._watch = hand_over, watch
        layers = range(workload.num_layers)
        self._stage_of = [workload.stage_of(layer) for layer in layers]
        self._hands_over = [workload.hands_over(layer) for layer in layers]
        self._head = workload.num_layers - 1
        config = stores.config
        self.cells = BlockCells(block, number, workload, list(stages), stores)
        self._dense = {stage: Dense(stores.dtype) for stage in stages}
        kinds = unit_kinds(config)
        about = config, self.cells, workload
        self._experts = ExpertEffects(
            *about,
            kinds=kinds,
            units=unit_experts(config),
            dtype=stores.dtype,
            block_size=stores.policy.block_size,
        )
        self._decoders = DecoderEffects(
            *about,
            kinds=kinds,
            sparsity=stores.policy.attention_sparsity,
            dense=self._dense,
            experts=self._experts,
        )
        by_role: dict[str, UnitEffects] = {
            "embed": EmbeddingEffects(*about),
            "decoder": self._decoders,
            "experts": self._experts,
            "head": HeadEffects(*about, on_logits=watch.on_logits),
        }
        self._units = [by_role[kind.role] for kind in kinds]
        # Of each layer the load that is computed with, then those ahead: a stage of one layer loads
        # it again while it computes.
        self._loaded: defaultdict[int, deque[LayerWeights]] = defaultdict(deque)
        self._readers: defaultdict[int, list[jax.Array]] = defaultdict(list)
        self._last_markers: dict[tuple[int, bool], Markers] = {}  # by stage; whether of attention
        self._finished = False
        layers_here = sum(stage in stages for stage in self._stage_of)
        self._prefilled, self._to_prefill = 0, layers_here * len(states)
        self.peak_bytes = dict.fromkeys(Tier, 0)

    def _sample(self) -> None:
        """Notes what the stores, the slots and the dense copies hold now."""
        shared = any(stage.device.platform == "cpu" for stage in self._stages.values())
        held = fullest([self._held(*item) for item in self._stages.items()], shared=shared)
        held[Tier.HOST] += self._stores.buffered_nbytes
        held[Tier.DEVICE] += self._experts.nbytes
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
        if isinstance(op, (LoadWeights, LoadChosen, FreeWeights)):
            return stage.weights.resident(op.layer) is not None
        if isinstance(op, (Project, Attend, Compute, ComputeExperts)):
            return False
        cell = self.cells.of(op)
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
        if isinstance(op, (LoadChosen, ComputeExperts)):
            return any(self._goes_on(self._states[batch], op.step) for batch in op.batches)
        state = self._states[op.batch]
        now = state.now
        if not self._goes_on(state, op.step):
            return False
        if isinstance(op, LoadCache):
            # Nobody reads what the last step has left, nor what was there before a beginning.
            return not (now.last if op.step > now.number else now.fresh)
        return True

    @staticmethod
    def _goes_on(state: BatchState, step: int) -> bool:
        return not (state.left or (state.paused and step > state.now.number))

    def finished(self) -> bool:
        """Whether all batches have left or pause."""
        return self._finished

    def make_room(self, issue: Issue) -> None:
        """Waits for what ``issue`` needs beside its predecessors: a slot, or a result."""
        match issue.op:
            case LoadWeights() | LoadChosen():
                if isinstance(issue.op, LoadChosen):
                    self._experts.chosen(issue.op)  # known when the router has run
                slot = self._weight_slot(issue)
                slot.begin(self._stages[issue.stage].weights.slot_nbytes(issue.op.layer))
            case LoadCache() | LoadHidden():
                cell = self.cells.of(issue.op)
                assert cell is not None
                self._cell_slot(issue).begin(cell.store.slot_nbytes(cell.sizes))
            case StoreCache() | StoreHidden():
                self.cells.wait(issue.op)
            case Attend():
                self._decoders.wait(issue.op)
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
            case LoadWeights() | LoadChosen():
                weights, slot = self._stages[issue.stage].weights, self._weight_slot(issue)
                only = self._experts.chosen(op) if isinstance(op, LoadChosen) else None
                self._loaded[op.layer].append(weights.load(op.layer, slot, only))
            case FreeWeights():
                readers = self._readers.pop(op.layer, [])
                if self._loaded[op.layer]:
                    self._loaded[op.layer].popleft()
                    self._weight_slot(issue).release(readers)
            case LoadCache() | LoadHidden():
                try:
                    self.cells.load(op, self._cell_slot(issue))
                except (KeyError, StorageError):
                    if self.wanted(op):  # else the batch, and its cells with it, left meanwhile
                        raise
            case StoreHidden() if self._hands_over[op.layer]:
                leaving = self.cells.leaving(op) or ()
                assert not isinstance(leaving, Kept)
                self._hand_over(op, leaving)
            case StoreCache() | StoreHidden():
                try:
                    self.cells.store(op, self.cells.leaving(op))
                except KeyError:
                    if self.wanted(op):
                        raise
            case Project():
                return self._project(op)
            case Attend():
                return self._attend(op)
            case Compute():
                return self._compute(op)
            case ComputeExperts():
                return self._compute_experts(op)
            case Barrier():
                # Dispatched is not computed: a barrier means computed.
                markers = list(self._last_markers.items())
                jax.block_until_ready([m for (s, _), m in markers if op.stage in (None, s)])
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
        self.cells.arrive(self._stage_of[op.layer] + 1, op.batch, arrived)

    def _compute(self, op: Compute) -> Markers | None:
        state = self._states[op.batch]
        if op.layer == 0:
            if op.step > state.now.number and not self._border(op.batch, state):
                return None
            state.computing()
            self._tally.passes += op.batch <= self._at_batch
            self._at_batch = op.batch
        stage = self._stages[self._stage_of[op.layer]]
        dense = stage.weights.dense(self._weights(op.layer))
        markers = self._units[op.layer].compute(op, state, stage, dense)
        self.cells.read(op.layer, op.batch, markers)
        self._note_markers(op.layer, markers)
        return markers

    def _project(self, op: Project) -> Markers | None:
        state, stage = self._states[op.batch], self._stages[self._stage_of[op.layer]]
        if not self._decoders.apart(op, state):
            return None
        dense = stage.weights.dense(self._weights(op.layer))
        markers = self._decoders.project(op, state, stage, dense)
        self._note_markers(op.layer, markers)
        return markers

    def _attend(self, op: Attend) -> Markers | None:
        """Reads no weights; what was loaded of the cache is given back by the Compute."""
        state, number = self._states[op.batch], self._stage_of[op.layer]
        if not self._decoders.apart(op, state):
            return None
        markers = self._decoders.attend(op, state, self._stages[number])
        self._last_markers[number, True] = markers
        return markers

    def _weights(self, layer: int) -> LayerWeights:
        """That are computed with; as they are kept."""
        weights = self._stages[self._stage_of[layer]].weights
        return weights.resident(layer) or self._loaded[layer][0]

    def _note_markers(self, layer: int, markers: Markers) -> None:
        """They are ready when the device has computed, and has read the layer."""
        if self._loaded[layer]:
            self._readers[layer].extend(markers)
        if markers:
            self._last_markers[self._stage_of[layer], False] = markers

    def _compute_experts(self, op: ComputeExperts) -> Markers:
        stage = self._stages[self._stage_of[op.layer]]
        weights = self._weights(op.layer)
        markers = self._experts.compute_experts(op, self._states, stage, weights)
        self._note_markers(op.layer, markers)
        return markers

    def computed(self, op: Op) -> None:
        """The results of ``op`` are there."""
        if self._watch.on_prefill is None or not isinstance(op, (Compute, ComputeExperts)):
            return
        if op.step == 0:
            self._prefilled += 1 if isinstance(op, Compute) else len(op.batches)
            self._watch.on_prefill(self._prefilled, self._to_prefill)

    def _border(self, batch: int, state: BatchState) -> bool:
        """Books the tokens of the step before and begins the next; False: the batch does not."""
        if batch in (0, len(self._states) - 1):
            self._sample()
            if self._watch.on_pass is not None:
                self._watch.on_pass()
        self._book(state)
        if not self._may_gather() and state.now.number != self._most_steps:
            return self._go_on(batch, state)
        state.paused = True
        if state.num_live == 0 and not self._waiting.open_to(self._room):
            self._leave(batch, state)
        self._note_finished()
        return False

    def _go_on(self, batch: int, state: BatchState) -> bool:
        """Begins a step with those who wait; or the batch leaves."""
        newcomers = self._waiting.take(state.num_free, self._room)
        if newcomers or state.num_live:
            state.over = self._waiting.over
            state.step(newcomers)
            return True
        self._leave(batch, state)
        self._note_finished()
        return False

    def _may_gather(self) -> bool:
        """Whether nobody comes any more, and those who are left fit into less."""
        if self._gathers and not self._gathering:
            there = [state for state in self._states if not state.left]
            live = sum(state.num_live for state in there)
            rows = max(len(state.rows) for state in there)
            smaller = fit_into_less(live, len(there), rows)
            self._gathering = smaller and not self._waiting.open_to(self._room)
        return self._gathering

    def _note_finished(self) -> None:
        self._finished = all(s.left or s.paused for s in self._states)

    def _leave(self, batch: int, state: BatchState) -> None:
        state.left = True
        self.cells.leave(batch)

    def _book(self, state: BatchState) -> None:
        computed, now = state.sampled is not None, state.now
        count = state.collect()
        if computed:
            self._tally.step(len(state.rows), count, now)
        self.finished_rows.extend(state.take_finished())
        if count and self._watch.on_tokens is not None:
            self._watch.on_tokens(count)

    def begin_run(self) -> None:
        """Before a run of the schedule: the batches that have begun take their next step."""
        self._finished = self._gathering = False
        self._at_batch = len(self._states)
        for number, state in enumerate(self._states):
            state.resume(anew=self._room is not None)
            if state.begun and not state.left:
                self._go_on(number, state)
        self._note_finished()

    def settle(self) -> None:
        """After a run: books tokens, takes back what was not computed, drops what was loaded."""
        for state in reversed(self._states):
            self._waiting.put_back(state.undo_step())
            if not state.left:
                self._book(state)
        self._loaded.clear()
        self._readers.clear()
        self.cells.forget()
        self._experts.forget()
        self._decoders.forget()

    @property
    def gathering(self) -> bool:
        """Whether those who are left fit into fewer batches or rows."""
        return self._gathering

    @property
    def devices(self) -> dict[int, Any]:
        """Of the stages that are here, by number."""
        return {number: stage.device for number, stage in self._stages.items()}

    def close(self) -> None:
        """Gives back the room of all cells."""
        for number, state in enumerate(self._states):
            self._leave(number, state)


def _rings(stage: Stage) -> Rings:
    assert stage.rings is not None
    return stage.rings
