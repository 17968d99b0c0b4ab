"""Stores around stores: a slower link, a log, faults. For research and tests.

Each wraps a ``Store`` or a ``SequenceStore`` and passes on what it does not touch, so they nest.
``LLM(wrap_store=...)`` puts them around the tiers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any


class _Wrapper:
    """Passes everything on; calls that move bytes go through :meth:`_move`."""

    # What is wrapped is to be noticed: nothing is free.
    free_load = free_store = False

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __contains__(self, name: str) -> bool:
        return name in self._store

    @property
    def nbytes(self) -> int:
        return int(self._store.nbytes)

    def slot_nbytes(self, what: Any) -> int:
        return int(self._store.slot_nbytes(what))

    def discard(self, name: str) -> None:
        self._store.discard(name)

    def close(self) -> None:
        self._store.close()

    def load(self, names: Any, slot: Any) -> Any:
        return self._move("load", names, lambda: self._store.load(names, slot))

    def take(self, name: str, rows: Any) -> Any:
        return self._move("take", name, lambda: self._store.take(name, rows))

    def put(self, name: str, arrays: Any, *capacity: int, **how: Any) -> None:
        self._move("put", name, lambda: self._store.put(name, arrays, *capacity, **how), arrays)

    def append(self, name: str, arrays: Any) -> None:
        self._move("append", name, lambda: self._store.append(name, arrays), arrays)

    def renew(self, name: str, rows: Any, arrays: Any) -> None:
        self._move("renew", name, lambda: self._store.renew(name, rows, arrays), arrays)

    def resize(self, name: str, capacity: int) -> None:
        self._move("resize", name, lambda: self._store.resize(name, capacity), ())

    def _move(self, verb: str, names: Any, call: Callable[[], Any], moved: Any = None) -> Any:
        raise NotImplementedError


def _nbytes(moved: Any) -> int:
    if isinstance(moved, dict):
        moved = list(moved.values())
    if isinstance(moved, Sequence):
        return sum(array.nbytes for array in moved)
    return int(moved.nbytes)


class Throttled(_Wrapper):
    """A link of ``bytes_per_second`` ("pretend this disk does 0.5 GB/s"), both ways.

    Raises:
        ValueError: no positive rate.
    """

    def __init__(self, store: Any, bytes_per_second: float) -> None:
        super().__init__(store)
        if not bytes_per_second > 0:
            raise ValueError(f"bytes_per_second must be positive, got {bytes_per_second!r}")
        self._bytes_per_second = bytes_per_second

    def _move(self, verb: str, names: Any, call: Callable[[], Any], moved: Any = None) -> Any:
        started = time.perf_counter()
        result = call()
        seconds = _nbytes(moved if moved is not None else result) / self._bytes_per_second
        time.sleep(max(0.0, started + seconds - time.perf_counter()))
        return result


class Logged(_Wrapper):
    """Tells ``log`` the verb, the names and the bytes of every move."""

    def __init__(self, store: Any, log: Callable[[str, Any, int], None]) -> None:
        super().__init__(store)
        self._log = log

    def _move(self, verb: str, names: Any, call: Callable[[], Any], moved: Any = None) -> Any:
        result = call()
        self._log(verb, names, _nbytes(moved if moved is not None else result))
        return result


class Faulty(_Wrapper):
    """Raises what ``fault`` returns, if anything, instead of making a move.

    Args:
        fault: Given the verb and the names, returns an exception or None.
    """

    def __init__(self, store: Any, fault: Callable[[str, Any], BaseException | None]) -> None:
        super().__init__(store)
        self._fault = fault

    def _move(self, verb: str, names: Any, call: Callable[[], Any], moved: Any = None) -> Any:
        error = self._fault(verb, names)
        if error is not None:
            raise error
        return call()
