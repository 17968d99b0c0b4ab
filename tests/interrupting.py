"""A signal to this process from the middle of a run, which does not go on until it was noticed.

A signal comes when the main thread next runs, which on a busy machine is late: without the waiting
a test would not know how much was done by then.
"""

import os
import threading

from flexgen_jax.engine.effects import BlockEffects
from flexgen_jax.engine.executor import _Run
from flexgen_jax.engine.local_runner import LocalRunner

_FUSE = 300  # seconds: a signal that never comes must not hang the tests


def sender(monkeypatch):
    """A function that sends a signal and waits until the run in progress is told to end.

    To be called on a thread of the executor.
    """
    told, cancel = threading.Event(), _Run.cancel

    def telling(self, *failure):
        cancel(self, *failure)
        told.set()

    def send(number):
        told.clear()
        os.kill(os.getpid(), number)
        assert told.wait(_FUSE)

    monkeypatch.setattr(_Run, "cancel", telling)
    return send


def signal_in_block(monkeypatch, number, block):
    """The signal comes when the first tokens of the ``block``-th block are booked."""
    send, begun, sent = sender(monkeypatch), [], threading.Lock()
    run_block, book = LocalRunner._run_block, BlockEffects._book

    def counting(self, *arguments):
        begun.append(None)
        return run_block(self, *arguments)

    def booking(self, state):
        if len(begun) == block and sent.acquire(blocking=False):
            send(number)
        book(self, state)

    monkeypatch.setattr(LocalRunner, "_run_block", counting)
    monkeypatch.setattr(BlockEffects, "_book", booking)
