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
    TaskID,
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


class Bar:
    """Advances when called with a count."""

    def __init__(self, bar: Progress, task: TaskID, what: str, unit: str) -> None:
        self._bar, self._task, self._what, self._unit = bar, task, what, unit

    def __call__(self, more: int) -> None:
        if self._what:
            self._bar.update(self._task, description=self._what)
            self._what = ""
        self._bar.advance(self._task, more)

    def expect(self, total: int | None, *, exactly: bool = True) -> None:
        """How many there will be in all, as far as one knows by now."""
        about = "" if exactly else "~"
        of = "" if total is None else f"/{about}{total}"
        self._bar.update(self._task, total=total, of=f"{of} {self._unit}", visible=True)


@contextlib.contextmanager
def count(
    total: int | None, what: str, unit: str, *, first: str | None = None, quiet: bool = False
) -> Iterator[Bar]:
    """A bar over at most ``total`` units with their rate and ETA; narrow terminals get less of it.

    Requests that stop early make the total an upper bound, so the bar ends by jumping to its end.
    None: nobody knows; then nothing shows before :meth:`Bar.expect`.

    Args:
        first: What is done before there is anything to count.
    """
    width = console.width
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        *([BarColumn(max(10, min(40, width - 90)))] if width >= 100 else []),
        TextColumn("{task.completed:.0f}{task.fields[of]}"),
        *([_PerSecond(unit)] if width >= 80 else []),
        *([TimeElapsedColumn()] if width >= 80 else []),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        # Not before what is said first is said: it would be printed onto the bar.
        task = bar.add_task(first or what, total=None, of="", visible=False)
        shown = Bar(bar, task, what if first else "", unit)
        if total is not None:
            shown.expect(total)
        yield shown
        bar.update(task, completed=bar.tasks[0].total)


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
