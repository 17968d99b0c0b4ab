"""Requests into device batches, and batches into blocks.

A batch is one shape: its prompts are padded to a common length from a short list of lengths, so
that a job compiles a handful of programs. Sorting by length keeps the padding small. Each batch of
a block has its own length; what a block shares is the passes over the weights.
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


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Requests that one kernel launch sees: ``rows`` rows, the last of which may be empty."""

    requests: tuple[Request, ...]
    rows: int
    prompt_len: int

    @cached_property
    def num_steps(self) -> int:
        return max(r.params.max_tokens for r in self.requests)

    @cached_property
    def cache_len(self) -> int:
        """Positions of the KV cache. The last token is never fed back: it needs no place."""
        need = self.prompt_len + self.num_steps - 1
        return -(-need // CACHE_MULTIPLE) * CACHE_MULTIPLE

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
    """The batches that one schedule processes together."""

    batches: tuple[Batch, ...]

    @property
    def requests(self) -> tuple[Request, ...]:
        """One for each row: a prompt's completions are requests of their own here."""
        return tuple(r for batch in self.batches for r in batch.requests)

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
    """The bucket of a prompt length: a multiple of 16, 32, 64 or 128, at most a quarter longer."""
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


def make_blocks(
    requests: Sequence[Request], *, device_batch_size: int, num_device_batches: int
) -> Iterator[Block]:
    """Cuts ``requests`` into blocks, long prompts first: memory trouble shows at the start.

    The completions of a prompt come one after another, in one block if it has room for them.
    """
    order = sorted(requests, key=lambda r: (-len(r.token_ids), -r.params.max_tokens, r.index))
    for rows in _rows_of_blocks(order, device_batch_size * num_device_batches):
        yield Block(
            tuple(
                Batch(
                    requests=tuple(group),
                    rows=padded_rows(len(group), device_batch_size),
                    prompt_len=padded_length(max(len(r.token_ids) for r in group)),
                )
                for group in _groups(rows, device_batch_size)
            )
        )


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
