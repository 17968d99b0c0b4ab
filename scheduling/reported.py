"""What goes wrong with a schedule as a function: it gives no ops, or fails while it gives them.

What its ops do wrong is the business of ``scheduling.dependencies``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import GeneratorType

from scheduling import transforms
from scheduling.dependencies import ScheduleError
from scheduling.ops import Op
from scheduling.workload import Workload

Given = Iterable[Op] | Callable[[Workload], Iterable[Op]]


def reported(given: Given, workload: Workload) -> Iterator[Op]:
    """The ops of a schedule, one by one as they come.

    Args:
        given: The ops, or the schedule that gives them.

    Raises:
        ScheduleError: the schedule returned nothing that can be gone through, or raised; which op
            was to come, and what it raised is the ``__cause__``.
    """
    index = 0
    try:
        ops = given(workload) if callable(given) else given
        if not isinstance(ops, Iterable):
            raise ScheduleError(f"{_instead(ops)} came instead of its ops; a schedule yields them")
        for op in ops:
            yield op
            index += 1
    except ScheduleError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ScheduleError(f"op {index} did not come: {what}", index=index) from error


def _instead(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


@contextlib.contextmanager
def naming(schedule: str | None) -> Iterator[None]:
    """Errors of an order say which schedule it is; None: nobody knows."""
    try:
        yield
    except ScheduleError as error:
        if schedule is not None:
            error.name(schedule)
        raise


def name_of(given: Given) -> str | None:
    """What the function of a schedule is called, or of the generator that it made.

    None of a transform's generator: that one's name would mislead.
    """
    if isinstance(given, GeneratorType):
        frame = given.gi_frame
        if frame is None or any(frame.f_globals is of for of in (vars(transforms), globals())):
            return None
    elif not callable(given):
        return None
    name = getattr(given, "__name__", None)
    return name if name and not name.startswith("<") else None
