"""What the ops of a schedule do for one block.

The executor says when; :mod:`~flexgen_jax.engine.kernels` compute;
:mod:`~flexgen_jax.engine.layer_loading` and the stores of :mod:`~flexgen_jax.engine.cells` fetch
and keep.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexgen_jax.engine import kernels
from flexgen_jax.engine.batch_state import BatchState
from flexgen_jax.engine.cells import Cells
from flexgen_jax.engine.hand_over import HandOver
from flexgen_jax.engine.layer_loading import LayerWeights
from flexgen_jax.engine.pipeline import Rings, Stage, fullest
from flexgen_jax.engine.sampling import sample
from flexgen_jax.engine.snapshots import Arrays
from flexgen_jax.engine.unpacking import Dense
from flexgen_jax.models.family import Config, eos_token_ids
from flexgen_jax.models.kv_cache import KeptCache, LayerCache
from flexgen_jax.models.params import unit_kinds
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.cell_layout import (
    cache_format,
    cache_name,
    cache_places,
    cache_sizes,
    hidden_name,
    hidden_nbytes,
)
from flexgen_jax.requests.generated import Generated
from flexgen_jax.requests.stops import Decode
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
from storage.store import SequenceStore, StorageError

OnLogits = Callable[[int, int, jax.Array], None]
OnTokens = Callable[[int], None]


class _Cell(NamedTuple):
    """What moves at once, and the store that keeps it."""

    name: str
    store: SequenceStore
    sizes: list[int]
    hosted: bool = False  # attention to it is computed on the host
    values: str | None = None  # where the values lie if only some of them will be read


_NO_SLOT = Slot()


class BlockEffects:
    """The ``Effects`` of one block. Use :meth:`results` after the schedule has run.

    Args:
        number: Which block of ``cells`` it is.
        workload: Of the block.
        stages: Those that are here, by number, with their rings made.
        hand_over: Between the stages.
        seed: The ``LLM``'s seed, for requests without their own.
        decode: Token ids to text, for stop strings.
        on_tokens: Told how many new tokens were booked, at each step border of a batch.
        on_logits: Given (step, batch, logits) of every head computation: for tests and research.
    """

    def __init__(
        self,
        block: Block,
        number: int,
        workload: Workload,
        stages: Mapping[int, Stage],
        cells: Cells,
        *,
        hand_over: HandOver,
        config: Config,
        dtype: str,
        seed: int,
        decode: Decode | None = None,
        on_tokens: OnTokens | None = None,
        on_logits: OnLogits | None = None,
    ) -> None:
        self._config = config
        self._kinds = unit_kinds(config)
        self._stages = stages
        self._between = hand_over
        self._stage_of = [workload.stage_of(layer) for layer in range(workload.num_layers)]
        self._hands_over = [workload.hands_over(layer) for layer in range(workload.num_layers)]
        self._on_tokens = on_tokens
        self._on_logits = on_logits
        self._head = workload.num_layers - 1
        self._host = jax.local_devices(backend="cpu")[0]
        last = stages.get(self._stage_of[self._head])
        sampler = None if last is None else last.device
        self._states = [
            BatchState(b, seed, eos_token_ids(config), decode, sampler) for b in block.batches
        ]
        tier_of = {
            cell.name: cell.tier
            for placement in (cells.cache_of[number], cells.hidden_of[number])
            for cell in placement.cells
        }
        self._form = cache_format(cells.policy)
        self._sparsity = cells.policy.attention_sparsity
        self._cache: dict[tuple[int, int], _Cell] = {}
        self._hidden: dict[tuple[int, int], _Cell] = {}  # by stage and batch
        for index, batch in enumerate(block.batches):
            name = hidden_name(index)
            sizes = [hidden_nbytes(batch, config, dtype)]
            for stage in stages:
                store = cells.hidden[stage][tier_of[name]]
                self._hidden[stage, index] = _Cell(name, store, sizes)
        for layer, index in cache_places(block, config):
            stage = self._stage_of[layer]
            if stage not in stages:
                continue
            name = cache_name(config, layer, index)
            tier = tier_of[name]
            sizes = cache_sizes(block.batches[index], config, dtype, self._form)
            sparse = self._sparsity < 1
            self._cache[layer, index] = _Cell(
                name,
                cells.cache[stage][tier],
                sizes[: len(sizes) // 2] if sparse else sizes,
                hosted=cells.policy.host_attention and tier is not Tier.DEVICE,
                values=f"{name}.values" if sparse else None,
            )
        self._value_sums: dict[str, jax.Array] = {}  # of sparse attention, per cell
        self._dense = {stage: Dense(dtype) for stage in stages}
        # Of each layer the load that is computed with, then those ahead: a stage of one layer loads
        # it again while it computes.
        self._loaded: defaultdict[int, deque[LayerWeights]] = defaultdict(deque)
        self._readers: defaultdict[int, list[jax.Array]] = defaultdict(list)
        # What was loaded for a computation, and what is to be stored after it.
        self._arrived: dict[tuple[type, int, int], tuple[jax.Array, ...]] = {}
        self._slots: dict[tuple[int, int], list[Slot]] = {}
        self._leaving: dict[tuple[type, int, int], tuple[jax.Array, ...]] = {}
        self._last_marker: dict[int, jax.Array] = {}  # by stage
        self._finished = False
        self._cells = cells
        self.peak_bytes = dict.fromkeys(Tier, 0)  # of weights, cells, slots and dense copies

    def _sample(self) -> None:
        """Notes what the stores, the slots and the dense copies hold now."""
        shared = any(stage.device.platform == "cpu" for stage in self._stages.values())
        held = fullest([self._held(*item) for item in self._stages.items()], shared=shared)
        held[Tier.HOST] += self._cells.buffered_nbytes
        for tier, nbytes in held.items():
            self.peak_bytes[tier] = max(self.peak_bytes[tier], nbytes)

    def _held(self, number: int, stage: Stage) -> dict[Tier, int]:
        held = {tier: stage.weights.placement.nbytes(tier) for tier in Tier}
        for stores in (self._cells.cache[number], self._cells.hidden[number]):
            for tier, store in stores.items():
                held[tier] += store.nbytes
        held[Tier.DEVICE] += 0 if stage.rings is None else stage.rings.nbytes
        held[Tier.DEVICE] += self._dense[number].nbytes + stage.weights.dense_nbytes
        return held

    def _cell(self, op: LoadCache | StoreCache | LoadHidden | StoreHidden) -> _Cell | None:
        """None for what has no cell: the tokens that a step begins and ends with, and a cache
        that nobody will read."""
        if isinstance(op, (LoadCache, StoreCache)):
            return self._cache.get((op.layer, op.batch))
        ends = 0 if isinstance(op, LoadHidden) else self._head
        return None if op.layer == ends else self._hidden[self._stage_of[op.layer], op.batch]

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
        cell = self._cell(op)
        if cell is None:
            return True
        loads = isinstance(op, (LoadCache, LoadHidden))
        return cell.store.free_load if loads else cell.store.free_store

    def wanted(self, op: Op) -> bool:
        if isinstance(op, (FreeWeights, Barrier)):
            return True
        if isinstance(op, LoadWeights):
            return not self._finished
        state = self._states[op.batch]
        if isinstance(op, (LoadCache, StoreCache)) and op.step >= state.batch.num_steps:
            return False  # its cell is gone, even before the batch leaves
        return not state.left

    def finished(self) -> bool:
        return self._finished

    def make_room(self, issue: Issue) -> None:
        match issue.op:
            case LoadWeights():
                assert issue.slot is not None
                stage = self._stages[issue.stage]
                slot = _rings(stage).weights[issue.slot]
                slot.begin(stage.weights.slot_nbytes(issue.op.layer))
            case LoadCache() | LoadHidden():
                cell = self._cell(issue.op)
                assert cell is not None
                self._slot(issue).begin(cell.store.slot_nbytes(cell.sizes))
            case StoreCache() | StoreHidden():
                jax.block_until_ready(self._leaving.get(_key(issue.op)))
            case _:
                pass

    def _slot(self, issue: Issue) -> Slot:
        assert issue.slot is not None
        rings = _rings(self._stages[issue.stage])
        return (rings.cache if isinstance(issue.op, LoadCache) else rings.hidden)[issue.slot]

    def perform(self, issue: Issue) -> Any:
        op = issue.op
        match op:
            case LoadWeights():
                assert issue.slot is not None
                stage = self._stages[issue.stage]
                slot = _rings(stage).weights[issue.slot]
                self._loaded[op.layer].append(stage.weights.load(op.layer, slot))
            case FreeWeights():
                assert issue.slot is not None
                readers = self._readers.pop(op.layer, [])
                if self._loaded[op.layer]:
                    self._loaded[op.layer].popleft()
                    _rings(self._stages[issue.stage]).weights[issue.slot].release(readers)
            case LoadCache() | LoadHidden():
                self._load(issue, op)
            case StoreHidden() if self._hands_over[op.layer]:
                self._hand_over(op, self._leaving.pop(_key(op), ()))
            case StoreCache() | StoreHidden():
                self._store(op, self._leaving.pop(_key(op), None))
            case Compute():
                return self._compute(op)
            case Barrier():
                # Dispatched is not computed: a barrier means computed.
                markers = self._last_marker
                jax.block_until_ready(markers if op.stage is None else markers.get(op.stage))
        return None

    def _load(self, issue: Issue, op: LoadCache | LoadHidden) -> None:
        cell, slot = self._cell(op), self._slot(issue)
        assert cell is not None
        try:
            arrays = cell.store.load(cell.name, slot)
        except (KeyError, StorageError):
            if self.wanted(op):
                raise
            return  # the batch left, and its cells with it, while this was under way
        self._slots.setdefault((op.layer, op.batch), []).append(slot)
        self._arrived[_key(op)] = arrays

    def _store(self, op: StoreCache | StoreHidden, arrays: tuple[jax.Array, ...] | None) -> None:
        cell = self._cell(op)
        if cell is None or arrays is None:
            return
        try:
            if isinstance(op, StoreHidden):
                cell.store.put(cell.name, arrays, arrays[0].shape[-2])
                return
            for name, part in _parts(cell, arrays):
                if op.step == 0:
                    cell.store.put(name, part, self._states[op.batch].batch.cache_len)
                else:
                    cell.store.append(name, part)
        except KeyError:
            if self.wanted(op):
                raise

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
        cell = self._hidden.get((self._stage_of[op.layer] + 1, op.batch))
        if cell is not None:
            cell.store.put(cell.name, arrived, arrived[0].shape[-2])
            if cell.store.free_store:  # dispatched is not done
                jax.block_until_ready(cell.store.load(cell.name, _NO_SLOT))

    def _input(self, op: LoadCache | LoadHidden) -> tuple[jax.Array, ...]:
        """What was loaded, or what need not be."""
        cell = self._cell(op)
        assert cell is not None
        if cell.store.free_load:
            return cell.store.load(cell.name, _NO_SLOT)
        return self._arrived.pop(_key(op))

    def _output(self, op: StoreCache | StoreHidden, arrays: tuple[jax.Array, ...]) -> None:
        """Keeps what a computation made: at once where that is no work, else until it is stored."""
        if isinstance(op, StoreHidden) and self._hands_over[op.layer]:
            self._leaving[_key(op)] = arrays
            return
        cell = self._cell(op)
        if cell is not None and cell.store.free_store:
            self._store(op, arrays)
        elif cell is not None:
            self._leaving[_key(op)] = arrays

    def _compute(self, op: Compute) -> jax.Array | None:
        state = self._states[op.batch]
        if op.layer == 0 and op.step > 0 and self._border(op.batch, state):
            return None
        number = self._stage_of[op.layer]
        stage = self._stages[number]
        weights = stage.weights.resident(op.layer) or self._loaded[op.layer][0]
        marker = self._run_layer(op, state, stage, stage.weights.dense(weights))
        if self._loaded[op.layer]:
            self._readers[op.layer].append(marker)
        for slot in self._slots.pop((op.layer, op.batch), ()):
            slot.release([marker])
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
        """The batch's cells make room at once."""
        state.left = True
        for (_, number), cell in (*self._hidden.items(), *self._cache.items()):
            if number == batch:
                self._discard(cell)
        for key in [k for k in list(self._leaving) if k[2] == batch]:
            self._leaving.pop(key, None)

    def _discard(self, cell: _Cell) -> None:
        cell.store.discard(cell.name)
        if cell.values is not None:
            cell.store.discard(cell.values)
            self._value_sums.pop(cell.name, None)

    def _book(self, state: BatchState) -> None:
        count = state.collect()
        if count and self._on_tokens is not None:
            self._on_tokens(count)

    def _run_layer(
        self, op: Compute, state: BatchState, stage: Stage, weights: LayerWeights
    ) -> jax.Array:
        batch, config = state.batch, self._config
        step, layer, number = op.step, op.layer, op.batch
        position = np.int32(batch.prompt_len + step - 1)
        if layer == 0:
            rows = stage.weights.token_rows(state.tokens)
            first = position if step else np.int32(0)
            hidden, marker = kernels.embed(
                weights.params, rows, first, state.padding_on(stage.device), config=config
            )
            self._output(StoreHidden(step, layer, number), (hidden,))
            return marker
        (hidden,) = self._input(LoadHidden(step, layer, number))
        if layer == self._head:
            head = weights.params, weights.token_table, hidden
            if step == 0:
                state.scores = [
                    kernels.score(*head, wanted, config=config, k=state.num_scores)
                    for wanted in state.wanted_scores()
                ]
            logits = kernels.head(*head, config=config)
            if self._on_logits is not None:
                self._on_logits(step, number, logits)
            forced = state.forced(step)
            state.sampled = sample(
                logits,
                state.arrays,
                np.int32(step),
                forced,
                state.history(),
                features=state.features,
            )
            if self._hands_over[layer]:
                self._output(StoreHidden(step, layer, number), tuple(state.sampled))
            return state.sampled.token
        padding = state.padding_on(stage.device)
        if step == 0:
            hidden, new, marker = kernels.prefill_layer(
                weights.params,
                hidden,
                padding,
                config=config,
                kind=self._kinds[layer],
                form=self._form,
            )
        else:
            cell = self._cache[layer, number]
            arrays = self._input(LoadCache(step, layer, number))
            dense = self._dense[self._stage_of[layer]]
            cached = dense.of(self._form.unflatten(arrays, config.head_dim))
            if cell.hosted or cell.values is not None:
                hidden, new, marker = self._layer_in_parts(
                    cell, stage.device, weights, hidden, cached, position, state, layer
                )
            else:
                hidden, new, marker = kernels.decode_layer(
                    weights.params,
                    hidden,
                    LayerCache(*cached),
                    position,
                    padding,
                    config=config,
                    kind=self._kinds[layer],
                    form=self._form,
                )
        if step + 1 == batch.num_steps and step:
            self._discard(self._cache[layer, number])  # nobody reads it any more
        if step + 1 < batch.num_steps:
            if step == 0 and self._sparsity < 1:
                self._sum_values(self._cache[layer, number], new, padding)
            self._output(StoreCache(step, layer, number), tuple(jax.tree.leaves(new)))
        self._output(StoreHidden(step, layer, number), (hidden,))
        return marker

    def _sum_values(self, cell: _Cell, new: KeptCache, padding: jax.Array) -> None:
        value_sum = kernels.sum_values(new.value, padding)
        if cell.hosted:
            value_sum = jax.device_put(value_sum, self._host)
        self._value_sums[cell.name] = value_sum

    def _layer_in_parts(
        self,
        cell: _Cell,
        device: Any,
        weights: LayerWeights,
        hidden: jax.Array,
        cached: tuple[jax.Array, ...],
        position: np.int32,
        state: BatchState,
        layer: int,
    ) -> tuple[jax.Array, KeptCache, jax.Array]:
        """Where attention is computed on the host, or attends to a selection.

        On the host: the query goes there and the result comes back; the cache never moves. To a
        selection: only the values of the selected positions are fetched.
        """
        config, kind = self._config, self._kinds[layer]
        query, new, kept = kernels.decode_qkv(
            weights.params,
            hidden,
            position,
            state.padding_on(device),
            config=config,
            kind=kind,
            form=self._form,
        )
        padding = state.padding_on(self._host if cell.hosted else device)
        if cell.hosted:
            query, new, kept = jax.device_put((query, new, kept), self._host)
        if cell.values is None:
            cache = LayerCache(*cached)
            attended = kernels.attend_cached(query, cache, new, position, padding, kind=kind)
        else:
            (key,) = cached
            chosen = kernels.select_cached(
                query, key, new, position, padding, kind=kind, sparsity=self._sparsity
            )
            taken = cell.store.take(cell.values, chosen.positions)
            (value,) = self._form.unflatten(taken, config.head_dim)
            attended, self._value_sums[cell.name] = kernels.attend_selected(
                chosen, value, new, kept, self._value_sums[cell.name]
            )
        attended = jax.device_put(attended, device)
        hidden, marker = kernels.decode_rest(
            weights.params, hidden, attended, config=config, kind=kind
        )
        return hidden, kept, marker

    def settle(self) -> None:
        """Between two schedules of one block: books tokens, and drops what was loaded ahead."""
        for number, state in enumerate(self._states):
            if not state.left:
                self._book(state)
                if state.finished:
                    self._leave(number, state)
        self._finished = all(s.left for s in self._states)
        for kept in (self._loaded, self._readers, self._arrived, self._slots, self._leaving):
            kept.clear()

    def batches(self) -> list[dict[str, Any]]:
        """What each batch has produced, as plain JSON."""
        return [state.to_json() for state in self._states]

    def cells(self, done: Sequence[int]) -> Iterator[tuple[str, Arrays]]:
        """The cache, cell by cell, of the batches that go on; ``done``: the steps of each."""
        for (_, number), cell in self._cache.items():
            state = self._states[number]
            if state.left or not done[number]:
                continue
            filled = state.batch.prompt_len + done[number] - 1
            slot, arrays = Slot(), []
            for name in (cell.name, cell.values):
                if name is not None:
                    slot.begin(cell.store.slot_nbytes(cell.sizes))
                    # Copied: the slot is used again.
                    arrays += [np.array(a[..., :filled, :]) for a in cell.store.load(name, slot)]
            found = {f"{place}": array for place, array in enumerate(arrays)}
            if cell.name in self._value_sums:
                found["value_sum"] = np.asarray(self._value_sums[cell.name])
            yield cell.name, found

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
        of_name = {cell.name: (*place, cell) for place, cell in self._cache.items()}
        for name, found in cells:
            layer, number, cell = of_name[name]
            device = self._stages[self._stage_of[layer]].device
            home = self._host if cell.hosted else device
            if "value_sum" in found:
                self._value_sums[name] = jnp.array(found.pop("value_sum"), device=home)
            arrays = tuple(jnp.array(found[f"{i}"], device=home) for i in range(len(found)))
            for part_name, part in _parts(cell, arrays):
                cell.store.put(part_name, part, self._states[number].batch.cache_len)

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


def _parts(cell: _Cell, arrays: tuple[jax.Array, ...]) -> list[tuple[str, tuple[jax.Array, ...]]]:
    """What is stored of a cell under which name: keys and values apart where they are read so."""
    if cell.values is None:
        return [(cell.name, arrays)]
    half = len(arrays) // 2
    return [(cell.name, arrays[:half]), (cell.values, arrays[half:])]


def _key(op: LoadCache | StoreCache | LoadHidden | StoreHidden) -> tuple[type, int, int]:
    return type(op), op.layer, op.batch
