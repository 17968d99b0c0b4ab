"""The requests of a block that wait for a place, in the order in which they get one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

from flexgen_jax.planning.blocks import Room
from flexgen_jax.requests.request import Request

Key = tuple[int, int]  # a request's place in the input, and which of its completions
More = Callable[[], Sequence[Request] | None]


class Waiting:
    """First come, first served.

    Args:
        rows: A request for each row.
        more: Gives the rows that come after them, some at a time; None: there are no more.

    Attributes:
        on_taken: Told who gets a place.
    """

    def __init__(self, rows: Sequence[Request] = (), more: More | None = None) -> None:
        self._rows = deque(rows)
        self._more = more
        self.on_taken: Callable[[Key], None] = lambda key: None

    def take(self, count: int, room: Room | None) -> list[Request]:
        """At most ``count`` of them; not beyond the first that there is no room for.

        Args:
            room: Of a row; None: nobody may come.
        """
        taken: list[Request] = []
        while room is not None and len(taken) < count:
            first = self._first()
            if first is None or not room.fits(first):
                break
            taken.append(self._rows.popleft())
            self.on_taken(first.key)
        return taken

    def open_to(self, room: Room | None) -> bool:
        """Whether somebody waits whom there is room for."""
        first = self._first()
        return first is not None and room is not None and room.fits(first)

    @property
    def over(self) -> bool:
        """Whether nobody waits, nor will."""
        return self._first() is None

    def some(self) -> list[Request]:
        """All who wait at the moment."""
        self._first()
        rows, self._rows = list(self._rows), deque()
        return rows

    def put_back(self, rows: Sequence[Request]) -> None:
        """They are the first to come."""
        self._rows.extendleft(reversed(rows))

    def remove(self, keys: Collection[Key]) -> dict[Key, Request]:
        """Takes out those of ``keys`` that wait: by their place in the input, and which completion.

        Who has come before them in the input has come before them here.
        """
        last = max((index for index, _ in keys), default=-1)
        while self._more is not None and max((r.index for r in self._rows), default=-1) < last:
            self._read()
        found = {r.key: r for r in self._rows if r.key in keys}
        self._rows = deque(r for r in self._rows if r.key not in keys)
        return found

    def _read(self) -> None:
        assert self._more is not None
        rows = self._more()
        if rows is None:
            self._more = None
        else:
            self._rows.extend(rows)

    def _first(self) -> Request | None:
        while not self._rows and self._more is not None:
            self._read()
        return self._rows[0] if self._rows else None
