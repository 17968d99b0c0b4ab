"""How many requests are looked at together: a window, which is cut into blocks."""

from __future__ import annotations

import dataclasses

_REQUESTS = 4096
_NBYTES = 16 * 2**20
_LINES = 16  # a request


@dataclasses.dataclass(frozen=True)
class WindowSize:
    """When a window is full.

    Attributes:
        requests: So many rows are enough, one for each completion: whole blocks, so that only a
            job's last block is not full; where prompts have several, whole prompts.
        nbytes: Of prompts, as they lie in the input: whole blocks likewise.
        lines: So many at most, good and bad, full blocks or not.
    """

    requests: int
    nbytes: int
    lines: int
    block_size: int

    @classmethod
    def of(cls, block_size: int, requests: int | None = None, *, replicas: int = 1) -> WindowSize:
        """For blocks of ``block_size`` requests; at least ``requests``, or as many as is usual.

        Args:
            replicas: Which run blocks of a window at the same time.
        """
        if requests is None:
            requests = max(_REQUESTS, 4 * block_size * replicas)
        blocks = -(-requests // block_size)
        size = max(1, blocks) * block_size
        return cls(size, _NBYTES, _LINES * size, block_size)

    def reached(self, requests: int, nbytes: int, lines: int = 0, *, more: int = 0) -> bool:
        """Whether a window that holds so much is full; ``more``: completions beyond the first."""
        rows = requests + more
        enough = rows > 0 and (rows >= self.requests or nbytes >= self.nbytes)
        return (enough and (more > 0 or rows % self.block_size == 0)) or lines >= self.lines
