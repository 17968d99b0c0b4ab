"""Progress of long work, for a person at a terminal; silent in a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

console = Console(stderr=True, highlight=False, soft_wrap=True)


class _PerSecond(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} {self._unit}/s")


def tokens(
    total: int, *, quiet: bool = False
) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """A bar over at most ``total`` new tokens; see :func:`count`."""
    return count(total, "generating", "tokens", quiet=quiet)


@contextlib.contextmanager
def count(
    total: int | None, what: str, unit: str, *, quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """A bar over at most ``total`` units with their rate and ETA; yields ``advance(count)``.

    Requests that stop early make the total an upper bound, so the bar ends by jumping to its end.
    None: nobody knows.
    """
    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn(f"{{task.completed:.0f}}/{total} {unit}" if total is not None else unit),
        _PerSecond(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda more: bar.advance(task, more)
        bar.update(task, completed=total)


@contextlib.contextmanager
def transfer(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A bar over bytes; yields ``update(done_bytes, total_bytes, tensor_name)``."""
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        # Nothing shows until there is something to transfer.
        task = bar.add_task(what, total=None, visible=False, name="")

        def update(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, visible=True, name=name)

        yield update
