"""Schedules by name: those that are here, and those that others register."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType

from scheduling.pipelined import cgopipe, neo
from scheduling.schedules import Schedule, diagonal, lock_step, row_by_row, zigzag

_OURS: dict[str, Schedule] = {
    "zigzag": zigzag,
    "row_by_row": row_by_row,
    "lock_step": lock_step,
    "diagonal": diagonal,
    "cgopipe": cgopipe,
    "neo": neo,
}
# Whose order depends on where caches lie and on whether weights are in codes.
_BY_SIZES = (cgopipe, neo)
_all = dict(_OURS)
SCHEDULES: Mapping[str, Schedule] = MappingProxyType(_all)

# Neither a path nor FILE.py:NAME.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


def register(name: str, schedule: Schedule, *, replace: bool = False) -> None:
    """Makes ``schedule`` known by ``name`` in this process: in ``SCHEDULES``, and wherever a
    schedule is named.

    Args:
        name: Letters, digits, ``_``, ``-`` and dots, beginning with a letter or ``_``.
        replace: Another one of that name gives way, unless it is the library's own.

    Raises:
        ValueError: a name that is taken or cannot be, or what is no schedule.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith(".py"):
        raise ValueError(
            f"the name of a schedule must consist of letters, digits, '_', '-' and dots, begin "
            f"with a letter or '_' and not end with .py, got {name!r}"
        )
    if name in _OURS:
        raise ValueError(f"there is a schedule {name!r} in the library: choose another name")
    if name in _all and not replace:
        raise ValueError(
            f"a schedule {name!r} is registered already: choose another name, or replace=True"
        )
    check_schedule(name, schedule)
    _all[name] = schedule


def is_ours(schedule: object) -> bool:
    """Whether it is one of the library's, which are known to be valid."""
    return any(schedule is known for known in _OURS.values())


def goes_by_shape(schedule: object) -> bool:
    """Whether it is one of the library's that gives the same ops whatever the sizes are."""
    return is_ours(schedule) and all(schedule is not other for other in _BY_SIZES)


def check_schedule(name: str, schedule: object) -> None:
    """Refuses what cannot be called with a workload.

    Args:
        name: What the error calls it.

    Raises:
        ValueError: it is no function, or not one of a workload alone.
    """
    if not callable(schedule):
        raise ValueError(
            f"schedule {name}: expected a function from a Workload to operations, got a value of "
            f"type {type(schedule).__name__}"
        )
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):
        return  # of some written in C nothing is known
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            f"schedule {name}: it must be callable with a Workload alone, and its parameters are "
            f"{signature}: {error}"
        ) from error
