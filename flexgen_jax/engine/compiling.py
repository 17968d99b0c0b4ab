"""How long XLA has compiled in this process: what a first run has on top of its work."""

from __future__ import annotations

import functools
from typing import Any

import jax.monitoring

# What JAX calls the times that pass before a program can be dispatched, tracing included.
_PREFIX = "/jax/core/compile/"


# What it tells just before XLA compiles, and when that is done.
_LOWERED = "jaxpr_to_mlir_module_duration"
_COMPILED = "backend_compile_duration"


class _Clock:
    seconds = 0.0
    compiling = False

    def add(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(_PREFIX):
            self.seconds += duration_secs
            if event.endswith((_LOWERED, _COMPILED)):
                self.compiling = event.endswith(_LOWERED)


@functools.cache
def _clock() -> _Clock:
    clock = _Clock()
    jax.monitoring.register_event_duration_secs_listener(clock.add)
    return clock


def compile_seconds() -> float:
    """Seconds so far, of all threads, since this was first asked."""
    return _clock().seconds


class Beginning:
    """What a run is doing until its first tokens are there: its text is for a progress bar."""

    def __init__(self) -> None:
        self._done = self._of = 0
        _clock()

    def prefilled(self, done: int, of: int) -> None:
        """So many of the first prompts' computations are done."""
        self._done, self._of = done, of

    def __str__(self) -> str:
        if _clock().compiling:
            return "compiling"
        return f"prefill {self._done} of {self._of}" if self._of else "loading"
