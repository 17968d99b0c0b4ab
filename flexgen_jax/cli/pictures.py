"""The two pictures of a timeline that commands write: a Perfetto trace and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_jax.cli.failures import Failure
from flexgen_jax.jobs.beside import same_file

if TYPE_CHECKING:
    from scheduling.timeline import Timeline


def check_pictures(trace: Path | None, plot: Path | None, *others: Path) -> None:
    """What would fail after hours of work fails before.

    Args:
        others: What the command reads or writes: none of it may be written over.
    """
    for path in (trace, plot):
        if path is None:
            continue
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise Failure(f"cannot write {path}: it is a directory, or its directory is missing")
        if any(same_file(path, other) for other in others):
            raise Failure(
                f"cannot write {path}: it is the job's input or output; give another name"
            )
    if trace is not None and plot is not None and same_file(trace, plot):
        raise Failure(f"--trace and --plot are the same file, {trace}")
    if plot is not None:
        from scheduling.plot import check_format

        check_format(plot)


def write_pictures(
    timelines: Sequence[Timeline],
    trace: Path | None,
    plot: Path | None,
    tell: Callable[[str], None],
) -> None:
    """Those that a path is given for, of all ``timelines``; ``tell`` says where they are."""
    if trace is not None:
        from scheduling.timeline import write_trace

        write_trace(trace, *timelines)
        tell(f"trace (open it at ui.perfetto.dev): {trace}")
    if plot is not None:
        from scheduling.plot import plot as draw

        draw(timelines, plot)
        tell(f"timeline: {plot}")
