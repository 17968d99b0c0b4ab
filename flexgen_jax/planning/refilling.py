"""How the rows of a block are filled and refilled, played with lengths instead of tokens."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import threading
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from flexgen_jax.planning.blocks import fit_into_less, padded_rows, rows_for
from flexgen_jax.planning.capacities import capacity_for, next_capacity

MOST_LIVES = 20_000


class Life(NamedTuple):
    """What a row is to a request: positions of its padded prompt, and its new tokens."""

    prompt_len: int
    num_tokens: int


class IdealRefill:
    """The passes over the weights that first come, first served takes at best.

    A row is somebody else's at the step after it has finished, until nobody waits. Who comes and
    how long each turns out to be is told in any order, by any thread.

    Args:
        rows: Of the block.

    Attributes:
        passes: That it takes for those whose lengths are known, with all who came before them.
        lives: Of the first of these.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._ends: list[int] = []
        self._order: dict[Hashable, None] = {}
        self._known: dict[Hashable, Life] = {}
        self._lock = threading.Lock()  # finishing is told by another thread than coming
        self.passes = 0
        self.lives: list[Life] = []

    def comes(self, key: Hashable) -> None:
        """The next one to get a row; not again, if it had to make way."""
        with self._lock:
            self._order.setdefault(key)

    def has(self, key: Hashable, life: Life) -> None:
        """What that one's turned out to be."""
        with self._lock:
            self._known[key] = life
            while self._order and (first := next(iter(self._order))) in self._known:
                del self._order[first]
                self._count(self._known.pop(first))

    def _count(self, life: Life) -> None:
        if len(self.lives) < MOST_LIVES:
            self.lives.append(life)
        begun = heapq.heappop(self._ends) if len(self._ends) == self._rows else 0
        heapq.heappush(self._ends, begun + life.num_tokens)
        self.passes = max(self.passes, begun + life.num_tokens)


def ideal_passes(lengths: Iterable[int], rows: int) -> int:
    """Of :class:`IdealRefill`, for ``lengths`` in the order in which they come."""
    ideal = IdealRefill(rows)
    for number, length in enumerate(lengths):
        ideal.comes(number)
        ideal.has(number, Life(0, length))
    return ideal.passes


@dataclasses.dataclass
class BatchPlay:
    """One batch in a run of the schedule.

    Attributes:
        cached: Positions in its cache as the run begins; None: it begins, with prompts of
            ``prompt_len``.
        num_steps: Of the run; the first is step 1 where it goes on.
        begun, joined, resized: As :class:`scheduling.sizes.BatchSizes` has them.
    """

    rows: list[int]  # new tokens that each is still to get; 0: nobody's
    has: list[int]  # positions of each in the cache
    most: int | None  # positions that there is room for; None: it keeps all that it has room for
    prompt_len: int = 0
    cached: int | None = None
    num_steps: int = 0
    begun: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    joined: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    resized: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    held: int = 0  # rows that are somebody's, as of its last step border

    def __post_init__(self) -> None:
        self.held = self.live
        if self.most is not None:
            fresh = self.cached is None
            self.resized.append((0, capacity_for(max(self.has) + fresh, self.most)))

    @property
    def live(self) -> int:
        """Rows that are somebody's."""
        return sum(left > 0 for left in self.rows)

    def keep(self, step: int, positions: int, *, fresh: bool) -> None:
        """What ``step`` leaves has so many ``positions``."""
        if self.most is None:
            return
        now = self.resized[-1][1]
        if fresh:
            capacity = capacity_for(positions + 1, self.most)
        else:
            capacity = next_capacity(now, positions, self.most)
        if capacity != now:
            self.resized.append((step + 1, capacity))


@dataclasses.dataclass
class Play:
    """A rolling block from its beginning to its end.

    Attributes:
        runs: Of the schedule, each with its batches: there is another one when those who are left
            are put together into fewer.
        rows_computed, rows_used: As a ``Report`` has them, like ``passes``.
    """

    runs: list[list[BatchPlay]] = dataclasses.field(default_factory=list)
    rows_computed: int = 0
    rows_used: int = 0
    passes: int = 0

    @property
    def occupancy(self) -> float:
        """The share of the computed rows that are of use."""
        return self.rows_used / self.rows_computed if self.rows_computed else 0.0


def play(
    lives: Sequence[Life],
    *,
    device_batch_size: int,
    num_device_batches: int,
    refill: bool = True,
    most_passes: int | None = None,
    most_positions: int = 1 << 30,
) -> Play:
    """What becomes of a block if its requests live so, in the order in which they come.

    As the engine decides it where all batches go through each step together.

    Args:
        refill: False: blocks that follow one another, each a run of its own.
        most_passes: Nothing after these is played.
        most_positions: That there is room for in a row.
    """
    found, size = Play(), device_batch_size * num_device_batches
    most = most_positions if refill else None
    waiting = deque(lives)
    while waiting and (most_passes is None or found.passes < most_passes):
        begin = [waiting.popleft() for _ in range(min(size, len(waiting)))]
        batches = [
            _begun(begin[i : i + device_batch_size], device_batch_size, most)
            for i in range(0, len(begin), device_batch_size)
        ]
        while batches:
            found.runs.append(batches)
            newcomers = waiting if refill else deque[Life]()
            gathered = _run(found, batches, newcomers, refill, most_passes)
            batches = _together(batches) if gathered else []
    return found


def _begun(lives: Sequence[Life], device_batch_size: int, most: int | None) -> BatchPlay:
    rows = padded_rows(len(lives), device_batch_size)
    left = [life.num_tokens for life in lives] + [0] * (rows - len(lives))
    longest = max(life.prompt_len for life in lives)
    return BatchPlay(left, [longest] * rows, most, longest)


def _run(
    found: Play, batches: list[BatchPlay], waiting: deque[Life], gathers: bool, most: int | None
) -> bool:
    """Plays one run to its end, or until those who are left fit into less: True."""
    there, gathering = list(batches), False
    first = batches[0].cached is not None
    for step in itertools.count(int(first)):
        for batch in list(there) if step > int(first) or first else ():
            batch.held = batch.live
            if gathering or (gathers and not waiting and _fit_into_less(there)):
                gathering = True
            elif batch.live or waiting:
                _come(batch, waiting, step)
                continue
            batch.num_steps = step
            there.remove(batch)
        if not there or (most is not None and found.passes >= most):
            for batch in there:
                batch.num_steps = step
            return gathering and any(batch.live for batch in batches)
        found.passes += 1
        for batch in there:
            found.rows_computed += len(batch.rows)
            found.rows_used += batch.live
            batch.rows = [max(0, left - 1) for left in batch.rows]
    raise AssertionError


def _fit_into_less(there: list[BatchPlay]) -> bool:
    live, rows = sum(batch.held for batch in there), max(len(batch.rows) for batch in there)
    return fit_into_less(live, len(there), rows)


def _come(batch: BatchPlay, waiting: deque[Life], step: int) -> None:
    free = [place for place, left in enumerate(batch.rows) if not left]
    come = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
    longest = max((life.prompt_len for life in come), default=0)
    if not batch.live:
        batch.begun.append((step, longest))
        batch.keep(step, longest, fresh=True)
    else:
        if come:
            batch.joined.append((step, padded_rows(len(come), len(batch.rows)), longest))
        has = [n + 1 for n, left in zip(batch.has, batch.rows, strict=True) if left]
        batch.keep(step, max(longest, *has), fresh=False)
    batch.has = [n + bool(left) for n, left in zip(batch.has, batch.rows, strict=True)]
    for place, life in zip(free, come, strict=False):
        batch.rows[place], batch.has[place] = life.num_tokens, life.prompt_len
    batch.held = batch.live


def _together(batches: list[BatchPlay]) -> list[BatchPlay]:
    cached = max((b.cached or b.prompt_len) + b.num_steps for b in batches)
    left = [(n, has) for b in batches for n, has in zip(b.rows, b.has, strict=True) if n]
    rows = rows_for(len(left), max(len(batch.rows) for batch in batches if batch.live))
    found = []
    for start in range(0, len(left), rows):
        part = left[start : start + rows]
        part += [(0, 0)] * (rows - len(part))
        each, has = map(list, zip(*part, strict=True))
        found.append(BatchPlay(each, has, batches[0].most, cached=cached))
    return found
