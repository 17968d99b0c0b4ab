"""Arguments of the wrong type: one clear error each, before anything begins."""

from __future__ import annotations

import numbers
import os
from typing import Any

PATHS = (str, os.PathLike)


def shown(value: object) -> str:
    """A short ``repr``."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def expect(
    name: str, value: Any, kinds: type | tuple[type, ...], what: str, *, optional: bool = False
) -> None:
    """Refuses a ``value`` that is none of ``kinds``.

    Args:
        what: What is expected, in words.
        optional: None will do, too.

    Raises:
        ValueError: what was expected, and what came.
    """
    if (optional and value is None) or isinstance(value, kinds):
        return
    raise ValueError(f"{name} must be {what}, got {shown(value)} ({type(value).__name__})")


def expect_callable(name: str, value: Any) -> None:
    """Likewise, of what is called back; None: nothing is.

    Raises:
        ValueError: it cannot be called.
    """
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be a function, got {shown(value)} ({type(value).__name__})")


def expect_names(name: str, value: Any) -> None:
    """Refuses one text where several are expected: its letters would be taken for them.

    Raises:
        ValueError: a text, or what is no list.
    """
    if isinstance(value, str):
        raise ValueError(f"{name} must be a list of names, got a text: give [{value!r}]")
    expect(name, value, (list, tuple, set, frozenset), "a list of names")


def is_int(value: object) -> bool:
    """NumPy's integers are some, too; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
