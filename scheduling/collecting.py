"""Cycles of garbage, of which a search makes none."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collecting() -> Iterator[None]:
    """Meanwhile cycles of garbage are not looked for.

    A search makes hundreds of thousands of small objects beside those of a model that has as many
    names, none of them in a cycle; each look goes through all of them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
