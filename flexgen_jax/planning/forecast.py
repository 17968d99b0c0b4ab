"""What a job of many blocks takes if its requests end as they are expected to.

A forecast is no simulation of it all: its rows are played, and some of its passes priced by their
busiest stream or resource. A simulation has every operation, and takes its time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flexgen_jax.planning.planner import Planner, run_of
from flexgen_jax.planning.refilling import Life, Play, ideal_passes, play
from scheduling.estimate import busiest, lanes, moving, one_after_the_other
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.linear_program import CONTENTION
from scheduling.simulate import simulate
from scheduling.sizes import BatchSizes
from scheduling.timeline import Timeline
from scheduling.transforms import remaining
from scheduling.workload import Workload

# So many blocks' worth of requests, or of large blocks fewer: playing takes seconds at most.
_BLOCKS, _LEAST_BLOCKS, _REQUESTS = 16, 4, 20_000
_PRICED = 128  # passes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """A job of full blocks, one after another.

    Attributes:
        refill: Whether requests that wait take the places of those that have finished.
        requests, tokens: Of the job; the tokens are new ones.
        seconds: That it takes.
        occupancy: The share of the computed rows that are of use.
        passes: Over the weights. ``ideal_passes``: with rows that are never empty while any wait.
    """

    refill: bool
    requests: int
    tokens: int
    seconds: float
    occupancy: float
    passes: int
    ideal_passes: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens over time."""
        return self.tokens / self.seconds

    @property
    def passes_over_ideal(self) -> float:
        """How many times the passes that it takes at best."""
        return self.passes / self.ideal_passes

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {
            **dataclasses.asdict(self),
            "tokens_per_second": self.tokens_per_second,
            "passes_over_ideal": self.passes_over_ideal,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedJob:
    """A job of some blocks' worth of requests, operation by operation.

    Attributes:
        requests, tokens, occupancy, passes, ideal_passes: As a :class:`Forecast` has them.
        timeline: Of all its runs, one after another.
    """

    requests: int
    tokens: int
    occupancy: float
    passes: int
    ideal_passes: int
    timeline: Timeline = dataclasses.field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over time."""
        return self.tokens / self.timeline.seconds

    def to_json(self) -> dict[str, Any]:
        """All figures but the spans."""
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "occupancy": self.occupancy,
            "passes": self.passes,
            "ideal_passes": self.ideal_passes,
            "passes_over_ideal": self.passes / self.ideal_passes,
        }


def simulate_job(planner: Planner, whole: Workload, lives: Sequence[Life]) -> SimulatedJob:
    """Of requests that live so, in this order; refilled if the planner's policy says so.

    Args:
        whole: A full block whose requests run to their limits.
    """
    played = _played(planner, whole, lives)
    parts, offset = [], 0.0
    for run in (run_of(batches, whole) for batches in played.runs):
        part = simulate(remaining(planner.order(run), run), run, planner.hardware)
        parts.append((offset, part))
        offset += part.seconds
    counts = [life.num_tokens for life in lives]
    return SimulatedJob(
        requests=len(lives),
        tokens=sum(counts),
        occupancy=played.occupancy,
        passes=played.passes,
        ideal_passes=ideal_passes(counts, planner.policy.block_size),
        timeline=Timeline.concatenate(parts, label=planner.schedule_name),
    )


def job_size(block_size: int) -> int:
    """The requests of a job that is long for blocks of ``block_size``."""
    return block_size * max(_LEAST_BLOCKS, min(_BLOCKS, _REQUESTS // block_size))


def forecast(
    planner: Planner, whole: Workload, lives: Sequence[Life], *, seconds: float
) -> Forecast:
    """Of requests that live so, in this order.

    Args:
        whole: A full block whose requests run to their limits; ``seconds``: that it takes,
            simulated, which tells how far its schedule is from keeping one lane always busy.
    """
    policy, hardware = planner.policy, planner.hardware
    played = _played(planner, whole, lives)
    passes = [
        (run, step)
        for run in (run_of(batches, whole) for batches in played.runs)
        for step in range(bool(run.done), run.num_steps)
    ]
    # Those with many prompts are few, and take long, and so do those that move the cache: an even
    # part of each kind is looked at.
    passes.sort(key=lambda found: (_positions_moved(*found), _prompt_positions(*found)))
    count = min(len(passes), _PRICED)
    picked = [passes[int((i + 0.5) * len(passes) / count)] for i in range(count)]
    priced = sum(
        _busiest(_pass(run, step), hardware, policy.overlap, decode_only=True)
        for run, step in picked
    )
    slower = seconds / _busiest(whole, hardware, policy.overlap)
    return Forecast(
        refill=policy.refill,
        requests=len(lives),
        tokens=sum(life.num_tokens for life in lives),
        seconds=slower * priced * len(passes) / count,
        occupancy=played.occupancy,
        passes=played.passes,
        ideal_passes=ideal_passes((life.num_tokens for life in lives), policy.block_size),
    )


def _played(planner: Planner, whole: Workload, lives: Sequence[Life]) -> Play:
    policy = planner.policy
    return play(
        lives,
        device_batch_size=policy.device_batch_size,
        num_device_batches=policy.num_device_batches,
        refill=policy.refill,
        most_positions=_most_positions(whole),
    )


def _most_positions(whole: Workload) -> int:
    assert whole.sizes is not None
    return max(batch.capacity for batch in whole.sizes.batches)


def _prompt_positions(run: Workload, step: int) -> int:
    assert run.sizes is not None
    total = 0
    for batch in run.sizes.batches:
        rows, length = batch.newcomers(step)
        begun = batch.rows * batch.positions(step) if batch.begins(step) else 0
        total += begun + rows * length
    return total


def _positions_moved(run: Workload, step: int) -> int:
    """To cells of another capacity."""
    assert run.sizes is not None
    return sum(b.rows * b.cached(step + 1) for b in run.sizes.batches if b.moves(step))


def _pass(run: Workload, step: int) -> Workload:
    """One step of ``run``, as the only one after a prefill."""
    sizes = run.sizes
    assert sizes is not None
    there = [n for n, batch in enumerate(sizes.batches) if step < batch.num_steps]
    batches = []
    for batch in (sizes.batches[number] for number in there):
        rows, length = batch.newcomers(step)
        batches.append(
            dataclasses.replace(
                batch,
                num_steps=2,
                standing=batch.cached(step),
                begun=((1, batch.positions(step)),) if batch.begins(step) else (),
                joined=((1, rows, length),) if rows else (),
                resized=_around(batch, step) if batch.resized else (),
            )
        )
    cells = sizes.cache
    if len(there) < len(sizes.batches):
        places = {number: place for place, number in enumerate(there)}
        cells = {(at, places[n]): cell for (at, n), cell in cells.items() if n in places}
    return dataclasses.replace(
        run,
        num_steps=2,
        num_batches=len(there),
        done=(),
        sizes=dataclasses.replace(sizes, batches=tuple(batches), cache=cells),
    )


def _around(batch: BatchSizes, step: int) -> tuple[tuple[int, int], ...]:
    """The capacities before and after ``step``, as if it were step 1."""
    before = batch.cached(step)
    later = batch.cached(step + 1)
    return ((0, before),) if before == later else ((0, before), (2, later))


def _busiest(
    workload: Workload, hardware: Hardware, overlap: bool, *, decode_only: bool = False
) -> float:
    found = lanes(workload, hardware)
    if decode_only:
        found = {kind: ({}, decode) for kind, (_, decode) in found.items()}
    if not overlap:
        found = one_after_the_other(found)
    shared = Limits.of(hardware).shared
    return busiest(found) + (CONTENTION * moving(found) if shared else 0.0)
