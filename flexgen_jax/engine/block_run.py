"""One block from its first op to its last: a run of the schedule after another.

A block that is as it begins takes one run. Between two runs nothing is on its way; that is when the
state is saved, when those who are left are put together into fewer batches or rows, and when a
rolling block begins anew, for who needs more room.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flexgen_jax.engine import rearranging
from flexgen_jax.engine.batch_state import Living, Makings, batch_states
from flexgen_jax.engine.cells import Cells
from flexgen_jax.engine.compiling import compile_seconds
from flexgen_jax.engine.effects import BlockEffects, Tally, Watch
from flexgen_jax.engine.executor import execute
from flexgen_jax.engine.finishing import Finishing
from flexgen_jax.engine.hand_over import HandOver
from flexgen_jax.engine.kernels import compilations
from flexgen_jax.engine.pipeline import Stage
from flexgen_jax.engine.snapshots import Snapshot, State
from flexgen_jax.engine.waiting import Key, Waiting
from flexgen_jax.planning.blocks import Batch, Block, Room, batch_of, padded_length
from flexgen_jax.planning.planner import Planner
from flexgen_jax.planning.refilling import IdealRefill, Life
from flexgen_jax.requests.generated import Generated
from flexgen_jax.requests.request import Request
from scheduling.ops import Op
from scheduling.policy import Tier
from scheduling.timeline import Timeline
from scheduling.transforms import Cut, remaining
from scheduling.workload import Workload

# Of a run of a rolling block, about: what the executor keeps of them, some 10 MB, stays small.
MOST_OPS = 50_000
# Of a block's timeline so much is kept.
MOST_SPANS = 100_000
_PART_SECONDS = 1.0  # after which a part of a block is handed out, however small


class Counts:
    """What a block takes, beside its timeline: seconds, compilations, bytes.

    Args:
        disk_bytes: Says how many were read and how many were written so far, by anyone.
    """

    def __init__(self, disk_bytes: Callable[[], tuple[int, int]]) -> None:
        self._disk_bytes = disk_bytes
        self._before: dict[str, float] = {}
        self._begun = self._now()

    def _now(self) -> dict[str, float]:
        read, written = self._disk_bytes()
        return {
            "seconds": time.perf_counter(),
            "compile_seconds": compile_seconds(),
            "compilations": compilations(),
            "disk_bytes": read,
            "disk_bytes_written": written,
        }

    def add(self, before: dict[str, float]) -> None:
        """Adds what an earlier process has counted."""
        self._before = before

    def __call__(self) -> dict[str, Any]:
        """So far, by the names that a ``Report`` has for them."""
        now, before = self._now(), self._before
        return {name: now[name] - self._begun[name] + before.get(name, 0) for name in now}


OnPart = Callable[[list[Generated], "Since", "Ended | None"], None]


class Since(NamedTuple):
    """What was counted since the part before, and the most that each tier has held so far."""

    counts: dict[str, Any]
    peak_bytes: Mapping[Tier, int]


class Ended(NamedTuple):
    """Of a whole block.

    Attributes:
        timeline: Measured, of all processes that have run the block; of a long one its beginning.
        passes: Over the weights, that ``timeline`` has.
        timeline_compile_seconds: In the time that ``timeline`` covers, by whichever process.
        lives: What its requests turned out to be, in the order in which they came: of the first.
    """

    timeline: Timeline
    passes: int
    timeline_compile_seconds: float
    lives: list[Life]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a block runs on.

    Attributes:
        stages: Those that are here, by number, with their rings made.
        cells: Where its cells lie.
    """

    planner: Planner
    stages: Mapping[int, Stage]
    cells: Cells
    hand_over: HandOver
    makings: Makings
    watch: Watch


class BlockRun:
    """Runs a block.

    Args:
        number: Which block of the cells it is.
        waiting: Who comes after those whom it begins with.
        counts: Of its seconds and bytes.
        on_part: Given results of a rolling block as they come, and what was counted since the part
            before; the last part, of any block, comes when it has ended.
        snapshot: Where its state is kept, if at all: what is there is gone on from.
    """

    def __init__(
        self,
        setting: Setting,
        block: Block,
        number: int,
        waiting: Waiting,
        counts: Counts,
        on_part: OnPart,
        snapshot: Snapshot | None = None,
    ) -> None:
        self._setting, self._number, self._waiting = setting, number, waiting
        self._counts, self._on_part, self._snapshot = counts, on_part, snapshot
        self._finishing = Finishing(block)
        self._timelines: list[tuple[float, Timeline]] = []
        self._offset, self._spans, self._passes_kept = 0.0, 0, 0
        self._compiling_kept = 0.0
        self._steps = 0  # of earlier runs
        self._handed_out: dict[str, float] = {}
        self._last_part = time.perf_counter()
        self._enough = setting.planner.policy.block_size
        self._tally = Tally()
        self._ideal = IdealRefill(setting.planner.policy.block_size)
        self._ideal_before = 0  # of an earlier process
        waiting.on_taken = self._ideal.comes
        self._peak_bytes = dict.fromkeys(Tier, 0)
        kept = None if snapshot is None else snapshot.load()
        if kept is None:
            self._begin(block, number)
        else:
            self._restore(block, *kept)

    def _begin(self, block: Block, number: int, *, anew: bool = True) -> None:
        """Arranges the batches of ``block``; not ``anew``: of those who are there already."""
        s = self._setting
        self._block = block
        for batch in block.batches if anew else ():
            for request in batch.requests:
                self._ideal.comes(request.key)
        self._states = batch_states(block, s.makings)
        self._effects = BlockEffects(
            block,
            self._states,
            number,
            s.planner.workload(block),
            s.stages,
            s.cells,
            s.hand_over,
            self._waiting,
            self._tally,
            s.watch,
            most_steps=self._most_steps if block.room else None,
            gathers=block.room is not None,
        )

    def __call__(self) -> None:
        """Runs it to its end.

        Raises:
            ExecutionError: an op failed.
            StorageError: the state is damaged.
        """
        while True:
            cut = self._run()
            if not any(state.num_live for state in self._states):
                if self._waiting.over:
                    break
                self._begin_anew()
            elif cut:
                self._save()
            elif self._effects.gathering:
                self._put_together()
        self._effects.close()
        kept = self._timeline(), self._passes_kept, self._compiling_kept
        self._hand_out(Ended(*kept, self._ideal.lives))

    # A run

    def _run(self) -> bool:
        """Runs the schedule until nothing of it is wanted; whether that is to save the state."""
        effects = self._effects
        effects.begin_run()
        cut = None
        if not effects.finished():
            workload = self._workload()
            ops: Iterable[Op] = remaining(self._setting.planner.order(workload), workload)
            if self._snapshot is not None:
                ops = cut = Cut(ops, workload, self._snapshot.due)
            timeline = execute(
                self._handing_out(ops), workload, effects, on_computed=effects.computed
            )
            self._keep(timeline.later(self._steps))
        effects.settle()
        self._take_finished()
        if self._block.room is not None:  # else they are counted on
            self._steps += max(state.now.number for state in self._states)
        for tier, nbytes in effects.peak_bytes.items():
            self._peak_bytes[tier] = max(self._peak_bytes[tier], nbytes)
        return cut is not None and not cut.ended and not effects.finished()

    def _workload(self) -> Workload:
        """What is left of the block, or as much as a run takes."""
        workload = self._setting.planner.workload(self._block)
        there = [state for state in self._states if not state.left]
        most = workload.num_steps
        if self._block.room is not None:
            # Steps are counted anew: who has begun is at step 1.
            limit = self._most_steps + 2
            left = max(state.most_left + state.begun for state in there)
            most = limit if not self._waiting.over else min(left, limit)
        done = tuple(
            most if state.left else state.now.number if state.begun else 0 for state in self._states
        )
        return dataclasses.replace(
            workload, num_steps=most, life=workload.num_steps, done=done if any(done) else ()
        )

    @property
    def _most_steps(self) -> int:
        """Of a run of a rolling block."""
        num_layers = len(self._setting.planner.model.config.units)
        ops = 4 * num_layers * len(self._block.batches)  # of a step
        return max(16, MOST_OPS // ops)

    def _handing_out(self, ops: Iterable[Op]) -> Iterator[Op]:
        """``ops``; between them, what is finished goes out. On the thread that may wait for it."""
        finished = self._effects.finished_rows
        for op in ops:
            if finished and self._block.room is not None:
                self._take_finished()
                late = time.perf_counter() - self._last_part > _PART_SECONDS
                if len(self._finishing) >= (1 if late else self._enough):
                    self._hand_out()
            yield op

    def _take_finished(self) -> None:
        finished = self._effects.finished_rows
        for _ in range(len(finished)):
            result = finished.popleft()
            life = Life(padded_length(len(result.request.token_ids)), len(result.token_ids))
            self._ideal.has(result.request.key, life)
            self._finishing.add(result)

    def _hand_out(self, ended: Ended | None = None) -> None:
        counts = self._so_far()
        since = {name: value - self._handed_out.get(name, 0) for name, value in counts.items()}
        self._handed_out = counts
        self._on_part(self._finishing.take(), Since(since, dict(self._peak_bytes)), ended)
        self._last_part = time.perf_counter()

    def _so_far(self) -> dict[str, Any]:
        ideal = {"ideal_passes": self._ideal_before + self._ideal.passes}
        return {**self._counts(), **dataclasses.asdict(self._tally), **ideal}

    def _keep(self, timeline: Timeline) -> None:
        if self._spans <= MOST_SPANS:
            self._timelines.append((self._offset, timeline))
            self._passes_kept = self._tally.passes
            self._compiling_kept = self._counts()["compile_seconds"]
        self._spans += len(timeline.spans)
        self._offset += timeline.seconds

    def _timeline(self) -> Timeline:
        return Timeline.concatenate(self._timelines, label="measured")

    # Between two runs

    def _put_together(self) -> None:
        """Those who are left, into fewer batches, or fewer rows."""
        old, states = self._effects, self._states
        moved = rearranging.together(states, self._block.room)
        block = rearranging.block_of(moved, self._block.room)
        self._begin(block, self._setting.cells.add(block), anew=False)
        for state, m in zip(self._states, moved, strict=True):
            state.take_over([*m.rows, *[None] * (len(state.rows) - len(m.rows))], m.column)
        steps, cells = [state.now for state in states], self._effects.cells
        rearranging.move_cells(moved, old.cells, steps, cells, self._states, old.devices)

    def _begin_anew(self) -> None:
        """With those who wait: there was no room for them, or no batch."""
        self._effects.close()
        block = self._setting.planner.rolling(self._waiting.some(), self._block.room)
        self._waiting.put_back(block.waiting)
        self._begin(block, self._setting.cells.add(block))

    def _save(self) -> None:
        assert self._snapshot is not None
        if self._block.room is not None:
            self._hand_out()  # what is safe need not be saved
        peak = {tier.value: nbytes for tier, nbytes in self._peak_bytes.items()}
        state = State(
            batches=[state.to_json() for state in self._states],
            room=None if self._block.room is None else dataclasses.astuple(self._block.room),
            finished=self._finishing.to_json(),
            counts=self._so_far(),
            steps=self._steps,
            timeline=self._timeline(),
            peak_bytes=peak,
        )
        self._snapshot.save(state, rearranging.saved(self._states, self._effects.cells))

    def _restore(self, block: Block, state: State, kept: Any) -> None:
        self._counts.add(state.counts)
        for field in dataclasses.fields(self._tally):
            setattr(self._tally, field.name, int(state.counts[field.name]))
        self._ideal_before = int(state.counts["ideal_passes"])
        self._keep(state.timeline)
        self._steps = state.steps
        self._peak_bytes = {tier: state.peak_bytes[tier.value] for tier in Tier}
        if state.room is not None:
            self._handed_out = dict(state.counts)
        requests, makings = self._taken_back(block, state), self._setting.makings

        def made(key: Key) -> Generated | None:
            request = requests.get(key)
            return None if request is None else makings.generated(request)

        self._finishing.restore(state.finished, made)
        living = [[_living(row, made) for row in b["rows"] or ()] for b in state.batches]
        if state.room is None:
            self._begin(block, self._number)
        else:
            block = self._rolling(block, state, living)
            self._begin(block, self._setting.cells.add(block))
        for batch, values, rows in zip(self._states, state.batches, living, strict=True):
            if any(rows):
                batch.take_over(rows, values["column"], values["number"], values["capacity"])
            elif not batch.num_live or (state.room is None and values["rows"] is not None):
                batch.left = True
        rearranging.restore(kept, self._states, self._effects.cells, self._effects.devices)

    def _taken_back(self, block: Block, state: State) -> dict[Key, Request]:
        """The requests that ``state`` is about, of those that are still to be done."""
        if state.room is None:
            return {r.key: r for r in block.requests}
        self._waiting.put_back([r for batch in block.batches for r in batch.requests])
        rows = [row for batch in state.batches for row in batch["rows"] or () if row]
        keys = [row["request"] for row in (*rows, *state.finished)]
        return self._waiting.remove({(index, sample) for index, sample in keys})

    def _rolling(
        self, block: Block, state: State, living: Sequence[Sequence[Living | None]]
    ) -> Block:
        """The batches of ``state``; where nobody is left others begin."""
        assert block.room is not None
        assert state.room is not None
        room = block.room.and_of(Room(*state.room))
        batches = []
        for values, rows in zip(state.batches, living, strict=True):
            count = values["num_rows"]
            here = [row.generated.request for row in rows if row is not None]
            if here:
                batches.append(Batch(tuple(here), count, values["column"] + 1, room))
            elif newcomers := self._waiting.take(count, room):
                batches.append(batch_of(newcomers, count, room))
            else:
                batches.append(Batch((), count, room.prompt_len, room))
        return Block(tuple(batches))


def _living(
    values: Mapping[str, Any] | None, made: Callable[[Key], Generated | None]
) -> Living | None:
    """The inverse of ``Living.to_json``; None: the request is finished."""
    if values is None:
        return None
    index, sample = values["request"]
    result = made((index, sample))
    if result is None:
        return None
    result.restore(values["result"])
    return Living(result, values["token"], values["length"])
