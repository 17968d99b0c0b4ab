"""How long XLA has compiled in this process: what a first run has on top of its work."""

from __future__ import annotations

import functools
from typing import Any

import jax.monitoring

# What JAX calls the times that pass before a program can be dispatched, tracing included.
_PREFIX = "/jax/core/compile/"


class _Clock:
    seconds = 0.0

    def add(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(_PREFIX):
            self.seconds += duration_secs


@functools.cache
def _clock() -> _Clock:
    clock = _Clock()
    jax.monitoring.register_event_duration_secs_listener(clock.add)
    return clock


def compile_seconds() -> float:
    """Seconds so far, of all threads, since this was first asked."""
    return _clock().seconds
