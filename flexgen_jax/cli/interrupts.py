"""Ctrl-C at any moment, also several times over: one line, and the exit code 130.

Before and after the work of a job, an interrupt ends the process at once: there is nothing to be
closed, and an exception amid an import would leave half of it. While a job runs it raises
KeyboardInterrupt, once; what follows in the next moments is part of the same Ctrl-C.

Imports nothing that takes time: it is in force before the rest is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGINT
_PATIENCE = 2.0  # seconds in which further interrupts are not another wish

_tidy: list[Callable[[], None]] = []
_installed = _orderly = False
_raised: float | None = None


def install() -> None:
    """From now on, until the process ends. Ctrl-C that is ignored (``nohup``) stays so."""
    global _installed
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupted)
        _installed = True


def ignore() -> None:
    """What is to be said was said: the process is about to end."""
    if _installed:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def orderly(tidy: Callable[[], None] | None = None) -> Iterator[None]:
    """The work of a job, which ends by KeyboardInterrupt.

    Args:
        tidy: Called if the process is ended at once.
    """
    global _orderly
    if tidy is not None:
        _tidy.append(tidy)
    _orderly = True
    yield
    _orderly = False  # after an error nothing more is raised: it is on its way out
    _tidy.clear()


def on_end(tidy: Callable[[], None]) -> None:
    """Has ``tidy`` called if an interrupt ends the process at once."""
    _tidy.append(tidy)


def _interrupted(number: int, frame: FrameType | None) -> None:
    global _raised
    if _raised is None and _orderly:
        _raised = time.monotonic()
        raise KeyboardInterrupt
    if _raised is not None and time.monotonic() - _raised < _PATIENCE:
        return
    ignore()
    for tidy in _tidy:
        with contextlib.suppress(BaseException):
            tidy()
    os.write(2, _line())
    os._exit(EXIT_CODE)


def _line() -> bytes:
    logs = sys.modules.get("flexgen_jax.logs")
    in_json = getattr(logs, "in_json", None)  # None: only half imported
    if in_json is not None and in_json():
        return b'{"level": "error", "event": "message", "message": "interrupted"}\n'
    return b"Error: interrupted\n"
