"""Files that are open for reading: many are read, and a process may hold few."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator

MOST = 256


class Descriptors:
    """Opens each file once, and closes what was not read for longest. For several threads.

    Args:
        most: How many stay open, beside those that are being read.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._open: OrderedDict[tuple[str, int], list[int]] = OrderedDict()  # descriptor, readers
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def opened(self, path: str, flags: int) -> Iterator[int]:
        """A descriptor of ``path``, which stays open meanwhile.

        Raises:
            OSError: it cannot be opened.
        """
        key = path, flags
        with self._lock:
            if key not in self._open:
                self._open[key] = [os.open(path, flags | os.O_CLOEXEC), 0]
            self._open.move_to_end(key)
            entry = self._open[key]
            entry[1] += 1
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                self._close_down_to(self._most)

    def _close_down_to(self, most: int) -> None:
        while len(self._open) > most:
            key = next((key for key, (_, readers) in self._open.items() if not readers), None)
            if key is None:
                return
            os.close(self._open.pop(key)[0])

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Closes all that nobody reads."""
        with self._lock:
            self._close_down_to(0)
