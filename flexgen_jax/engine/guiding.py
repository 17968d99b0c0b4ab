"""What may come next in the rows of a batch, computed on the host while the device computes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from flexgen_jax.requests.generated import Generated
from flexgen_jax.requests.guidance import masks


class Guiding:
    """The masks of a batch, a step after another.

    Begun when the tokens of the step before are known, which is when the first layer of the next
    step is computed; they are wanted behind the last.
    """

    def __init__(self) -> None:
        self._words = 0
        self._rows = 0
        self._pending: Future[np.ndarray] | None = None

    def begin(self, rows: Sequence[Generated | None]) -> None:
        """Of the next token of each of ``rows``."""
        if self._pending is not None and not self._pending.cancel():
            self._pending.result()  # of a step that was taken back: the same guides
        self._pending, self._rows = None, len(rows)
        guided = [
            (place, row.guide, tuple(row.token_ids))
            for place, row in enumerate(rows)
            if row is not None and row.guide is not None
        ]
        if guided:
            self._words = guided[0][1].words
            self._pending = _thread().submit(masks, guided, len(rows))

    def taken(self) -> np.ndarray | None:
        """(rows, words) int32, a bit a token; waits for it. None: no row has ever been guided."""
        pending, self._pending = self._pending, None
        if pending is not None:
            return pending.result()
        return np.full((self._rows, self._words), -1, np.int32) if self._words else None


@functools.cache
def _thread() -> ThreadPoolExecutor:
    """One for all: what it runs is itself spread over cores."""
    return ThreadPoolExecutor(1, thread_name_prefix="guidance")
