"""Where a sequence lies in a ring of ``capacity`` positions: position p at index p % capacity.

Arithmetic only; what lies there is the stores' business.
"""

from __future__ import annotations

import numpy as np


def spans(length: int, count: int, capacity: int) -> list[tuple[int, int, int]]:
    """Where ``count`` more positions go, after ``length``: cut where they cross the ring's end.

    Of more than the capacity, the last ones count. What fits behind ``length`` is one span, so a
    sequence that must not wrap is written by the same spans.

    Returns:
        Of each span, the index of its first position in the ring, that among the positions that
        came, and its size.
    """
    if length + count <= capacity:
        return [(length, 0, count)]
    source = max(0, count - capacity)
    start, left = (length + source) % capacity, count - source
    size = min(left, capacity - start)
    first = (start, source, size)
    return [first] if size == left else [first, (0, source + size, left - size)]


def even_pieces(capacity: int, positions: int) -> int:
    """Positions of a piece if the ring is cut into as few as have at most ``positions``.

    All pieces are equal, but for the last one, which may be shorter.
    """
    return -(-capacity // -(-capacity // positions))


def resized_index(length: int, old: int, new: int) -> np.ndarray:
    """Of each index of a ring of ``new`` positions, where in one of ``old`` its position lies.

    Where no position of the old ring belongs: some index or other.

    Args:
        length: How many positions the sequence has.

    Returns:
        (new,) int32.
    """
    position = length - 1 - (length - 1 - np.arange(new)) % new
    return (position % old).astype(np.int32)
