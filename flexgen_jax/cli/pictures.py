"""The two pictures of a timeline that commands write: a Perfetto trace and a plot.

What is not ours is not written over, as with the outputs of jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flexgen_jax.cli.failures import Failure
from flexgen_jax.jobs.beside import same_file

if TYPE_CHECKING:
    from scheduling.timeline import Timeline


_PIECE = 4096  # bytes of a file's beginning and end, where its generator is
# How the formats name it: JSON, PNG, SVG, PDF.
_MARKS = (
    '{{"otherData": {{"generator": "{}"}}',
    "Software\0{}",
    "<dc:title>{}</dc:title>",
    "/Creator ({})",
)

force_option = click.option(
    "--force", is_flag=True, help="Replace files even if flexgen-jax has not written them."
)


def check_replaceable(path: Path, is_ours: Callable[[Path], bool], *, force: bool) -> None:
    """Whether ``path`` may be written over.

    Raises:
        Failure: something is there that is not ours.
    """
    # An empty file, or a device: nothing could be lost.
    if not force and path.is_file() and path.stat().st_size and not is_ours(path):
        raise Failure(
            f"{path} exists, and flexgen-jax has not written it; give another name, or --force to "
            "replace it"
        )


def is_picture(path: Path) -> bool:
    """Whether it is a trace or a plot of ours; of formats without room for a name, never."""
    from scheduling.timeline import GENERATOR

    with path.open("rb") as file:
        head = file.read(_PIECE)
        file.seek(max(0, path.stat().st_size - _PIECE))
        found = head + file.read(_PIECE)
    return any(mark.format(GENERATOR).encode() in found for mark in _MARKS)


def check_pictures(
    trace: Path | None, plot: Path | None, *others: Path, force: bool = False
) -> None:
    """What would fail after hours of work fails before.

    Args:
        others: What the command reads or writes: none of it may be written over.
        force: Whether other people's files may be.
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
        check_replaceable(path, is_picture, force=force)
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
