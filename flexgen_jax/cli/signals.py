"""Being told to stop: by Ctrl-C, or by a system that shuts down or wants its machine back."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM; ends whatever runs as cleanly as Ctrl-C does."""


_terminated = False


def exit_code(error: KeyboardInterrupt) -> int:
    """128 and the signal's number, as shells have it.

    Ray raises a KeyboardInterrupt of its own for what a handler raises while it waits.
    """
    terminated = _terminated or isinstance(error, Terminated)
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def _terminate(number: int, frame: FrameType | None) -> None:
    global _terminated
    _terminated = True
    raise Terminated


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` in the main thread."""
    global _terminated
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _terminated = False
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
