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


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} tokens/s")


@contextlib.contextmanager
def tokens(total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar over at most ``total`` new tokens with tokens/s and ETA; yields ``advance(count)``.

    Requests that stop early make the total an upper bound, so the bar ends by jumping to its end.
    """
    columns = (
        TextColumn("generating"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} tokens"),
        _TokensPerSecond(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("tokens", total=total)
        yield lambda count: bar.advance(task, count)
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
