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


class _What(ProgressColumn):
    """What is being done: before anything is counted, what ``first`` says at this moment."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["first"] or task.description))


class Bar:
    """Advances when called with a count."""

    def __init__(self, bar: Progress, task: TaskID, unit: str) -> None:
        self._bar, self._task, self._unit = bar, task, unit

    def __call__(self, more: int) -> None:
        self._bar.update(self._task, advance=more, first=None)

    def expect(self, total: int | None, *, exactly: bool = True) -> None:
        """How many there will be in all, as far as one knows by now."""
        about = "" if exactly else "~"
        of = "" if total is None else f"/{about}{total}"
        self._bar.update(self._task, total=total, of=f"{of} {self._unit}", visible=True)


@contextlib.contextmanager
def count(
    total: int | None, what: str, unit: str, *, first: object = None, quiet: bool = False
) -> Iterator[Bar]:
    """A bar over at most ``total`` units with their rate and ETA; narrow terminals get less of it.

    Requests that stop early make the total an upper bound, so the bar ends by jumping to its end.
    None: nobody knows; then nothing shows before :meth:`Bar.expect`.

    Args:
        first: What is done before there is anything to count: its text, asked for again and again.
    """
    width = console.width
    columns: list[ProgressColumn] = [
        _What(),
        *([BarColumn(max(10, min(40, width - 90)))] if width >= 100 else []),
        TextColumn("{task.completed:.0f}{task.fields[of]}"),
        *([_PerSecond(unit)] if width >= 80 else []),
        *([TimeElapsedColumn()] if width >= 80 else []),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        # Not before what is said first is said: it would be printed onto the bar.
        task = bar.add_task(what, total=None, of="", visible=False, first=first)
        shown = Bar(bar, task, unit)
        if total is not None:
            shown.expect(total)
        yield shown
        bar.update(task, completed=bar.tasks[0].total)


@contextlib.contextmanager
def of_call(
    most_tokens: int, *, wanted: bool
) -> Iterator[tuple[Callable[[int], None], Callable[[int, int], None]] | tuple[None, None]]:
    """A bar over the new tokens of a call in Python, if it is ``wanted`` and there is a terminal.

    Yields what is told of new tokens and of prefill; None: nothing is.
    """
    if not wanted or not console.is_terminal:
        yield None, None
        return
    from flexgen_jax.engine.compiling import Beginning

    beginning = Beginning()
    with count(most_tokens, "generating", "tokens", first=beginning) as bar:
        yield bar, beginning.prefilled


@contextlib.contextmanager
def doing(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Says ``what`` is under way, which has no parts to count."""
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


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
