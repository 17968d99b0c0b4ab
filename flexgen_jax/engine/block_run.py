"""One block from its first op to its last, perhaps in several goes with snapshots in between."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

from flexgen_jax.engine.compiling import compile_seconds
from flexgen_jax.engine.effects import BlockEffects
from flexgen_jax.engine.executor import execute
from flexgen_jax.engine.kernels import compilations
from flexgen_jax.engine.snapshots import Snapshot, State
from scheduling.ops import Op
from scheduling.timeline import Timeline
from scheduling.transforms import Cut, remaining
from scheduling.workload import Workload


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


def run_block(
    schedule: Callable[[Workload], Iterable[Op]],
    workload: Workload,
    effects: BlockEffects,
    counts: Counts,
    snapshot: Snapshot | None = None,
) -> Timeline:
    """Runs what is left of a block.

    Args:
        snapshot: Where its state is kept, if at all: what is there is gone on from.

    Returns:
        The measured timeline, of all processes that have run the block.

    Raises:
        ExecutionError: an op failed.
        StorageError: the state is damaged.
    """
    if snapshot is None:
        return execute(schedule(workload), workload, effects)
    parts: list[tuple[float, Timeline]] = []
    kept = snapshot.load()
    if kept is not None:
        state, cells = kept
        effects.restore(state.batches, cells, state.peak_bytes)
        counts.add(state.counts)
        workload = dataclasses.replace(workload, done=state.done)
        parts.append((0.0, state.timeline))
    while True:
        cut = Cut(remaining(schedule(workload), workload), workload, snapshot.due)
        offset = parts[-1][0] + parts[-1][1].seconds if parts else 0.0
        parts.append((offset, execute(cut, workload, effects)))
        effects.settle()
        timeline = Timeline.concatenate(parts, label="measured")
        if cut.ended or effects.finished():
            return timeline
        peak = {tier.value: nbytes for tier, nbytes in effects.peak_bytes.items()}
        state = State(cut.done, effects.batches(), counts(), timeline, peak)
        snapshot.save(state, effects.cells())
        parts = [(0.0, timeline)]
        workload = dataclasses.replace(workload, done=cut.done)
