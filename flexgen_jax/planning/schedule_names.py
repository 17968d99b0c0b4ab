"""From what a user calls a schedule to its function.

A name is one of the library's, a registered one, or one that an installed package offers as an
entry point; ``FILE.py:NAME`` is a function of a file.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from flexgen_jax.arguments import shown
from scheduling.ops import Op
from scheduling.registered import SCHEDULES, check_schedule, is_ours
from scheduling.reported import reported
from scheduling.schedules import Schedule
from scheduling.workload import Workload

GROUP = "flexgen_jax.schedules"


def named_schedule(schedule: Any) -> tuple[str, Schedule]:
    """The name of a schedule, as the user has it, and the function.

    Args:
        schedule: A name, ``FILE.py:NAME``, a function, or a name to go by and the function.

    Raises:
        ValueError: there is none, or it cannot be called with a workload.
    """
    if isinstance(schedule, tuple) and len(schedule) == 2 and isinstance(schedule[0], str):
        name, found = schedule
    elif callable(schedule):
        name, found = getattr(schedule, "__name__", type(schedule).__name__), schedule
    elif isinstance(schedule, str):
        name, found = schedule, _of_name(schedule)
    else:
        kind = type(schedule).__name__
        known = ", ".join(sorted(SCHEDULES))
        raise ValueError(
            f"schedule must be one of {known}, FILE.py:NAME or a function, got {shown(schedule)} "
            f"({kind})"
        )
    if is_ours(found):
        return name, found
    check_schedule(name, found)
    return name, _reporting(found)


def _reporting(schedule: Schedule) -> Schedule:
    """The same, but what it raises is said to be its own fault."""
    if getattr(schedule, "reports", False):
        return schedule

    def ops(workload: Workload) -> Iterator[Op]:
        return reported(schedule, workload)

    functools.update_wrapper(ops, schedule)
    ops.reports = True  # type: ignore[attr-defined]
    return ops


def portable(schedule: Any) -> Any:
    """``schedule`` as another process of this or of a like machine understands it."""
    if not isinstance(schedule, str):
        return schedule
    if _is_of_file(schedule):
        path, _, name = schedule.rpartition(":")
        return f"{Path(path).absolute()}:{name}"
    known = SCHEDULES.get(schedule)  # None: a package offers it, there too
    return schedule if known is None else (schedule, known)


def _is_of_file(text: str) -> bool:
    return ":" in text or text.endswith(".py")


def _of_name(text: str) -> Any:
    if _is_of_file(text):
        return _of_file(text)
    if text in SCHEDULES:
        return SCHEDULES[text]
    offered = [point for point in entry_points(group=GROUP) if point.name == text]
    if not offered:
        names = {*SCHEDULES, *(point.name for point in entry_points(group=GROUP))}
        raise ValueError(
            f"no schedule {text!r}{_meant(text, names)}; known: {', '.join(sorted(names))}; your "
            "own is FILE.py:NAME"
        )
    if len({point.value for point in offered}) > 1:
        raise ValueError(
            f"several packages offer a schedule {text!r}: "
            f"{', '.join(sorted(map(_package, offered)))}; remove all but one of them"
        )
    try:
        return offered[0].load()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"the schedule {text!r} of {_package(offered[0])} cannot be loaded: {_why(error)}"
        ) from error


def _package(point: EntryPoint) -> str:
    of = "" if point.dist is None else f"{point.dist.name}, "
    return f"{of}{point.value}"


def _of_file(text: str) -> Any:
    path_text, colon, name = text.rpartition(":")
    if not colon:
        path_text, name = text, ""
    path = Path(path_text)
    if not path_text.endswith(".py"):
        raise ValueError(f"schedule {text!r}: expected a file of Python, as in own.py:my_schedule")
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ValueError(f"schedule {text}: there is no file {path}{_meant(path.name, beside)}")
    module = _module(path, text)
    functions = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    if not name:
        there = f"; it has {', '.join(functions)}" if functions else ""
        raise ValueError(f"schedule {text}: name its function, as in {text}:my_schedule{there}")
    if not hasattr(module, name):
        there = f"; it has {', '.join(functions)}" if functions else "; it has none"
        raise ValueError(
            f"schedule {text}: {path} has no function {name}{_meant(name, functions)}{there}"
        )
    return getattr(module, name)


# A file runs once, however often its schedules are asked for, unless it has changed.
_modules: dict[tuple[Path, str], ModuleType] = {}


def _module(path: Path, text: str) -> ModuleType:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ValueError(f"schedule {text}: cannot read {path}: {error.strerror}") from error
    digest = hashlib.sha256(source).hexdigest()
    key = path.resolve(), digest
    if key not in _modules:
        spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest[:8]}", path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # where dataclasses look
        try:
            exec(compile(source, str(path), "exec"), vars(module))
        except (Exception, SystemExit) as error:
            del sys.modules[module.__name__]
            raise ValueError(f"schedule {text}: importing {path} failed: {_why(error)}") from error
        _modules[key] = module
    return _modules[key]


def _why(error: BaseException) -> str:
    """In one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
