"""How many positions the cells of a rolling batch keep: what its living rows need, and little more.

A row that may stay for long has room until its limit; most leave early. So the rings grow when the
oldest row does, and shrink when it has left. Each capacity is a program of its own: few are used.
"""

from __future__ import annotations

from flexgen_jax.planning.blocks import CACHE_MULTIPLE

# Steps for which a smaller ring will do at least: changing it moves what is kept.
MARGIN = 32


def capacity_for(positions: int, most: int) -> int:
    """The least of 32, 64, 96, 128, 192, 256, 384, ... that ``positions`` fit into.

    Args:
        most: Of the batch's room; it is taken where the others are larger.
    """
    size = CACHE_MULTIPLE
    while size < positions:
        half = size // 2 * 3
        size = half if positions <= half and half % CACHE_MULTIPLE == 0 else 2 * size
    return min(size, most)


def next_capacity(now: int, positions: int, most: int) -> int:
    """That of a batch which has ``now``, for ``positions``: more at once, less if it will last."""
    if positions > now:
        return capacity_for(positions, most)
    return min(now, capacity_for(positions + MARGIN, most))
