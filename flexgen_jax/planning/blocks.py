"""Requests into device batches, and batches into blocks.

A batch is one shape: its prompts are padded to a common length from a short list of lengths, so
that a job compiles a handful of programs. Sorting by length keeps the padding small. Each batch of
a block has its own length; what a block shares is the passes over the weights.

A *rolling* block has requests that wait: they take the places of rows that have finished. All its
rows have the same room, that of the longest, since anyone may come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from flexgen_jax.requests.request import Request
from scheduling.workload import Workload

CACHE_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class Room:
    """What each row of a rolling block has room for, whoever comes.

    Attributes:
        prompt_len: Positions of a prompt, padding included.
        num_steps: New tokens.
        positions: Of the cache.
    """

    prompt_len: int
    num_steps: int
    positions: int

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Room:
        """For any of ``requests``, of which there is one at least."""
        prompt_len = num_steps = need = 0
        for length, steps in {(len(r.token_ids), r.max_tokens) for r in requests}:
            prompt_len = max(prompt_len, padded_length(length))
            num_steps = max(num_steps, steps)
            need = max(need, _need(padded_length(length), steps))
        return cls(prompt_len, num_steps, need)

    def and_of(self, other: Room) -> Room:
        """For whom there is room in either."""
        return Room(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))

    def fits(self, request: Request) -> bool:
        """Whether ``request`` may come."""
        length, steps = padded_length(len(request.token_ids)), request.max_tokens
        return (
            length <= self.prompt_len
            and steps <= self.num_steps
            and _need(length, steps) <= self.positions
        )


def _need(prompt_len: int, num_steps: int) -> int:
    """Positions of the KV cache. The last token is never fed back: it needs no place."""
    return -(-(prompt_len + num_steps - 1) // CACHE_MULTIPLE) * CACHE_MULTIPLE


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Requests that one kernel launch sees: ``rows`` rows, the last of which may be empty.

    Attributes:
        room: Of a rolling block.
    """

    requests: tuple[Request, ...]
    rows: int
    prompt_len: int
    room: Room | None = None

    @cached_property
    def num_steps(self) -> int:
        """The most new tokens of a row."""
        if self.room is not None:
            return self.room.num_steps
        return max(r.max_tokens for r in self.requests)

    @cached_property
    def cache_len(self) -> int:
        """Positions of the KV cache."""
        return self.room.positions if self.room else _need(self.prompt_len, self.num_steps)

    @property
    def longest_prompt(self) -> int:
        """Positions of the longest prompt that it may ever have."""
        return self.room.prompt_len if self.room else self.prompt_len

    def tokens(self) -> np.ndarray:
        """(rows, prompt_len) int32, padded on the left; an empty row is one token 0."""
        out = np.zeros((self.rows, self.prompt_len), np.int32)
        for row, request in enumerate(self.requests):
            out[row, self.prompt_len - len(request.token_ids) :] = request.token_ids
        return out

    def padding(self) -> np.ndarray:
        """(rows,) int32: positions of padding at the left of each row."""
        lengths = [len(r.token_ids) for r in self.requests]
        lengths += [1] * (self.rows - len(lengths))
        return self.prompt_len - np.asarray(lengths, np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """The batches that one schedule processes together.

    Attributes:
        waiting: Requests that take the places of those that have finished, in this order.
    """

    batches: tuple[Batch, ...]
    waiting: tuple[Request, ...] = ()

    @property
    def requests(self) -> tuple[Request, ...]:
        """One for each row: a prompt's completions are requests of their own here."""
        return (*(r for batch in self.batches for r in batch.requests), *self.waiting)

    @property
    def room(self) -> Room | None:
        """Of each row, if the block is a rolling one."""
        return self.batches[0].room

    def workload(self, num_layers: int, slots: Mapping[str, Any] | None = None) -> Workload:
        """What the schedule has to order; lengths are the longest batch's.

        Args:
            slots: ``weight_slots``, ``cache_slots``, ``hidden_slots``, ``store_slots``.
        """
        return Workload(
            num_steps=max(b.num_steps for b in self.batches),
            num_layers=num_layers,
            num_batches=len(self.batches),
            device_batch_size=max(b.rows for b in self.batches),
            prompt_len=max(b.prompt_len for b in self.batches),
            **(slots or {}),
        )


def padded_length(length: int) -> int:
    """The bucket of a prompt length: a multiple of 16, 32, 64 or 128; above 64 at most a quarter
    longer."""
    step = 16
    while length > 8 * step and step < 128:
        step *= 2
    return -(-length // step) * step


def padded_rows(count: int, device_batch_size: int) -> int:
    """The rows of a batch of ``count`` requests: a power of two, or ``device_batch_size``."""
    rows = 1
    while rows < count:
        rows *= 2
    return min(rows, device_batch_size)


# Each number of rows takes programs of its own: a batch that is left alone in the end gets this
# many times fewer at once.
SHRINK = 4


def rows_for(live: int, rows: int) -> int:
    """The rows of the batches that ``live`` rows of batches of ``rows`` are put together into:
    as many, or of a single batch a fourth, a sixteenth, ... of them; ``live``: one at least."""
    while live <= rows // SHRINK:
        rows //= SHRINK
    return rows


def fit_into_less(live: int, num_batches: int, rows: int) -> bool:
    """Whether ``live`` rows need not as many batches, or not as many rows of a single one."""
    return live > 0 and (-(-live // rows), rows_for(live, rows)) != (num_batches, rows)


def make_blocks(
    requests: Sequence[Request], *, device_batch_size: int, num_device_batches: int
) -> Iterator[Block]:
    """Cuts ``requests`` into blocks, long prompts first: memory trouble shows at the start.

    The completions of a prompt come one after another, in one block if it has room for them.
    """
    for rows in _rows_of_blocks(long_first(requests), device_batch_size * num_device_batches):
        yield Block(tuple(_batches(rows, device_batch_size)))


def in_turn(requests: Iterable[Request]) -> list[Request]:
    """The rows of ``requests``, one for each completion, in the order in which they are run."""
    return [sample for request in long_first(requests) for sample in request.samples()]


def rolling_block(
    rows: Sequence[Request],
    *,
    device_batch_size: int,
    num_device_batches: int,
    room: Room | None = None,
) -> Block:
    """A block that begins with the first of ``rows``; the others wait.

    Args:
        room: At least so much, for who may come later.
    """
    size = device_batch_size * num_device_batches
    needed = Room.of(rows)
    if room is not None:
        needed = needed.and_of(room)
    batches = _batches(rows[:size], device_batch_size, needed)
    return Block(tuple(batches), tuple(rows[size:]))


def long_first(requests: Iterable[Request]) -> list[Request]:
    """In the order in which they are run."""
    return sorted(requests, key=lambda r: (-len(r.token_ids), -r.max_tokens, r.index))


def _batches(
    rows: Sequence[Request], device_batch_size: int, room: Room | None = None
) -> Iterator[Batch]:
    for group in _groups(rows, device_batch_size):
        yield batch_of(group, padded_rows(len(group), device_batch_size), room)


def batch_of(requests: Sequence[Request], rows: int, room: Room | None = None) -> Batch:
    """``requests`` in a batch of ``rows`` rows, as long as the longest prompt needs."""
    prompt_len = padded_length(max(len(r.token_ids) for r in requests))
    return Batch(tuple(requests), rows, prompt_len, room)


def _rows_of_blocks(order: Iterable[Request], size: int) -> Iterator[list[Request]]:
    rows: list[Request] = []
    for request in order:
        if rows and len(rows) + request.params.n > size:
            yield rows
            rows = []
        for sample in request.samples():
            if len(rows) == size:
                yield rows
                rows = []
            rows.append(sample)
    if rows:
        yield rows


def last_blocks(blocks: Sequence[Block]) -> list[int]:
    """Of each block, the one with which the last of its requests is complete."""
    last = list(range(len(blocks)))
    for number in range(len(blocks) - 2, -1, -1):
        if blocks[number].requests[-1].index == blocks[number + 1].requests[0].index:
            last[number] = last[number + 1]
    return last


def _groups(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[i : i + size] for i in range(0, len(items), size))
